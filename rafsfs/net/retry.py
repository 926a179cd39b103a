"""When to try again, and how long to wait first. Pure: no clock, no sockets; the caller sleeps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Final

RETRY_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that say "not now" rather than "no"."""

_BASE_S: Final = 0.2
_CAP_S: Final = 5.0
_RETRY_AFTER_CAP_S: Final = 60.0
"""A server that asks for more is treated as gone: the caller's deadline is usually 60 s."""


def backoff(attempts: int, rng: random.Random) -> Iterator[float]:
    """Yield `attempts` delays in seconds: 0.2 s doubling to 5 s, each jittered to 50-100 % so that nodes spread out."""
    delay = _BASE_S
    for _ in range(attempts):
        yield delay * (0.5 + rng.random() / 2)
        delay = min(_CAP_S, delay * 2)


def retry_after(value: str | None, now_s: float) -> float | None:
    """Return the seconds that a Retry-After header asks for, None without a usable one; at most 60."""
    if not value:
        return None
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - now_s
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 0.0), _RETRY_AFTER_CAP_S)
