"""Where a file is cut into chunks. Pure, given a way to read the file.

Three ways. *tensor*: the bytes before the first tensor apart; each tensor cut at multiples of the chunk size from its own start, so that a
chunk of it is the same wherever the tensor moves; neighbours under 64 KiB together. *cdc*: by content (FastCDC), so that an insertion
changes the chunks around it only. *fixed*: at multiples of the chunk size from the file's start. Rule: the cuts of a range cover it
exactly once, in order, none longer than the chunk size, and depend on the file's bytes and the chunk size alone. docs/builder.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pyfastcdc import FastCDC

from rafsfs.format.codec import WIDTH_OPAQUE, WIDTH_UNKNOWN
from rafsfs.weights.tensor import ReadAt, Tensor

PACK: Final = 64 << 10
"""Bytes: tensors smaller than this share a chunk with their neighbours. A record costs 64 bytes, a request for one a millisecond."""
_MIN_WINDOW: Final = 8 << 20
_COMPRESSED: Final = (
    b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"\xff\xd8\xff", b"\x89PNG\r\n", b"7z\xbc\xaf", b"OggS", b"fLaC",
)  # fmt: skip
"""How files begin that are rewritten as a whole if at all: an edit moves every byte after it, and none comes again."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One chunk of a file."""

    offset: int
    """In the file, bytes."""
    length: int
    width: int = WIDTH_UNKNOWN
    """Element width for the encoder."""
    tensor: Tensor | None = None
    """The tensor that the chunk is cut from; the first one of several."""


Cutter = Callable[[int, int], Iterator[Cut]]
"""Yields the cuts of the range [start, stop) of a file."""


def cut_fixed(chunk_size: int, width: int = WIDTH_UNKNOWN) -> Cutter:
    """Return a cutter at multiples of `chunk_size`."""

    def cuts(start: int, stop: int) -> Iterator[Cut]:
        position = start
        while position < stop:
            following = min(stop, position - position % chunk_size + chunk_size)
            yield Cut(position, following - position, width)
            position = following

    return cuts


def is_compressed(head: bytes) -> bool:
    """Tell from its first bytes whether a file is in a compressed format."""
    return head.startswith(_COMPRESSED) or head[4:8] == b"ftyp" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def cut_tensors(tensors: Sequence[Tensor], chunk_size: int) -> Cutter:
    """Return a cutter along `tensors`, sorted and disjoint. What lies between them is cut like tensors of unknown width."""
    starts = [tensor.offset for tensor in tensors]

    def stretches(start: int, stop: int) -> Iterator[tuple[int, int, Tensor | None]]:
        """Yield (first byte, last byte + 1, tensor) of what the range holds of tensors and gaps, uncut."""
        index = max(0, bisect_right(starts, start) - 1)
        position = start
        while position < stop:
            while index < len(tensors) and tensors[index].stop <= position:
                index += 1
            if index == len(tensors) or tensors[index].offset >= stop:
                yield position, stop, None
                return
            tensor = tensors[index]
            if position < tensor.offset:
                yield position, tensor.offset, None
                position = tensor.offset
            following = min(tensor.stop, stop)
            yield position, following, tensor
            position = following

    def cuts(start: int, stop: int) -> Iterator[Cut]:
        pack: list[tuple[int, int, Tensor | None]] = []
        for first, last, tensor in stretches(start, stop):
            is_small = last - first < PACK and first > 0
            if pack and (not is_small or last - pack[0][0] > chunk_size):
                yield _packed(pack)
                pack = []
            if is_small:
                pack.append((first, last, tensor))
                continue
            # A tensor that was begun in an earlier range goes on along its own grid.
            origin = tensor.offset if tensor else first
            width = tensor.width if tensor else WIDTH_UNKNOWN
            position = first
            while position < last:
                following = min(last, position + chunk_size - (position - origin) % chunk_size)
                yield Cut(position, following - position, width, tensor)
                position = following
        if pack:
            yield _packed(pack)

    return cuts


def _packed(pack: list[tuple[int, int, Tensor | None]]) -> Cut:
    named = [tensor for _, _, tensor in pack if tensor]
    widths = {tensor.width for tensor in named}
    # Blocks of quantised weights between others: let the encoder look.
    width = widths.pop() if len(widths) == 1 else WIDTH_UNKNOWN
    first, last = pack[0][0], pack[-1][1]
    return Cut(first, last - first, width, named[0] if named and width != WIDTH_OPAQUE else None)


def cdc_sizes(chunk_size: int) -> tuple[int, int, int]:
    """Return (minimum, average, maximum) bytes of a chunk cut by content: 64 KiB, 256 KiB and 1 MiB for a chunk size of 1 MiB."""
    return chunk_size // 16, chunk_size // 4, chunk_size


def cut_by_content(read: ReadAt, chunk_size: int) -> Cutter:
    """Return a cutter by content: FastCDC 2020, normalisation level 1, seed 0."""
    low, mean, high = cdc_sizes(chunk_size)
    chunker = FastCDC(avg_size=mean, min_size=low, max_size=high, normalized_chunking=1, seed=0)
    window = max(_MIN_WINDOW, 4 * high)

    def cuts(start: int, stop: int) -> Iterator[Cut]:
        position = start
        while position < stop:
            data = read(position, min(window, stop - position))
            if not data:  # the file has shrunk: whoever reads the chunk will say so
                yield from cut_fixed(chunk_size)(position, stop)
                return
            lengths = [chunk.length for chunk in chunker.cut_buf(data)]
            if position + len(data) < stop:
                lengths.pop()  # the end of the window cut it off
            for length in lengths:
                yield Cut(position, length)
                position += length

    return cuts
