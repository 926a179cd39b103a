"""Transfers over shared links, as fluids: every transfer goes over up to four links, and each link is divided among its transfers.

Decided here: the rates. Each transfer first gets the smallest of its links' equal shares, then what links have left is divided in the
same way twice more among transfers that no full link holds back. No link gives more than it has, and the first round alone gives nobody
more than max-min fairness would: the simulator errs to the slow side. Rates are constant within a step; a transfer that begins in a step
takes part from the next one on, and one that ends in a step has ended at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

NO_LINK: Final = 0
"""A link that holds nobody back."""
_ROUNDS: Final = 3


class Links:
    """Links by number, and the transfers on them. Capacities in bytes per second, sizes in bytes."""

    def __init__(self) -> None:
        self._capacity: list[float] = [1e18]
        self._capacities: np.ndarray[Any, Any] | None = None
        self._over = np.empty((0, 4), dtype=np.int32)
        self._left = np.empty(0)
        self._ids = np.empty(0, dtype=np.int64)
        self._ended: dict[int, Callable[[], None]] = {}
        self._new: list[tuple[int, tuple[int, int, int, int], float]] = []
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

    def start(self, links: tuple[int, int, int, int], size: float, ended: Callable[[], None]) -> int:
        """Begin a transfer; `ended` is called when all has come. Returns its number."""
        self._next += 1
        self._ended[self._next] = ended
        self._new.append((self._next, links, size))
        return self._next

    def stop(self, transfer: int) -> None:
        """End a transfer early; `ended` is not called."""
        if self._ended.pop(transfer, None) is not None:
            self._stopped.add(transfer)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being transferred."""
        return not self._ended

    def advance(self, seconds: float) -> list[Callable[[], None]]:
        """Let time pass; return what is to be called for those that have ended."""
        self._take_in()
        if not len(self._ids):
            return []
        self._left -= self._rates() * seconds
        over = self._left <= 1e-6
        if not over.any():
            return []
        done = [self._ended.pop(number) for number in self._ids[over].tolist()]
        self._keep(~over)
        return done

    def _take_in(self) -> None:
        if self._stopped:
            self._new = [entry for entry in self._new if entry[0] not in self._stopped]
            self._keep(~np.isin(self._ids, list(self._stopped)))
            self._stopped.clear()
        if self._new:
            numbers, over, sizes = zip(*self._new, strict=True)
            self._ids = np.concatenate([self._ids, np.array(numbers, dtype=np.int64)])
            self._over = np.concatenate([self._over, np.array(over, dtype=np.int32)])
            self._left = np.concatenate([self._left, np.array(sizes, dtype=float)])
            self._new = []

    def _keep(self, which: np.ndarray[Any, Any]) -> None:
        self._ids, self._over, self._left = self._ids[which], self._over[which], self._left[which]

    def _rates(self) -> np.ndarray[Any, Any]:
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
            rates[free] += share[over].min(axis=1)
            used = sum(np.bincount(self._over[:, n], weights=rates, minlength=len(capacity)) for n in range(4))
            left = np.maximum(capacity - used, 0.0)
            full = left <= 1e-3 * capacity
            free = free[~full[over].any(axis=1)]
            if not len(free):
                break
        return rates
