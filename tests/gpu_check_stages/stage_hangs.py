"""A stage for test_gpu_check.py: measures something, then does not end."""

import time


def run(check):
    check.measure("one", lambda: {"value": 1.0})
    time.sleep(1000)
