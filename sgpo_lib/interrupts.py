"""Ctrl-C between two steps: it waits while weights change, so that what is in memory is always a state to save."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupts:
    """Holds Ctrl-C back from `hold` to `release`; a second one is raised at once.

    In a thread other than the main one, which Python sends no signal, it only keeps `holding`.
    """

    def __init__(self) -> None:
        self.holding = False
        """Whether weights may be between two states."""
        self._came = False
        self._before: Any = None

    def hold(self) -> None:
        """From here on Ctrl-C waits."""
        if not self.holding:
            self._came = False
            if threading.current_thread() is threading.main_thread():
                self._before = signal.signal(signal.SIGINT, self._later)
            self.holding = True

    def release(self) -> None:
        """The state is whole. Raises the KeyboardInterrupt that waited."""
        self.holding = False
        self.restore()
        if self._came:
            self._came = False
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Give SIGINT back to who had it; what waited is dropped (another error is on its way)."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _later(self, *_: Any) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True
