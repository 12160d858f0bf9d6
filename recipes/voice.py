"""A program that is never silent: it prints what it does, and where output is no terminal repeats it every 8 seconds.

This module imports nothing slow, so that a recipe can speak before it imports torch.
"""

from __future__ import annotations

import os
import sys
import threading
import time

SILENCE = 8.0
"""Seconds without a line after which the present activity is printed again."""


class Voice:
    """Prints lines, from the first of several processes only.

    Attributes:
        activity: What is being done at present; setting it prints nothing.
        has_bar: Whether a progress bar speaks at present.
    """

    def __init__(self) -> None:
        self.activity = ""
        self.has_bar = False
        self.is_first = os.environ.get("RANK", "0") == "0"
        self._start = self._last = time.monotonic()
        self._thread: threading.Thread | None = None

    def say(self, text: str) -> None:
        """Print a line."""
        self._last = time.monotonic()
        if self.is_first:
            print(text, flush=True)

    def begin(self, activity: str) -> None:
        """Print what begins, and repeat it while nothing else is said."""
        self.activity = activity
        self.say(activity)
        if self._thread is None:
            self._thread = threading.Thread(target=self._repeat, daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Repeat nothing any longer."""
        self.activity = ""

    def _repeat(self) -> None:
        while True:
            time.sleep(0.5)
            if (
                self.activity
                and time.monotonic() - self._last >= SILENCE
                and not (self.has_bar and sys.stderr.isatty())
            ):
                self.say(f"  ... {self.activity} ({time.monotonic() - self._start:.0f} s since the start)")


voice = Voice()
