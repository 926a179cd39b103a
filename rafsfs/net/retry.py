"""When to try again: exponential back-off with full jitter, bounded in tries and in waiting.

Decided here: how long to wait before the next try, or that there is none. Pure: the caller brings the clock, the
random number and the deadline. Rule: a Retry-After is a lower bound on the wait; one that does not fit into what is
left ends the trying at once instead of being cut short.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

RETRYABLE_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long to try again."""

    retries: int = 4
    """Tries after the first."""
    first_s: float = 0.25
    """Bound of the first wait, seconds; doubles per try."""
    cap_s: float = 8.0
    """Bound of any wait of our own choosing, seconds."""
    budget_s: float = 60.0
    """All waits of one operation together, seconds."""


def next_wait(
    policy: RetryPolicy,
    *,
    failures: int,
    waited_s: float,
    left_s: float,
    retry_after_s: float | None,
    jitter: float,
) -> float | None:
    """Return the seconds to wait before the next try, or None to give up.

    `failures` counts tries so far (>= 1), `waited_s` the waits so far, `left_s` what the caller's deadline leaves
    (inf without one), `jitter` is a random number in [0, 1).
    """
    if failures > policy.retries:
        return None
    bound = min(policy.cap_s, policy.first_s * 2.0 ** min(failures - 1, 32))
    # Never zero: a tenth of the bound keeps a herd of clients from turning a short fault into a hot loop.
    wait = bound * (0.1 + 0.9 * jitter)
    if retry_after_s is not None:
        # Jitter on top, or everybody who was told the same second comes back in it.
        wait = retry_after_s + min(wait, 0.1 * retry_after_s + policy.first_s)
    if waited_s + wait > policy.budget_s or wait >= left_s:
        return None
    return wait


def parse_retry_after(value: str | None, *, now: float) -> float | None:
    """Return the seconds a Retry-After header asks for (a number, or a date against `now`, Unix time), or None."""
    if value is None:
        return None
    text = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    try:
        return max(0.0, (when - datetime.fromtimestamp(now, UTC)).total_seconds())
    except (ValueError, OverflowError, OSError):
        return None
