"""Errors that end a program with a message instead of a traceback."""

from __future__ import annotations

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(Exception):
    """What the user asked for cannot be done.

    Args:
        faults: all that is wrong; each names the flag, its value and the remedy.
    """

    def __init__(self, *faults: str):
        super().__init__("\n".join(faults))
        self.faults = faults


class RunError(Exception):
    """A run cannot go on, for a reason that lies not in its input, e.g. a full disk."""
