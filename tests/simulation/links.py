"""Transfers over shared links, as fluids: every transfer goes over up to four links, and each link is divided among its transfers.

Decided here: the rates. Each transfer first gets the smallest of its links' equal shares, then what links have left is divided in the
same way twice more among transfers that no full link holds back. No link gives more than it has, and the first round alone gives nobody
more than max-min fairness would: the simulator errs to the slow side. Rates are constant within a step; a transfer that begins in a step
takes part from the next one on, and one that ends in a step has ended at its end.

A transfer may be behind another one, whose bytes it passes on as they come: it never has more than that one had a step before, and takes
no more of its links than it can use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

NO_LINK: Final = 0
"""A link that holds nobody back."""
_ROUNDS: Final = 4
NOBODY: Final = 0
_STUCK: Final = -1
"""Behind a transfer that was stopped."""


class Links:
    """Links by number, and the transfers on them. Capacities in bytes per second, sizes in bytes."""

    def __init__(self) -> None:
        self._capacity: list[float] = [1e18]
        self._capacities: np.ndarray[Any, Any] | None = None
        self._over = np.empty((0, 4), dtype=np.int32)
        self._left = np.empty(0)
        self._ids = np.empty(0, dtype=np.int64)
        """Numbers of transfers, ascending."""
        self._behind = np.empty(0, dtype=np.int64)
        self._moved_behind: dict[int, int] = {}
        self._ended: dict[int, Callable[[], None]] = {}
        self._new: list[tuple[int, tuple[int, int, int, int], float, int]] = []
        self._stopped: set[int] = set()
        self._next = 0

    def add(self, capacity: float) -> int:
        """Add a link; return its number."""
        self._capacity.append(capacity)
        self._capacities = None
        return len(self._capacity) - 1

    def set_capacity(self, link: int, capacity: float) -> None:
        """Change a link."""
        self._capacity[link] = capacity
        self._capacities = None

    def start(
        self, links: tuple[int, int, int, int], size: float, ended: Callable[[], None], behind: int = NOBODY
    ) -> int:
        """Begin a transfer, maybe behind another one; `ended` is called when all has come. Returns its number, more than any before."""
        self._next += 1
        self._ended[self._next] = ended
        self._new.append((self._next, links, size, behind))
        return self._next

    def put_behind(self, transfer: int, other: int) -> None:
        """From now on a transfer passes on what another one brings, or has all there is (NOBODY)."""
        self._moved_behind[transfer] = other

    def stop(self, transfer: int) -> None:
        """End a transfer early; `ended` is not called."""
        if self._ended.pop(transfer, None) is not None:
            self._stopped.add(transfer)

    def remaining(self, transfer: int) -> float:
        """Return the bytes of a transfer that have not come."""
        at = int(np.searchsorted(self._ids, transfer))
        return float(self._left[at]) if at < len(self._ids) and self._ids[at] == transfer else np.inf

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being transferred."""
        return not self._ended

    def advance(self, seconds: float) -> list[Callable[[], None]]:
        """Let time pass; return what is to be called for those that have ended."""
        self._take_in()
        if not len(self._ids):
            return []
        most = np.full(len(self._ids), np.inf)
        followers = np.nonzero(self._behind)[0]
        if len(followers):
            ahead = self._behind[followers]
            at = np.minimum(np.searchsorted(self._ids, ahead), len(self._ids) - 1)
            there = self._ids[at] == ahead
            can = np.maximum(self._left[followers] - self._left[at], 0.0) / seconds
            most[followers] = np.where(there, can, np.where(ahead == _STUCK, 0.0, np.inf))
            self._behind[followers[~there & (ahead != _STUCK)]] = NOBODY  # that one has ended: all is there
        self._left -= self._rates(most) * seconds
        over = self._left <= 1e-6
        if not over.any():
            return []
        done = [self._ended.pop(number) for number in self._ids[over].tolist()]
        self._keep(~over)
        return done

    def _take_in(self) -> None:
        if self._new:
            numbers, over, sizes, behind = zip(*self._new, strict=True)
            self._ids = np.concatenate([self._ids, np.array(numbers, dtype=np.int64)])
            self._over = np.concatenate([self._over, np.array(over, dtype=np.int32)])
            self._left = np.concatenate([self._left, np.array(sizes, dtype=float)])
            self._behind = np.concatenate([self._behind, np.array(behind, dtype=np.int64)])
            self._new = []
        if self._stopped:
            stopped = list(self._stopped)
            self._keep(~np.isin(self._ids, stopped))
            self._behind[np.isin(self._behind, stopped)] = _STUCK
            self._stopped.clear()
        if self._moved_behind:
            for transfer, other in self._moved_behind.items():
                at = int(np.searchsorted(self._ids, transfer))
                if at < len(self._ids) and self._ids[at] == transfer:
                    self._behind[at] = other
            self._moved_behind.clear()

    def _keep(self, which: np.ndarray[Any, Any]) -> None:
        self._ids, self._over, self._left = self._ids[which], self._over[which], self._left[which]
        self._behind = self._behind[which]

    def _rates(self, most: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self._capacities is None:
            self._capacities = np.array(self._capacity)
        capacity = self._capacities
        rates = np.zeros(len(self._ids))
        left = capacity.copy()
        free = np.arange(len(self._ids))
        for _ in range(_ROUNDS):
            over = self._over[free]
            sharers = np.bincount(over.ravel(), minlength=len(capacity))
            share = left / np.maximum(sharers, 1)
            rates[free] += np.minimum(share[over].min(axis=1), most[free] - rates[free])
            used = sum(np.bincount(self._over[:, n], weights=rates, minlength=len(capacity)) for n in range(4))
            left = np.maximum(capacity - used, 0.0)
            full = left <= 1e-3 * capacity
            free = free[~full[over].any(axis=1) & (rates[free] < most[free])]
            if not len(free):
                break
        return rates
