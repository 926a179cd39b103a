"""Whether a worker still answers: it says so every BEAT_S, and one that has said so and then falls silent hangs. Pure.

Decided here: silence is counted in looks of the daemon, not in seconds, since a daemon that stood still itself (a machine that was
suspended, no processor to be had) must not take its workers for hung. Rule: a worker that never spoke, of a version that does
not, is never taken for hung.
"""

from __future__ import annotations

from typing import Final

BEAT_S: Final = 5.0
"""Between two words of a worker, and between two looks of the daemon."""
SILENT_LOOKS: Final = 6
"""Half a minute: longer than any work of a worker between two turns of its loop, shorter than what waits for it will bear."""


class Pulse:
    """Of one worker process."""

    def __init__(self) -> None:
        self._silent = -1

    def heard(self) -> None:
        """Note that it spoke."""
        self._silent = 0

    def look(self) -> bool:
        """Look once more; return whether it hangs."""
        if self._silent >= 0:
            self._silent += 1
        return self._silent > SILENT_LOOKS
