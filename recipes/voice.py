"""Prints what a program does, and repeats it every 8 seconds; imports nothing slow."""

from __future__ import annotations

import os
import threading
import time


class Voice:
    """Prints lines, from the first of several processes only.

    Attributes:
        activity: What is being done at present; it is repeated while nothing else is said.
    """

    def __init__(self) -> None:
        self.activity, self.is_first = "", os.environ.get("RANK", "0") == "0"
        self._start = self._last = time.monotonic()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def say(self, text: str) -> None:
        """Print a line."""
        self._last = time.monotonic()
        if self.is_first:
            print(text, flush=True)

    def begin(self, activity: str) -> None:
        """Print what begins."""
        self.activity = activity
        self.say(activity)
        if self._thread.ident is None:
            self._thread.start()

    def _repeat(self) -> None:
        while True:
            time.sleep(0.5)
            if self.activity and time.monotonic() - self._last >= 8:
                self.say(f"  ... {self.activity} ({time.monotonic() - self._start:.0f} s since the start)")


voice = Voice()
