"""What ends a program with a message in the place of a traceback."""

from __future__ import annotations

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(Exception):
    """The user asked for what cannot be done. Each fault names the flag, its value and the remedy."""

    def __init__(self, *faults: str):
        super().__init__("\n".join(faults))
        self.faults = faults


class RunError(Exception):
    """A run cannot go on, through no fault of its input."""
