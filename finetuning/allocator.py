"""Memory on a CPU."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed, on Linux.

    It would return large blocks to the system after every step and take them back page by page: up to a quarter of a
    step's time (`scripts/profile_training.py`, with and without MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ in
    the environment). The peak stays what it was; between peaks the process is larger.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
