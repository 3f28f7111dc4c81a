"""What Python has on Windows, on another system: a stand-in for processes of tests, to be called before anything else.

Modules and names that only POSIX has are absent for this repository's code, folders cannot be opened, files that are
open for reading only cannot be synced, nothing is renamed onto something, and processes are spawned. Libraries know
which system they run on, and may go on using what it has.
"""

from __future__ import annotations

import builtins
import errno
import multiprocessing
import os
import signal
import sys
import types
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent) + os.sep
MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix")
OF_OS = (
    "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_SYNC", "fork", "forkpty", "killpg", "getpgid", "setsid", "setpgid",
    "getuid", "geteuid", "getgid", "chown", "fchmod", "statvfs", "sysconf", "uname", "mkfifo", "nice", "getloadavg",
    "sched_getaffinity", "sched_setaffinity", "wait3", "wait4", "pread", "posix_fallocate", "fdatasync", "sync",
)  # fmt: skip
OF_SIGNAL = ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGSTOP", "SIGCONT", "alarm",
             "setitimer", "pause")  # fmt: skip


class Lacking(types.ModuleType):
    """A module without some of its names."""

    def __init__(self, module: types.ModuleType, names: tuple[str, ...]):
        super().__init__(module.__name__)
        self.__dict__.update({name: value for name, value in vars(module).items() if name not in names})


def stand_in() -> None:
    """From here on, this process is on Windows as far as the repository's own code can see."""
    lacking = {"os": Lacking(os, OF_OS), "signal": Lacking(signal, OF_SIGNAL)}
    lacking["os"].open, lacking["os"].fsync = _open, _fsync
    lacking["os"].rename = _rename
    os.rename = _rename  # by which pathlib does it, too
    importing = builtins.__import__

    def find(name, globals=None, locals=None, fromlist=(), level=0):
        is_own = str((globals or {}).get("__file__", "")).startswith(ROOT) and ".venv" not in globals["__file__"]
        if is_own and level == 0 and name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        found = importing(name, globals, locals, fromlist, level)
        return lacking.get(name, found) if is_own and level == 0 else found

    builtins.__import__ = find
    multiprocessing.set_start_method("spawn")
    assert not [name for name in sys.modules if name.split(".")[0] in ("finetuning", "boft", "toyworld", "scripts")]


_read_only: set[int] = set()
_open_file, _sync_file, _rename_file = os.open, os.fsync, os.rename


def _open(path, flags, mode=0o777, *, dir_fd=None):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    handle = _open_file(path, flags, mode, dir_fd=dir_fd)
    (_read_only.discard if flags & (os.O_WRONLY | os.O_RDWR) else _read_only.add)(handle)
    return handle


def _fsync(handle):
    if handle in _read_only:
        raise OSError(errno.EBADF, "Bad file descriptor")
    _sync_file(handle)


def _rename(source, target, **more):
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(target))
    _rename_file(source, target, **more)
