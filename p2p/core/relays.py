"""Who may follow whom for a group of chunks: what one node gets from the registry goes through a tree of nodes that pass it on as it comes.

Decided here: how far from the registry this node is for each group, what it shows of that to its neighbours, and whom it may
follow. The rule that must survive edits: **no two nodes ever wait for each other**, however old is what they know of each
other. It holds because of three things. Who follows somebody that shows depth d is at depth d + 1. Of several that are followed
for one group at once, the deepest is shown. And whoever has shown a depth follows nobody at that depth or deeper until the
group is complete, nor does he while he asks for it and has shown nothing yet (if he is refused, that counts for nothing any more).
So what a node shows never grows, and what an old have-map says of it is never less than what is true.

Nothing here is concurrent, and nothing has a clock; `peer.py` and `errand.py` call it.
"""

from __future__ import annotations

from typing import Final

MOST_DEPTH: Final = 6
"""Nodes in a row between a reader and the registry at most: each passes a group on to two or more, and each adds a chunk's time."""

Branch = tuple[str, int]
"""Who is followed, and the first chunk that was asked for."""


class Relays:
    """What one node follows of one task."""

    def __init__(self) -> None:
        self._least: dict[int, int] = {}
        """Of incomplete groups, the least depth at which they have been followed; 0 once the node was to fetch them itself."""
        self._live: dict[int, dict[Branch, int | None]] = {}
        """Of groups that are followed now, by branch, at what depth; None: whoever is followed has not shown where he is."""
        self._begun: set[int] = set()
        """Of these, those of which somebody has begun to send."""
        self._before: dict[int, int | None] = {}
        """Of the others, the least depth before: if all refuse, nobody has been shown that anybody was followed."""

    def limit(self, group: int) -> int:
        """Return the depth that whoever is followed must not have reached."""
        return self._least.get(group, MOST_DEPTH)

    def admits(self, group: int, depth: int | None) -> bool:
        """Tell whether somebody may be followed who shows `depth`, or None: nothing yet, which does as long as nothing is shown here."""
        if depth is None:
            return all(known is None for known in self._live.get(group, {}).values())
        return depth < self.limit(group)

    def follows(self, group: int) -> bool:
        """Tell whether somebody is followed for a group now."""
        return group in self._live

    def plan(self, group: int, branch: Branch, depth: int | None) -> None:
        """Somebody who shows `depth` will be followed: 0 if he has or fetches the group, None if he has not shown that yet."""
        if group not in self._begun:
            self._before.setdefault(group, self._least.get(group))
        self._live.setdefault(group, {})[branch] = None if depth is None else depth + 1
        if depth is not None:
            self._least[group] = min(self.limit(group), depth + 1)

    def begin(self, group: int) -> None:
        """Somebody who is followed has begun to send."""
        if group in self._live:
            self._begun.add(group)
            self._before.pop(group, None)

    def show(self, peer: str, group: int, depth: int) -> None:
        """Somebody who is followed and had not shown where he is does so now. If he is too deep, this node goes on showing nothing."""
        branches = self._live.get(group, {})
        for branch, known in branches.items():
            if branch[0] == peer and known is None and depth < self.limit(group):
                branches[branch] = depth + 1
                self._least[group] = min(self.limit(group), depth + 1)

    def unshown(self, peer: str) -> list[int]:
        """Return the groups that somebody is followed for who has not shown where he is."""
        return [g for g, found in self._live.items() if any(b[0] == peer and d is None for b, d in found.items())]

    def end(self, group: int, branch: Branch) -> None:
        """Somebody is followed no longer, or never was because he refused."""
        branches = self._live.get(group)
        if branches is not None:
            branches.pop(branch, None)
            if not branches:
                del self._live[group]
                self._begun.discard(group)
                if group in self._before:
                    before = self._before.pop(group)
                    if before is None:
                        self._least.pop(group, None)
                    else:
                        self._least[group] = before

    def lead(self, group: int) -> None:
        """The group is to be fetched here: from now on this node follows nobody for it, and waits for nobody whom it followed."""
        self._least[group] = 0
        self._before.pop(group, None)
        self._live.pop(group, None)
        self._begun.discard(group)

    def complete(self, group: int) -> None:
        """A group is here: nobody needs to be followed for it."""
        self._least.pop(group, None)
        self._before.pop(group, None)

    def shown(self) -> dict[int, int]:
        """Return what neighbours may follow here: of groups that come, how deep this node is. Not those that nobody knows the depth of."""
        found: dict[int, int] = {}
        for group in self._begun:
            depths = [depth for depth in self._live[group].values() if depth is not None]
            if len(depths) == len(self._live[group]) and max(depths) < MOST_DEPTH:
                found[group] = max(depths)
        return found
