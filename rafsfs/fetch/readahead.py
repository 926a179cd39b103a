"""How far ahead of a sequential reader to fetch. Pure: demanded chunks in, chunks to prefetch out.

Streams are recognised by position in the data space, not by who asks: several readers of one file interleave, and a FUSE
request says nothing of file handles. Rule: the first access of a stream fetches nothing extra, so that opening a model and
reading one tensor costs one tensor; only a stream that has come a good way is fetched ahead of, and never further than it has
come, so at most as much is fetched for nothing as was read.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

_STREAMS: Final = 32
"""Streams remembered per data space."""


@dataclass(slots=True)
class _Stream:
    ahead_to: int
    """Chunk up to which prefetch was asked for."""
    length: int
    """Chunks demanded in a row."""


class Readahead:
    """The streams of one data space of `count` chunks.

    `limit` is the largest window, `quiet` how far a stream goes before anything is fetched ahead of it; both in chunks.
    """

    def __init__(self, count: int, limit: int, quiet: int) -> None:
        self._count = count
        self._limit = limit
        self._quiet = quiet
        self._streams: OrderedDict[int, _Stream] = OrderedDict()

    def advance(self, first: int, stop: int) -> range:
        """Note a demand for chunks [first, stop); return the chunks to prefetch, possibly none."""
        stream = self._streams.pop(first, None)
        if stream is None and stop - first > 1:
            stream = self._streams.pop(first + 1, None)  # requests that overlap by a chunk continue a stream too
        if stream is None:
            inside = next(
                (end for end, known in self._streams.items() if end <= first and stop <= known.ahead_to), None
            )
            stream = self._streams.pop(inside) if inside is not None else None
        if stream is None:
            stream = _Stream(stop, stop - first)
            ahead = range(0)
        else:
            stream.length += stop - first
            window = min(self._limit, stream.length) if stream.length > self._quiet else 0
            target = min(self._count, stop + window)
            ahead = range(max(stop, stream.ahead_to), target)
            stream.ahead_to = max(stream.ahead_to, target)
        self._streams[stop] = stream
        if len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)
        return ahead
