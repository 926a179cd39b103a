"""What is to be leased next, of one task: groups that were asked for while enough leases were out, those first that wait longest.

Without it a lease that ends would go to whoever happens to ask next, for whatever he asks: a lottery that leaves some groups for seconds,
while all who read in order wait for them. Pure; bounded by MOST groups of ASKERS names.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

MOST: Final = 1024
"""Groups remembered; who asks for more comes again by itself."""
ASKERS: Final = 4
"""Of one group, those who asked last."""


class Wanted:
    """Groups in the order in which they were first asked for."""

    def __init__(self) -> None:
        self._askers: dict[int, list[str]] = {}

    def add(self, group: int, peer: str) -> None:
        """Note that a peer was told to come later for a group."""
        askers = self._askers.get(group)
        if askers is None:
            if len(self._askers) < MOST:
                self._askers[group] = [peer]
            return
        if peer in askers:
            askers.remove(peer)
        askers.append(peer)
        del askers[:-ASKERS]

    def drop(self, group: int) -> None:
        """A group has been leased, or somebody has it."""
        self._askers.pop(group, None)

    def oldest(self, count: int) -> Iterator[tuple[int, list[str]]]:
        """Return the first groups, with those who asked for them, who asked last first. They may be dropped meanwhile."""
        return iter([(group, askers[::-1]) for group, askers in islice(self._askers.items(), count)])

    def __len__(self) -> int:
        return len(self._askers)
