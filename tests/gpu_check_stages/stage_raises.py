"""A stage for test_gpu_check.py: measures something, then raises."""


def run(check):
    check.measure("one", lambda: {"value": 1.0})
    check.measure("two", lambda: 1 / 0)
    raise ValueError("this stage cannot go on")
