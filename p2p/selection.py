"""Which chunk from which neighbour. Pure: have-maps, requests under way and measured rates in, an assignment out.

Rules. A run of adjacent chunks goes to one neighbour, at most RUN_BYTES of it, so that a batch is divided among those who have it. Of the
neighbours that have the first chunk of a run, the one is taken that would deliver soonest by what is under way there and the rate that it
has shown; equals at random. What no neighbour has is left over.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

RUN_BYTES: Final = 4 << 20
"""Bytes per request: a request costs a peer a millisecond, and a chunk is passed on only when it is here whole."""
FIRST_RATE: Final = 50e6
"""Bytes per second that a neighbour is believed to give before it has given anything."""


@dataclass(slots=True)
class Offer:
    """What is known of a neighbour in one task."""

    have: bytearray
    """One byte per chunk: 1 is there."""
    under_way: int = 0
    """Bytes asked for and not here yet, over all tasks."""
    rate: float = FIRST_RATE


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent chunks to be taken from one neighbour."""

    peer: str
    first: int
    count: int
    size: int


def assign(
    wanted: Sequence[int],
    offers: Mapping[str, Offer],
    length: Callable[[int], int],
    rng: random.Random,
) -> tuple[list[Run], list[int]]:
    """Divide `wanted`, ascending, among the neighbours; return the runs and what nobody has."""
    runs: list[Run] = []
    left: list[int] = []
    booked = {peer: offer.under_way for peer, offer in offers.items()}
    position = 0
    while position < len(wanted):
        first = wanted[position]
        holders = [peer for peer, offer in offers.items() if offer.have[first]]
        if not holders:
            left.append(first)
            position += 1
            continue
        size = length(first)
        peer = holders[0]
        if len(holders) > 1:
            soonest, equals = math.inf, 1
            for holder in holders:
                takes = (booked[holder] + size) / max(1.0, offers[holder].rate)
                if takes < soonest:
                    peer, soonest, equals = holder, takes, 1
                elif takes == soonest:
                    equals += 1
                    if rng.random() * equals < 1.0:
                        peer = holder
        have = offers[peer].have
        count = 1
        while position + count < len(wanted) and wanted[position + count] == first + count and have[first + count]:
            more = length(first + count)
            if size + more > RUN_BYTES:
                break
            size += more
            count += 1
        runs.append(Run(peer, first, count, size))
        booked[peer] += size
        position += count
    return runs, left
