"""Where chunks can be had, and the bounds within which they are got."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..format.chunk_map import ChunkMap
from ..interfaces import RangedBlobs


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """Bounds of the pipeline."""

    deadline_s: float = 60.0
    """A waiter gets an error after this long."""
    connections: int = 8
    """Ranged reads at once: enough to fill a 10 Gbit/s link at 5 ms with 8 MiB reads."""
    demand_reserve: int = 2
    """Of these, never used by prefetch."""
    merge_bytes: int = 8 << 20
    """Longest merged read: a request costs a registry 2 to 5 ms of CPU; at 1 GB/s, 8 ms pass before the next decision."""
    buffer_bytes: int = 64 << 20
    """Stored bytes in memory at once."""
    readahead_bytes: int = 32 << 20
    """Window ahead of a sequential reader; up to line.GROWTH times as much where latency times bandwidth asks for it."""
    threads: int = 4
    """Threads that decode, hash and write."""


@dataclass(slots=True, eq=False)
class Source:
    """Where the chunks of an image can be had: its chunk map and its store."""

    name: str
    chunk_map: ChunkMap
    store: RangedBlobs
    spaces: dict[bytes, int]
    """Space id → number in the chunk map, base spaces included."""
    own: tuple[bytes, ...] = ()
    """Ids of the data spaces that the image's files lie in."""
    bytes_by_origin: Counter[str] = field(default_factory=Counter)
