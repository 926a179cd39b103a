"""Where in which data space each file goes. Pure: decided from sizes alone, before any content is read.

Rules. Files in scan order, each range at a 4 KiB-aligned offset. A range that does not fit in what is left of the open data
space starts a new one; a range larger than the bound takes whole data spaces, each exactly the bound, and leaves the last one open for
those that follow. So a file has one extent per data space it runs through, and the address plan is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rafsfs.format.chunk_index import Extent
from rafsfs.format.codec import WIDTH_UNKNOWN
from rafsfs.types import BLOCK_SIZE, align_up
from rafsfs.weights.tensor import Tensor

from .cut import Cutter


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a file in a data space."""

    file: int
    file_offset: int
    offset: int
    """In the data space, bytes."""
    length: int


@dataclass(slots=True)
class SpacePlan:
    """One data space to be filled."""

    pieces: list[Piece] = field(default_factory=list)
    used: int = 0

    @property
    def size(self) -> int:
        """Bytes, whole blocks."""
        return align_up(self.used, BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One chunk to be cut: a range of a file and its place."""

    space: int
    offset: int
    file: int
    file_offset: int
    length: int
    width: int = WIDTH_UNKNOWN
    """Element width for the encoder."""
    tensor: Tensor | None = None
    """The tensor that it is cut from, the first one of several."""


def plan_layout(
    ranges: Sequence[Sequence[tuple[int, int]]], copies: Mapping[int, int], bound: int
) -> tuple[list[SpacePlan], list[list[Extent]]]:
    """Return the data spaces, and for each file its extents. `ranges`: stored (offset, length) of each file; `copies` name the
    file whose place a file shares; `bound`: bytes of a data space, a power of two.
    """
    spaces: list[SpacePlan] = []
    extents: list[list[Extent]] = []
    for number, stored in enumerate(ranges):
        original = copies.get(number)
        if original is not None:
            extents.append(extents[original])
            continue
        found: list[Extent] = []
        for start, length in stored:
            position, left = start, length
            while left:
                if not spaces or not _fits(spaces[-1], left, bound):
                    spaces.append(SpacePlan())
                space = spaces[-1]
                offset = space.size
                taken = min(left, bound - offset)
                space.pieces.append(Piece(number, position, offset, taken))
                space.used = offset + taken
                found.append(Extent(position, taken, len(spaces) - 1, offset))
                position += taken
                left -= taken
        extents.append(found)
    return spaces, extents


def _fits(space: SpacePlan, length: int, bound: int) -> bool:
    return not space.used or space.size + length <= bound


def chunks_of_space(number: int, space: SpacePlan, cutter: Callable[[int], Cutter]) -> Iterator[ChunkPlan]:
    """Yield the chunks of a data space in order: each piece as the cutter of its file cuts it."""
    for piece in space.pieces:
        shift = piece.offset - piece.file_offset
        for cut in cutter(piece.file)(piece.file_offset, piece.file_offset + piece.length):
            yield ChunkPlan(number, cut.offset + shift, piece.file, cut.offset, cut.length, cut.width, cut.tensor)


def interleave(streams: Sequence[Iterator[ChunkPlan]], width: int) -> Iterator[tuple[ChunkPlan, bool]]:
    """Yield (chunk, whether it is the last of its data space), taking one each from up to `width` open streams in turn.

    The order depends on the streams alone: it is what dedup and blobs depend on, so it must be the same everywhere.
    """
    waiting = list(streams)
    opened: list[tuple[Iterator[ChunkPlan], ChunkPlan]] = []
    while waiting or opened:
        while waiting and len(opened) < width:
            stream = waiting.pop(0)
            first = next(stream, None)
            if first is not None:
                opened.append((stream, first))
        still: list[tuple[Iterator[ChunkPlan], ChunkPlan]] = []
        for stream, chunk in opened:
            following = next(stream, None)
            yield chunk, following is None
            if following is not None:
                still.append((stream, following))
        opened = still
