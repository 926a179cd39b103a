"""A limit on the rate of all uploads of a node: a bucket that fills with time.

Concurrency: any number of tasks wait; each reserves its bytes without a checkpoint, then sleeps until they are due, so order is kept.
"""

from __future__ import annotations

import trio


class UploadPace:
    """Bytes per second; 0 or less: no limit."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._due = 0.0

    async def __call__(self, count: int) -> None:
        """Return when `count` more bytes may be sent."""
        if self._rate <= 0:
            return
        now = trio.current_time()
        due = max(self._due, now - 0.05)
        self._due = due + count / self._rate
        if due > now:
            await trio.sleep(due - now)
