"""Ctrl-C while training: the first ends it after the step at hand, the second at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether the user has asked to stop.

    Attributes:
        asked: True after the first Ctrl-C.
    """

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.default_int_handler(number, frame)
        self.asked = True
        sys.stderr.write("\nstopping after this step; press Ctrl-C again to stop at once\n")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen for Ctrl-C, where nobody else does: in the main thread, with Python's handler."""
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not usual or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
