"""The most memory that this process has had at once."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

UNITS = {"darwin": 1}  # bytes of what getrusage counts in; elsewhere KiB


def peak_resident_memory() -> float:
    """GiB of main memory that this process has had at most, on Linux, macOS and Windows."""
    if sys.platform == "win32":
        return _peak_working_set() / 2**30
    status = Path("/proc/self/status")  # of Linux: getrusage there counts the process that started this one, too
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**20
    import resource  # which Windows does not have

    return gib_of(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sys.platform)


def gib_of(ru_maxrss: int, platform: str) -> float:
    """GiB of what getrusage says on a platform, as sys.platform names it: bytes on macOS, KiB on others."""
    return ru_maxrss * UNITS.get(platform, 1024) / 2**30


def _peak_working_set() -> int:
    """Bytes, as Windows says."""

    class Counters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS
        _fields_ = (("cb", ctypes.c_uint32), ("PageFaultCount", ctypes.c_uint32),
                    *((name, ctypes.c_size_t) for name in (
                        "PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPagedPoolUsage", "QuotaPagedPoolUsage",
                        "QuotaPeakNonPagedPoolUsage", "QuotaNonPagedPoolUsage", "PagefileUsage", "PeakPagefileUsage",
                    )))  # fmt: skip

    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    ask = kernel32.K32GetProcessMemoryInfo
    ask.argtypes = (ctypes.c_void_p, ctypes.POINTER(Counters), ctypes.c_uint32)
    counters = Counters(cb=ctypes.sizeof(Counters))
    if not ask(kernel32.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
        raise ctypes.WinError(ctypes.get_last_error())
    return counters.PeakWorkingSetSize
