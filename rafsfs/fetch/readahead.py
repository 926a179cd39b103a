"""How far ahead of readers to fetch. Pure: demanded bytes of one data space in, bytes to fetch ahead out.

Streams are recognised by position in the data space, not by who asks: several readers of one file interleave, and a FUSE
request says nothing of file handles. Told apart: sequential (continues a stream, or lies inside its window), strided (the third start at
equal distances), and random (neither).
Rules: the first access of a stream whose file is not understood fetches nothing extra. In a file of weights a reader gets the rest of the
tensor it has touched, and nothing of the next one until it has gone so far into it that it cannot have been the kernel's own read-ahead.
The window ahead of a stream is never more than twice as long as the stream, nor than the limit; it stays in its file, until a
stream has gone from the end of one file to the start of the next.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

Span = tuple[int, int]
"""Bytes [first, stop) of a data space."""

QUIET_BYTES: Final = 12 << 20
"""A stream that began inside a file that is not understood, and is shorter than this, is not fetched ahead of: a tensor of 2 MB
read through a mapping touches up to 7 MiB, since the kernel reads around each fault and ahead of the last one."""
MARGIN_BYTES: Final = 4 << 20
"""How far behind the tensor that it began in a stream must have come to be more than that tensor: above the kernel's read-ahead."""
GAP_BYTES: Final = 64 << 10
"""Between the end of one file and the start of the next: files are aligned, and small ones lie between."""
_STREAMS: Final = 32
"""Streams remembered per data space."""
_STARTS: Final = 8
"""Starts of streams remembered to find equal distances: a few readers with a stride each."""
_STRIDES: Final = 8
"""Steps predicted at most; the window bounds them as well."""


@dataclass(slots=True)
class _Stream:
    ahead_to: int
    """Byte up to which was asked for."""
    length: int
    """Bytes demanded in a row."""
    quiet: int
    """How long it must be before anything is fetched ahead of it in a file that is not understood."""
    home: int
    """End of the tensor that it began in."""
    settled: bool
    """Whether `home` is a tensor: a header, and what was read before it was understood, leads to the tensor that comes next."""
    files: int
    """Files that it has run through one after the other."""
    own: Span
    stop: int = 0
    """End of the last demand."""


class Readahead:
    """The streams of one data space of `size` bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        self._starts: deque[Span] = deque(maxlen=_STARTS)

    def advance(
        self,
        first: int,
        stop: int,
        own: Span,
        *,
        limit: int,
        step: int,
        tensor: Span | None = None,
        following: int = 0,
        grain: int = 1,
    ) -> list[Span]:
        """Note a demand for bytes [first, stop) of a file at `own`; return the spans to fetch ahead, in order, possibly none.

        `limit`: the largest window; `step`: how much of it is asked for at once at least; `tensor`: where the tensor at `first`
        lies, or the header, or None if the file is not understood; `following`: end of the next file in this data space; `grain`: what
        is asked for ends at a multiple of it where it can, since that much is got from one place. Bytes.
        """
        found = self._find(first, stop, own)
        if found is None:
            stream = _Stream(stop, stop - first, 0 if first <= own[0] else QUIET_BYTES, stop, False, 1, own)
            if tensor is not None:
                stream.home, stream.settled = max(stop, tensor[1]), tensor[0] > own[0]
            spans = self._strided(first, stop, own, limit)
            target = min(tensor[1], stop + limit) if tensor is not None else stop
        else:
            stream, spans = found, []
            if own != stream.own:
                stream.files += own[0] > stream.own[0]
                stream.own = own
            stream.length += max(stop - first, stop - stream.stop)  # what it skipped inside its window was read unseen
            if tensor is not None and not stream.settled and tensor[0] > own[0]:
                stream.home, stream.settled = tensor[1], True
            target = self._target(stream, stop, own, limit, tensor, following)
        ahead = (max(stop, stream.ahead_to), min(target, self._size))
        if target not in {stream.home, own[1]} and ahead[1] // grain * grain > ahead[0]:
            ahead = (ahead[0], ahead[1] // grain * grain)
        whole = target == stream.home
        if ahead[0] < ahead[1] and (
            whole or found is None or ahead[1] - ahead[0] >= min(step, limit // 2, stream.length) or target == own[1]
        ):
            spans.insert(0, ahead)
            stream.ahead_to = ahead[1]
        stream.ahead_to = max(stream.ahead_to, stop)
        stream.stop = stop
        self._streams[stop] = stream
        if len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)
        return spans

    def _target(self, stream: _Stream, stop: int, own: Span, limit: int, tensor: Span | None, following: int) -> int:
        window = min(limit, 2 * stream.length)
        proven = stop > stream.home + MARGIN_BYTES if tensor is not None else stream.length > stream.quiet
        if proven or stream.files > 1:
            return min(stop + window, max(own[1], following) if stream.files > 1 else own[1])
        return min(stream.home, stop + window)

    def _find(self, first: int, stop: int, own: Span) -> _Stream | None:
        """Take out the stream that a demand continues: at its end, overlapping it, inside its window, or in the next file."""
        stream = self._streams.pop(first, None)
        if stream is not None:
            return stream
        for end, known in reversed(self._streams.items()):
            inside = end <= first <= known.ahead_to and stop <= known.ahead_to + (stop - first)
            overlaps = first < end < stop
            next_file = first <= own[0] and 0 <= first - end <= GAP_BYTES and end >= known.own[1]
            if inside or overlaps or next_file:
                return self._streams.pop(end)
        return None

    def _strided(self, first: int, stop: int, own: Span, limit: int) -> list[Span]:
        """Return the next steps of a reader whose third start this is at one distance."""
        starts = set(self._starts)
        length = stop - first
        spans: list[Span] = []
        for begin, size in reversed(self._starts):
            distance = first - begin
            if abs(distance) <= length or (begin - distance, size) not in starts or abs(size - length) > length // 2:
                continue
            at = first
            for _ in range(min(_STRIDES, limit // length)):
                at += distance
                if not own[0] <= at <= own[1] - length:
                    break
                spans.append((at, at + length))
            break
        self._starts.append((first, length))
        return spans
