"""The waiting between tries of one operation: the shell around retry.py.

Rule: a wait that would outlast the caller's deadline is not begun; the failure is raised while there is time to say it.
"""

from __future__ import annotations

import random
import time

import trio

from ..errors import UnavailableError
from .retry import RetryPolicy, next_wait, parse_retry_after


class Pace:
    """Counts the failures of one operation and sleeps between them."""

    def __init__(self, policy: RetryPolicy, rng: random.Random) -> None:
        self._policy = policy
        self._rng = rng
        self._failures = 0
        self._waited_s = 0.0

    async def again(self, failure: UnavailableError, retry_after: str | None = None) -> None:
        """Return when it is time for the next try; raise `failure` if there is none. `retry_after` is the header."""
        self._failures += 1
        asked_s = parse_retry_after(retry_after, now=time.time())
        wait_s = next_wait(
            self._policy,
            failures=self._failures,
            waited_s=self._waited_s,
            left_s=trio.current_effective_deadline() - trio.current_time(),
            retry_after_s=asked_s,
            jitter=self._rng.random(),
        )
        if wait_s is None:
            if asked_s is not None and self._failures <= self._policy.retries:
                raise UnavailableError(f"{failure}; it asks to wait {asked_s:.0f} s, longer than we would") from failure
            raise failure
        self._waited_s += wait_s
        await trio.sleep(wait_s)
