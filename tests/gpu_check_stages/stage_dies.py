"""A stage for test_gpu_check.py: measures something, then its process is gone, as after a crash in a library."""

import os


def run(check):
    check.measure("one", lambda: {"value": 1.0})
    os._exit(3)
