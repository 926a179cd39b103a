"""How long a read may wait that comes right after one that failed. Pure: questions, failures and the time in; deadlines out.

When a window that the kernel reads ahead has failed, it asks once more for the page that its reader needs, in that reader's name, and then
for each other reader of the page in turn. The first has waited for a whole deadline already; the others must not wait for one each.
Rules: a thread that has waited for the whole deadline in vain is given a short one once; everybody else has the whole deadline, but those
who ask while failures follow one another without a pause share one between them. So a reader that comes anew never inherits another's wait.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

SHORT_S: Final = 0.5
"""Enough for what has come meanwhile, and for one attempt."""
PAUSE_S: Final = 0.1
"""A question later than this after a failure has nothing to do with it. The kernel asks again within milliseconds."""
_KEPT: Final = 1000
"""Failures remembered, one for each chunk."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a question may take."""

    deadline_s: float
    until: float | None = None
    """End of the time that those who ask right after a failure share, once it has begun. Seconds of the clock."""
    is_fresh: bool = True
    """Whether it comes without a failure right before."""
    is_second: bool = False
    """Whether its reader has waited for a whole deadline before."""


@dataclass(slots=True)
class _Failure:
    at: float
    stop: int
    until: float | None
    readers: set[int] = field(default_factory=set)


class Chances:
    """The failures of late. `deadline_s`: the whole deadline."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._failed: dict[tuple[int, int], _Failure] = {}

    def grant(self, space: int, chunks: range, reader: int, now: float) -> Grant:
        """Return how long thread `reader` may wait for chunks of a data space."""
        failure = self._failed.get((space, chunks.start))
        if failure is None or now - failure.at >= PAUSE_S or chunks.stop > failure.stop:
            return Grant(self._deadline_s)
        if reader in failure.readers:
            failure.readers.remove(reader)
            return Grant(min(SHORT_S, self._deadline_s), failure.until, is_fresh=False, is_second=True)
        if failure.until is None:
            failure.until = now + self._deadline_s
        left_s = max(SHORT_S, failure.until - now)
        return Grant(min(self._deadline_s, left_s), failure.until, is_fresh=False)

    def note(self, space: int, chunks: range, readers: set[int], grant: Grant, now: float) -> None:
        """Remember that a question with `grant`, which `readers` waited for, was not answered."""
        if len(self._failed) > _KEPT:
            self._failed.clear()
        for chunk in chunks:
            before = self._failed.get((space, chunk))
            tired = before.readers if before is not None and now - before.at < PAUSE_S else set()
            self._failed[space, chunk] = _Failure(
                now, chunks.stop, grant.until, tired if grant.is_second else tired | readers
            )
