"""How fast a test's web server gives: all its threads share one rate, and may be stopped at a number of bytes."""

from __future__ import annotations

import threading
import time


class Pace:
    """Bytes per second; 0: no limit."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self._due = 0.0
        self._lock = threading.Lock()
        self._ended = False

    def wait(self, count: int) -> None:
        """Return when `count` more bytes may go."""
        if not self.bytes_per_s:
            return
        with self._lock:
            now = time.monotonic()
            self._due = max(self._due, now) + count / self.bytes_per_s
            wait = self._due - now
        if wait > 0 and not self._ended:
            time.sleep(min(wait, 1.0))

    def end(self) -> None:
        """Let everything go."""
        self._ended = True
        self.bytes_per_s = 0.0
