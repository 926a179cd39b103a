"""Who follows whom for one group, on nodes that know old things of each other."""

from __future__ import annotations

import random

import pytest

from p2p.core.relays import MOST_DEPTH, Relays

NODES = 5
STEPS = 60


class Walk:
    """Nodes with have-maps of each other that may be as old as they like, but never go back. What happens next is drawn."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.leads = self.rng.choice([0.2, 1, 3])
        self.near = self.rng.choice([0.3, 0.9])
        self.relays = [Relays() for _ in range(NODES)]
        self.history: list[list[int | None]] = [[None] for _ in range(NODES)]
        """Of each node, what it has shown: 0 while it fetches."""
        self.read = [[0] * NODES for _ in range(NODES)]
        self.live: set[tuple[int, int, int]] = set()
        """Who follows whom, and the first chunk that was asked for."""
        self.refused: set[tuple[int, int, int]] = set()
        """Who has asked one who refuses, and does not know it yet."""
        self.leader: int | None = None

    def step(self, number: int) -> None:
        """One thing happens, mostly that somebody follows somebody or hears of somebody."""
        who, whom = self.rng.sample(range(NODES), 2)
        happens = self.rng.choices([self.lead, self.follow, self.hear, self.end], [self.leads, 8, 8, 4])[0]
        happens(who, whom, number)

    def note(self, who: int) -> None:
        shown = 0 if who == self.leader else self.relays[who].shown().get(0)
        if self.history[who][-1] != shown:
            self.history[who].append(shown)

    def lead(self, who: int, _whom: int, _number: int) -> None:
        """Somebody gets the lease, or whoever has it gives it back."""
        before = self.leader
        self.leader = None if before is not None else who
        if self.leader is not None:
            self.relays[who].lead(0)
            self.live = {edge for edge in self.live if edge[0] != who}
            self.refused = {edge for edge in self.refused if edge[0] != who}
        self.note(who if before is None else before)

    def follow(self, who: int, named: int, number: int) -> None:
        """Somebody follows one whom he knows to get it, or whom a scheduler names, which is behind the times."""
        known = {other: self.history[other][self.read[who][other]] for other in range(NODES) if other != who}
        near = [other for other, depth in known.items() if depth is not None and self.relays[who].admits(0, depth)]
        whom = self.rng.choice(near) if near and self.rng.random() < self.near else named
        agrees = self.history[whom][-1] is not None
        if who != self.leader and not agrees and self.relays[who].admits(0, known[whom]):
            self.relays[who].plan(0, (str(whom), number), known[whom])
            self.refused.add((who, whom, number))
        if who != self.leader and agrees and self.relays[who].admits(0, known[whom]):
            self.relays[who].plan(0, (str(whom), number), known[whom])
            self.relays[who].begin(0)
            self.live.add((who, whom, number))
            self.note(who)

    def hear(self, who: int, _whom: int, _number: int) -> None:
        for whom in self.rng.sample(range(NODES), self.rng.randint(1, NODES)):
            self.read[who][whom] = self.rng.randint(self.read[who][whom], len(self.history[whom]) - 1)
            depth = self.history[whom][self.read[who][whom]]
            if depth is not None and 0 in self.relays[who].unshown(str(whom)):
                self.relays[who].show(str(whom), 0, depth)
        self.note(who)

    def end(self, _who: int, _whom: int, _number: int) -> None:
        if self.live or self.refused:
            who, whom, number = edge = self.rng.choice(sorted(self.live | self.refused))
            self.live.discard(edge)
            self.refused.discard(edge)
            self.relays[who].end(0, (str(whom), number))
            self.note(who)

    def circle(self) -> set[int]:
        """Who waits for himself. Whoever shows nothing is not followed: those who do are cut off."""
        shown = {who for who in range(NODES) if self.history[who][-1] is not None}
        waits = {who: {b for a, b, _ in self.live if a == who and b in shown} for who in shown}
        while ends := [who for who, parents in waits.items() if not parents & waits.keys()]:
            for who in ends:
                del waits[who]
        return set(waits)


@pytest.mark.parametrize("seeds", [range(start, start + 500) for start in range(0, 2000, 500)], ids=str)
def test_nobody_waits_for_himself_and_what_a_node_shows_never_grows(seeds: range) -> None:
    deepest = 0
    for seed in seeds:
        walk = Walk(seed)
        for number in range(STEPS):
            walk.step(number)
            assert not walk.circle(), f"seed {seed}, step {number}"
        for told in walk.history:
            depths = [depth for depth in told if depth is not None]
            relayed = [depth for depth in depths if depth > 0]
            assert relayed == sorted(relayed, reverse=True), f"seed {seed}"
            assert all(depth < MOST_DEPTH for depth in depths)
            deepest = max(deepest, *depths, 0)
    assert deepest >= 3, "trees of some depth come about at all"


def test_a_group_that_is_complete_is_followed_anew_from_anywhere_after_it_was_lost() -> None:
    relays = Relays()
    relays.plan(0, ("a", 0), 0)
    relays.begin(0)
    assert relays.shown() == {0: 1}
    relays.end(0, ("a", 0))
    assert not relays.admits(0, 1)
    relays.complete(0)
    assert relays.admits(0, MOST_DEPTH - 1)
    assert not relays.admits(0, MOST_DEPTH)


@pytest.mark.parametrize("shown_before", [False, True])
def test_who_was_refused_may_follow_as_far_from_the_registry_as_before(shown_before: bool) -> None:
    relays = Relays()
    if shown_before:
        relays.plan(0, ("a", 0), 2)
        relays.begin(0)
        relays.end(0, ("a", 0))
    limit = relays.limit(0)
    relays.plan(0, ("b", 0), 0)
    assert not relays.admits(0, 1), "as long as the answer may be yes"
    relays.end(0, ("b", 0))
    assert relays.limit(0) == limit
    relays.plan(0, ("c", 0), 1)
    relays.begin(0)
    relays.end(0, ("c", 0))
    assert relays.limit(0) == 2, "what has been shown counts until the group is here"


def test_nothing_is_shown_while_nobody_knows_where_one_of_those_is_who_are_followed() -> None:
    relays = Relays()
    relays.plan(0, ("named", 0), None)
    relays.plan(0, ("near", 4), 0)
    relays.begin(0)
    assert relays.shown() == {}
    relays.end(0, ("named", 0))
    assert relays.shown() == {0: 1}
