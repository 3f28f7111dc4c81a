"""The most memory that this process has had, on every system."""

from __future__ import annotations

import sys


def peak_resident_memory() -> int:
    """Bytes of main memory that the process has held at once at most."""
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
