"""What a GPU must show, one file for each stage of scripts/gpu_check.py.

The adapter is exact on it, a step does not make the host wait, the trainers train as well as on a CPU; and what all of
it costs.
"""
