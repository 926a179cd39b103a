"""What the line to where chunks come from is like: how long a request takes to be answered, and how fast bytes come. Pure.

Decided here: how both are estimated, and how far ahead of a stream that lets one fetch. To keep a line busy, as much has to be asked for
and not be here yet as it delivers while one request is on its way (latency times bandwidth); a stream that is led by less waits for the
line at every step. Times are seconds of a clock that is passed in.
"""

from __future__ import annotations

from typing import Final

GROWTH: Final = 4
"""A window is never more than so many times what was configured, however long the line."""
HALF_LIFE_S: Final = 2.0
"""Of busy time: what came before counts half."""
ENOUGH_S: Final = 0.05
"""Busy time before anything is said of the bandwidth."""
_WEIGHT: Final = 1 / 8
"""Of a new latency, as RFC 6298 has it for round trips."""


class LineEstimate:
    """The estimate. `began` and `ended` are called for each read that bytes come by, `answered` when its first byte is here."""

    def __init__(self) -> None:
        self.latency_s = 0.0
        self._reads = 0
        self._since = 0.0
        self._bytes = 0.0
        self._busy_s = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second while something is on its way; 0 if too little has come."""
        return self._bytes / self._busy_s if self._busy_s >= ENOUGH_S else 0.0

    def began(self, now: float) -> None:
        """Note that a request is sent."""
        self._pass(now)
        self._reads += 1

    def answered(self, seconds: float) -> None:
        """Note that a request was answered after so long."""
        self.latency_s = seconds if not self.latency_s else self.latency_s + _WEIGHT * (seconds - self.latency_s)

    def ended(self, now: float, size: int) -> None:
        """Note that a read has ended, with so many bytes."""
        self._pass(now)
        self._reads -= 1
        self._bytes += size

    def window(self, least: int, step: int) -> int:
        """Return how far ahead of a stream to fetch, bytes: `least`, or what keeps the line busy with requests of `step` bytes."""
        wanted = 2 * (int(self.latency_s * self.bandwidth) + step)
        return max(least, min(wanted, GROWTH * least))

    def _pass(self, now: float) -> None:
        """Let time pass, which counts while something is on its way."""
        if self._reads:
            passed = max(0.0, now - self._since)
            kept = 0.5 ** (passed / HALF_LIFE_S)
            self._bytes *= kept
            self._busy_s = self._busy_s * kept + passed
        self._since = now
