"""What a GPU must show: that the adapter is exact on it, that a step does not make the host wait, that the trainer
trains as well as on a CPU, and what all of it costs. One file a stage; the command is scripts/gpu_check.py."""
