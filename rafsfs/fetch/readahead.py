"""How far ahead of a sequential reader to fetch. Pure: demanded chunks in, chunks to prefetch out.

Streams are recognised by position in the data space, not by who asks: several readers of one file interleave, and a FUSE
request says nothing of file handles. Rules: the first access of a stream fetches nothing extra, so that opening a model and
reading one tensor costs one tensor. A stream that began at the start of its file is fetched ahead of from its second step on, any
other only when it has come a good way; never more than twice as far ahead as it has come, and never past its file.
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
    quiet: int
    """How long it must be before anything is fetched ahead of it."""


class Readahead:
    """The streams of one data space of `count` chunks.

    `limit` is the largest window, `quiet` how far a stream that began inside a file goes before anything is fetched ahead of it,
    `step` how many chunks are asked for at once; all in chunks. A step of None is half a window, so that chunks are fetched in few large
    requests. A smaller one keeps more of the window asked for, where many work on it at once.
    """

    def __init__(self, count: int, limit: int, quiet: int, step: int | None = None) -> None:
        self._count = count
        self._limit = limit
        self._quiet = quiet
        self._step = step if step is not None else limit
        self._streams: OrderedDict[int, _Stream] = OrderedDict()

    def advance(self, first: int, stop: int, own: range) -> range:
        """Note a demand for chunks [first, stop) of a file that has chunks `own`; return the chunks to prefetch, possibly none."""
        stream = self._streams.pop(first, None)
        if stream is None and stop - first > 1:
            stream = self._streams.pop(first + 1, None)  # requests that overlap by a chunk continue a stream too
        if stream is None:
            inside = next(
                (end for end, known in self._streams.items() if end <= first and stop <= known.ahead_to), None
            )
            stream = self._streams.pop(inside) if inside is not None else None
        if stream is None:
            stream = _Stream(stop, stop - first, 0 if first <= own.start else self._quiet)
            ahead = range(0)
        else:
            stream.length += stop - first
            window = min(self._limit, 2 * stream.length) if stream.length > stream.quiet else 0
            target = min(self._count, own.stop, stop + window)
            ahead = range(max(stop, stream.ahead_to), target)
            if len(ahead) < min(window // 2, self._step) and target < own.stop:
                ahead = range(0)
            stream.ahead_to = max(stream.ahead_to, ahead.stop)
        self._streams[stop] = stream
        if len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)
        return ahead
