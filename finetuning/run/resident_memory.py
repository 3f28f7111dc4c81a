"""The most memory that this process has had at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

UNITS = {"darwin": 1}  # bytes of what getrusage counts in; elsewhere KiB


def peak_resident_memory() -> float:
    """GiB of main memory that this process has had at most, on Linux, macOS and Windows."""
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
    """GiB of what getrusage says on a platform, as sys.platform names it: bytes on macOS, KiB on others."""
    return ru_maxrss * UNITS.get(platform, 1024) / 2**30
