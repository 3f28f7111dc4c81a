"""A stage for test_gpu_check.py: measures what there is time for."""


def run(check):
    check.measure("one", lambda: {"value": 1.0})
    check.measure("long", lambda: {"value": 2.0}, needs=10_000)
