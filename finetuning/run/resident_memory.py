"""The most main memory that this process has had at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

UNITS = {"darwin": 1}  # bytes of what getrusage counts in; elsewhere KiB


def peak_resident_memory() -> float:
    """The most main memory that this process has had at once, in GiB, on Linux, macOS and Windows."""
    status = Path("/proc/self/status")  # of Linux: getrusage there counts the process that started this one, too
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(found[1]) / 2**20
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**30
    return gib_of(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sys.platform)


def gib_of(ru_maxrss: int, platform: str) -> float:
    """What getrusage says, in GiB. It counts in bytes on macOS and in KiB elsewhere.

    Args:
        platform: as sys.platform names it.
    """
    return ru_maxrss * UNITS.get(platform, 1024) / 2**30
