"""How far ahead of a sequential reader to fetch. Pure: demanded chunks in, chunks to prefetch out.

Streams are recognised by position in the data space, not by who asks: several readers of one file interleave, and a FUSE
request says nothing of file handles. Rule: the first access of a stream fetches nothing extra, so that opening a model and
reading one tensor costs one tensor; only when the chunk behind a stream's end is asked for does its window open, and double.
A stream that has gone on for a while is a file being read from end to end and gets the whole window at once.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

_STREAMS: Final = 32
"""Streams remembered per data space."""
_STEADY: Final = 6
"""Chunks in a row after which a stream gets the whole window: a tensor read through a mapping stays below, since the kernel
reads around each fault by up to a chunk on either side."""


@dataclass(slots=True)
class _Stream:
    ahead_to: int
    """Chunk up to which prefetch was asked for."""
    window: int
    """Chunks."""
    length: int
    """Chunks demanded in a row."""


class Readahead:
    """The streams of one data space of `count` chunks. `limit` is the largest window, in chunks."""

    def __init__(self, count: int, limit: int) -> None:
        self._count = count
        self._limit = limit
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
            stream = _Stream(stop, 0, stop - first)
            ahead = range(0)
        else:
            stream.length += stop - first
            wider = max(2, stream.window * 2) if stream.length < _STEADY else self._limit
            stream.window = min(self._limit, wider)
            target = min(self._count, stop + stream.window)
            start = max(stop, stream.ahead_to)
            ahead = range(start, target) if target - start >= min(stream.window // 2, 1) else range(0)
            stream.ahead_to = max(stream.ahead_to, target)
        self._streams[stop] = stream
        if len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)
        return ahead
