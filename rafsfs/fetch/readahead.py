"""How far ahead of readers to fetch. Pure: demanded bytes of one data space in, bytes to fetch ahead out.

Streams are recognised by position in the data space, not by who asks: several readers of one file interleave, and a FUSE
request says nothing of file handles. Told apart: sequential (continues a stream, or lies inside it or its window), strided (the third
start at equal distances), and random (neither). A stream is the bytes that were demanded or fetched ahead in one piece; two that meet
become one, since a loader that copies tensor by tensor touches the last page of each before the ones between (memcpy does).
Rules: the first access of a stream whose file is not understood fetches nothing extra. In a file of weights a reader gets the rest of the
tensor it has touched, and of the next one no more than a sixteenth of what it has come, until it has gone so far into it that it cannot
have been the kernel's own read-ahead. The window ahead of a stream is never more than twice as long as the stream, nor than the limit;
it stays in its file, until a stream has gone from the end of one file to the start of the next; of a stream that has run through a whole
file it goes into the next one by an eighth of the file, so that who loads all files of a model does not wait at the start of each.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

Span = tuple[int, int]
"""Bytes [first, stop) of a data space."""

QUIET_BYTES: Final = 12 << 20
"""A stream that began inside a file that is not understood, and is shorter than this, is not fetched ahead of: a tensor of 2 MB
read through a mapping touches up to 7 MiB, since the kernel reads around each fault and ahead of the last one."""
MARGIN_BYTES: Final = 4 << 20
"""How far behind the tensor that it began in a stream must have come to be more than that tensor: above the kernel's read-ahead."""
SMALL_BYTES: Final = 256 << 10
"""A tensor below this is not what a reader came for: the pages and chunks of large tensors begin with those small ones that lie before."""
GAP_BYTES: Final = 64 << 10
"""Between the end of one file and the start of the next: files are aligned, and small ones lie between."""
LEAD: Final = 8
"""The part of its first file, read from start to end, by which a stream is led into the next file before it goes there."""
_STREAMS: Final = 32
"""Streams remembered per data space."""
_STARTS: Final = 8
"""Starts of streams remembered to find equal distances: a few readers with a stride each."""
_STRIDES: Final = 8
"""Steps predicted at most; the window bounds them as well."""


@dataclass(slots=True)
class _Stream:
    start: int
    stop: int
    """Bytes [start, stop) were demanded, or fetched ahead and passed over."""
    ahead_to: int
    """Byte up to which was asked for."""
    quiet: int
    """How long it must be before anything is fetched ahead of it in a file that is not understood."""
    home: int
    """End of the tensor that it began in."""
    settled: bool
    """Whether `home` is a tensor: a header, what was read before it was understood, and small tensors lead to the one that comes next."""
    begun: int
    """Middle of its first demand: a tensor that begins before it, and that it goes on into, is one that it may have begun for."""
    files: int
    """Files that it has run through one after the other."""
    own: Span

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def reach(self) -> int:
        """End of what was demanded or asked for."""
        return max(self.stop, self.ahead_to)


def _settles(tensor: Span, own: Span) -> bool:
    """Tell whether a reader may have come for this tensor, which is not the header of its file."""
    return tensor[0] > own[0] and tensor[1] - tensor[0] >= SMALL_BYTES


class Readahead:
    """The streams of one data space of `size` bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._streams: deque[_Stream] = deque(maxlen=_STREAMS)
        """The one used last is the last."""
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
        stream = self._find(first, stop, own)
        spans: list[Span] = []
        if stream is None:
            stream = _Stream(
                first, stop, stop, 0 if first <= own[0] else QUIET_BYTES, stop, False, (first + stop) // 2, 1, own
            )
            if tensor is not None:
                stream.home, stream.settled = max(stop, tensor[1]), _settles(tensor, own)
            spans = self._strided(first, stop, own, limit)
            target = min(tensor[1], stop + limit) if tensor is not None else stop
            at_once = True
        else:
            if own != stream.own:
                # Whoever read one tensor at the end of a file, and begins another file, has not run through the first.
                if stream.length >= (stream.own[1] - stream.own[0]) // 2:
                    stream.files += own[0] > stream.own[0]
                stream.own = own
            stream.start, stream.stop = min(stream.start, first), max(stream.stop, stop)
            if tensor is not None and tensor[0] > own[0]:
                self._settle(stream, tensor, own)
            target, at_once = self._target(stream, own, limit, tensor, following)
        self._streams.append(stream)
        if self._join_neighbours(stream):
            target, at_once = self._target(stream, own, limit, tensor, following)
        ahead = (stream.reach, min(target, self._size))
        if target not in {stream.home, own[1]}:
            cut = max(ahead[1] // grain * grain, min(stream.home, ahead[1]) if stream.home < ahead[1] else 0)
            ahead = (ahead[0], cut if cut > ahead[0] else ahead[1])
        enough = min(step, limit // 2, stream.length)
        if ahead[0] < ahead[1] and (at_once or ahead[1] - ahead[0] >= enough or target == own[1]):
            if ahead[1] - ahead[0] > step and ahead[1] not in {own[1], stream.home, self._size}:
                # Whole steps: what is a little more than one read would be a second, tiny one.
                ahead = (ahead[0], ahead[1] - (ahead[1] - ahead[0]) % step)
            spans.insert(0, ahead)
            stream.ahead_to = ahead[1]
        return spans

    def retreat(self, offset: int) -> None:
        """Note that of what was returned last, nothing from `offset` on was fetched: it may be asked for again."""
        if self._streams:
            stream = self._streams[-1]
            stream.ahead_to = max(stream.stop, min(stream.ahead_to, offset))

    def _target(self, stream: _Stream, own: Span, limit: int, tensor: Span | None, following: int) -> tuple[int, bool]:
        """Return up to where to fetch, and whether to do it however little that is."""
        window = min(limit, 2 * stream.length)
        proven = stream.stop > stream.home + MARGIN_BYTES if tensor is not None else stream.length > stream.quiet
        if proven or stream.files > 1:
            end = max(own[1], following) if stream.files > 1 else own[1]
            if (
                stream.files == 1
                and following > own[1]
                and stream.reach >= own[1]
                and stream.start <= own[0] + GAP_BYTES
            ):
                end = min(following, own[1] + (own[1] - own[0]) // LEAD)
            return min(stream.stop + window, end), False
        beyond = stream.length // 16 if tensor is not None else 0
        return min(stream.home + beyond, stream.stop + window, own[1]), True

    def _settle(self, stream: _Stream, tensor: Span, own: Span) -> None:
        """Note which tensor a stream has come to: it may be the one that it is for."""
        if stream.settled and tensor[0] > stream.begun:
            return
        # One that has gone through nothing but small ones for long is for all of them.
        through_small = stream.length > MARGIN_BYTES and not _settles(tensor, own)
        if not through_small:
            stream.home = max(stream.home, tensor[1])
        stream.settled = stream.settled or through_small or _settles(tensor, own)

    def _find(self, first: int, stop: int, own: Span) -> _Stream | None:
        """Take out the stream that a demand belongs to: at its end, overlapping it, inside its window, or in the next file."""
        for known in reversed(self._streams):
            touches = known.start <= first <= known.reach or first < known.start < stop
            next_file = first <= own[0] and 0 <= first - known.reach <= GAP_BYTES and known.reach >= known.own[1]
            if touches or next_file:
                self._streams.remove(known)
                return known
        return None

    def _join_neighbours(self, stream: _Stream) -> bool:
        """Make one of `stream`, the last, and those of its file that it has met; tell whether there were any."""
        met = [
            other
            for other in self._streams
            if other is not stream
            and other.own == stream.own
            and other.start <= stream.reach
            and stream.start <= other.reach
        ]
        for other in met:
            self._streams.remove(other)
            if other.start < stream.start:
                stream.home, stream.settled, stream.quiet = other.home, other.settled, other.quiet
                stream.begun = other.begun
            stream.start, stream.stop = min(stream.start, other.start), max(stream.stop, other.stop)
            stream.ahead_to = max(stream.ahead_to, other.ahead_to)
            stream.files = max(stream.files, other.files)
        return bool(met)

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
