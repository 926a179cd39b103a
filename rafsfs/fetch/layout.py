"""What lies where in the data spaces of an image: files, and the tensors of those that are weights. Pure.

Decided here: which bytes belong together when one of them is read. A header is one object, each tensor is one, and what a file has
behind its last tensor. Files too small to be weights are left out: they are a chunk or two.
Memory: 32 bytes per piece of a file, and per file of weights that was looked into 16 bytes per tensor.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

from ..format.bootstrap import Bootstrap
from ..weights.tensor import TensorFile

SMALLEST: Final = 64 << 10
"""Bytes: no smaller file is looked into."""
MAX_PIECES: Final = 1 << 20
"""Pieces of files kept for an image, 32 MiB; what comes behind them is read without being understood."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [first, stop) of a data space, which hold a file's from `file_offset` on."""

    first: int
    stop: int
    file: int
    """Its nid."""
    file_offset: int


class SpaceLayout:
    """The pieces of files in one data space, in order. Files that share bytes are known by the first of them."""

    def __init__(self) -> None:
        self._first = array("Q")
        self._stop = array("Q")
        self._file = array("Q")
        self._offset = array("Q")

    def add(self, piece: Piece) -> None:
        """Add a piece; `finish` puts them in order."""
        for column, value in zip(
            (self._first, self._stop, self._file, self._offset),
            (piece.first, piece.stop, piece.file, piece.file_offset),
            strict=True,
        ):
            column.append(value)

    def finish(self) -> None:
        """Sort the pieces; of those that begin at one byte, keep the first added."""
        order = sorted(range(len(self._first)), key=self._first.__getitem__)
        kept = [n for at, n in enumerate(order) if not at or self._first[order[at - 1]] != self._first[n]]
        self._first, self._stop, self._file, self._offset = (
            array("Q", [column[n] for n in kept]) for column in (self._first, self._stop, self._file, self._offset)
        )

    def piece_at(self, offset: int) -> Piece | None:
        """Return the piece that holds a byte of the space."""
        at = bisect_right(self._first, offset) - 1
        if at < 0 or offset >= self._stop[at]:
            return None
        return Piece(self._first[at], self._stop[at], self._file[at], self._offset[at])

    def following(self, piece: Piece) -> int:
        """Return the end of the piece behind this one, 0 if there is none."""
        at = bisect_right(self._first, piece.first)
        return self._stop[at] if at < len(self._first) else 0


class ImageLayout:
    """The layout of an image: a SpaceLayout per data space, and the tensors of its files as they become known."""

    def __init__(self, space_ids: list[bytes], spaces: list[SpaceLayout], sizes: dict[int, int]) -> None:
        self.spaces = dict(zip(space_ids, spaces, strict=True))
        self._sizes = sizes
        self._objects: dict[int, array[int]] = {}

    def size(self, file: int) -> int:
        """Return the size of a file, bytes."""
        return self._sizes[file]

    def is_understood(self, file: int) -> bool:
        """Tell whether `learn` was called for a file."""
        return file in self._objects

    def learn(self, file: int, tensors: TensorFile | None) -> None:
        """Note the tensors of a file; None: it is not weights."""
        bounds = array("Q")
        if tensors is not None:
            for tensor in tensors.tensors:
                if not bounds or tensor.offset > bounds[-1]:
                    bounds.append(tensor.offset)
                bounds.append(tensor.stop)
        self._objects[file] = bounds

    def object_at(self, piece: Piece, offset: int) -> tuple[int, int] | None:
        """Return where the tensor, or the header, that holds byte `offset` of a space lies in its piece; None if nothing is known."""
        bounds = self._objects.get(piece.file)
        if not bounds:
            return None
        shift = piece.first - piece.file_offset
        at = bisect_right(bounds, offset - shift)
        low = bounds[at - 1] if at else 0
        high = bounds[at] if at < len(bounds) else self._sizes[piece.file]
        return max(piece.first, low + shift), min(piece.stop, high + shift)


def image_layout(bootstrap: Bootstrap) -> ImageLayout:
    """Return the layout of an image, no file looked into yet. CPU only. Raises FormatError."""
    spaces = [SpaceLayout() for _ in bootstrap.spaces]
    sizes: dict[int, int] = {}
    pieces = 0
    for _, inode in bootstrap.walk():
        if inode.size < SMALLEST or inode.nid in sizes:
            continue
        for extent in bootstrap.extents(inode.nid):
            if extent.space is not None and pieces < MAX_PIECES:
                pieces += 1
                sizes[inode.nid] = inode.size
                piece = Piece(extent.offset, extent.offset + extent.length, inode.nid, extent.file_offset)
                spaces[extent.space].add(piece)
    for space in spaces:
        space.finish()
    return ImageLayout([bytes.fromhex(slot.tag.decode()) for slot in bootstrap.spaces], spaces, sizes)
