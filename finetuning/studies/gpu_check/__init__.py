"""The check on a GPU, with one file for each stage of scripts/gpu_check.py.

The stages ask whether the adapter is exact on a GPU, whether a step makes the host wait, whether the trainers train as
well as on a CPU, and what all of it costs.
"""
