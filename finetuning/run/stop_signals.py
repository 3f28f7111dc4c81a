"""SIGINT and SIGTERM, which end a run after the step that is being done."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopSignals:
    """Listens for the signals that ask a process to stop.

    Attributes:
        received: the number of the signal that came; 0 = none did.
    """

    def __init__(self) -> None:
        self.received = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note a signal for as long as the block lasts. A second one ends the process at once."""

        def stop(number: int, frame: object) -> None:
            if self.received:
                os._exit(128 + number)
            self.received = number

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
