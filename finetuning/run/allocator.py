"""What the C library does with memory that a training step on a CPU frees."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed, on Linux.

    It would return large blocks to the system after every step and take them back page by page, which costs a good
    part of a small model's step. The peak grows by little (by what lies idle between kept blocks); between peaks the
    process is larger.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
