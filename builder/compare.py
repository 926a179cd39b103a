"""What changed between two images, by file and by tensor, and what a node that has the first must fetch for the second.

Decided here: how contents are compared without fetching them: by the digests of their chunks. Where the two are cut at different places,
the digests say nothing: tensors up to 1 MiB are then read and compared, larger ones and files count as changed, marked `recut`. Memory: one
entry per chunk of the first image, about 100 bytes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from rafsfs.format.bootstrap import Inode
from rafsfs.image import Image, ImageReader
from rafsfs.weights.tensor import Tensor

from .image_weights import ImageWeights

_READ: Final = 1 << 20
"""Bytes of a tensor up to which it is read to be compared."""

Kind = Literal["added", "removed", "changed", "recut", "metadata"]
Piece = tuple[int, int, bytes]
"""(offset from the start, length, digest) of a part of a file or tensor; the digest is empty for a hole, and for a chunk that is only in
part inside."""


@dataclass(frozen=True, slots=True)
class FileChange:
    """A path that differs."""

    path: str
    kind: Kind
    size: int
    """Bytes in the second image; in the first if it was removed."""


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A tensor that differs, by name."""

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(slots=True)
class Fetch:
    """What a node that has the first image fetches for the second."""

    data_bytes: int = 0
    """Of content that it lacks."""
    stored_bytes: int = 0
    """That it reads from a registry for it, bases included."""
    metadata_bytes: int = 0
    """Manifest, bootstrap and chunk map."""
    chunks: int = 0


@dataclass(slots=True)
class Comparison:
    """Everything."""

    files: list[FileChange] = field(default_factory=list)
    tensors: list[TensorChange] = field(default_factory=list)
    equal_files: int = 0
    equal_tensors: int = 0
    equal_tensor_bytes: int = 0
    fetch: Fetch = field(default_factory=Fetch)


class _Side:
    """One of the two images."""

    def __init__(self, image: Image, reader: ImageReader, weights: Iterable[ImageWeights]) -> None:
        self.image = image
        self.reader = reader
        self.inodes = {os.fsdecode(path): inode for path, inode in image.bootstrap.walk()}
        self.tensors: dict[str, list[tuple[ImageWeights, Tensor]]] = {}
        for file in weights:
            for tensor in file.weights.tensors:
                self.tensors.setdefault(tensor.name, []).append((file, tensor))

    def pieces(self, nid: int, offset: int, length: int) -> list[Piece]:
        """Return what a range of a file consists of."""
        found: list[Piece] = []
        stop = offset + length
        for extent in self.image.bootstrap.extents(nid):
            first, last = max(offset, extent.file_offset), min(stop, extent.file_offset + extent.length)
            if first >= last:
                continue
            if extent.space is None:
                found.append((first - offset, last - first, b""))
                continue
            table = self.image.chunk_map.table(extent.space)
            start = extent.offset + first - extent.file_offset
            for index in table.covering(start, last - first):
                at, size = table.extent(index)
                inside = at >= start and at + size <= start + last - first
                begin = max(at, start)
                end = min(at + size, start + last - first)
                found.append((begin - start + first - offset, end - begin, table.digest(index) if inside else b"?"))
        return found


async def compare_images(
    first: tuple[Image, ImageReader, list[ImageWeights]], second: tuple[Image, ImageReader, list[ImageWeights]]
) -> Comparison:
    """Compare two images. Raises RemoteError, IntegrityError where small tensors have to be read."""
    one, two = _Side(*first), _Side(*second)
    result = Comparison(fetch=_fetch(one.image, two.image))
    for path in sorted(one.inodes.keys() | two.inodes.keys()):
        before, after = one.inodes.get(path), two.inodes.get(path)
        if before is None or after is None:
            found = after or before
            assert found is not None
            result.files.append(FileChange(path, "removed" if after is None else "added", _size(found)))
            continue
        kind = _file_change(one, before, two, after)
        if kind is None:
            result.equal_files += 1
        else:
            result.files.append(FileChange(path, kind, _size(after)))
    await _compare_tensors(one, two, result)
    return result


async def _compare_tensors(one: _Side, two: _Side, result: Comparison) -> None:
    for name in sorted(one.tensors.keys() | two.tensors.keys()):
        left = list(one.tensors.get(name, ()))
        for file, tensor in two.tensors.get(name, ()):
            # The tensor of the same path, else any of that name: files are split and renamed.
            twin = next((other for other in left if other[0].path == file.path), left[0] if left else None)
            if twin is None:
                result.tensors.append(_change(tensor, "added"))
                continue
            left.remove(twin)
            kind = await _tensor_change(one, twin, two, (file, tensor))
            if kind is None:
                result.equal_tensors += 1
                result.equal_tensor_bytes += tensor.length
            else:
                result.tensors.append(_change(tensor, kind))
        result.tensors += [_change(tensor, "removed") for _, tensor in left]


async def _tensor_change(
    one: _Side, before: tuple[ImageWeights, Tensor], two: _Side, after: tuple[ImageWeights, Tensor]
) -> Kind | None:
    old, new = before[1], after[1]
    if (old.dtype, old.shape, old.length) != (new.dtype, new.shape, new.length):
        return "changed"
    kind = _pieces_change(
        one.pieces(before[0].nid, old.offset, old.length), two.pieces(after[0].nid, new.offset, new.length)
    )
    if kind == "recut" and new.length <= _READ:
        data = await one.reader.read_range(before[0].nid, old.offset, old.length)
        return None if data == await two.reader.read_range(after[0].nid, new.offset, new.length) else "changed"
    return kind


def _file_change(one: _Side, before: Inode, two: _Side, after: Inode) -> Kind | None:
    kind: Kind | None = None
    if stat.S_IFMT(before.mode) != stat.S_IFMT(after.mode):
        return "changed"
    if stat.S_ISREG(after.mode):
        kind = _content_change(one, before, two, after)
    elif stat.S_ISLNK(after.mode) and one.image.bootstrap.readlink(before.nid) != two.image.bootstrap.readlink(
        after.nid
    ):
        kind = "changed"
    if kind is None and _metadata(one, before) != _metadata(two, after):
        return "metadata"
    return kind


def _metadata(side: _Side, inode: Inode) -> tuple[object, ...]:
    return (
        inode.mode, inode.uid, inode.gid, inode.mtime_ns, inode.rdev, side.image.bootstrap.xattrs(inode.nid),
    )  # fmt: skip


def _content_change(one: _Side, before: Inode, two: _Side, after: Inode) -> Kind | None:
    if before.size != after.size:
        return "changed"
    inline = one.image.bootstrap.inline_data(before.nid), two.image.bootstrap.inline_data(after.nid)
    if inline != (None, None):
        return None if inline[0] == inline[1] else "changed"
    return _pieces_change(one.pieces(before.nid, 0, before.size), two.pieces(after.nid, 0, after.size))


def _pieces_change(before: list[Piece], after: list[Piece]) -> Kind | None:
    """Return None if the same bytes are certain, "changed" if others are, "recut" if the digests cannot tell."""
    cuts = [piece[:2] for piece in before] == [piece[:2] for piece in after]
    certain = all(digest != b"?" for _, _, digest in before + after)
    if before == after and certain:
        return None
    return "changed" if cuts and certain else "recut"


def _change(tensor: Tensor, kind: Kind) -> TensorChange:
    return TensorChange(tensor.name, kind, tensor.dtype, tensor.shape, tensor.length)


def _size(inode: Inode) -> int:
    return inode.size if stat.S_ISREG(inode.mode) else 0


def _fetch(first: Image, second: Image) -> Fetch:
    """Return what is missing of the second image where the first one is complete."""
    known: set[bytes] = set()
    for space in first.chunk_map.spaces:
        table = first.chunk_map.table(space.index)
        known.update(table.digest(index) for index in range(table.count))
    result = Fetch()
    manifest = second.manifest
    result.metadata_bytes = len(second.manifest_bytes) + manifest.bootstrap.size + manifest.chunk_map.size
    chunk_map = second.chunk_map
    for space in chunk_map.spaces:
        table = chunk_map.table(space.index)
        for index in range(table.count):
            if table.digest(index) in known:
                continue
            result.chunks += 1
            result.data_bytes += table.extent(index)[1]
            place: tuple[int, int] | None = (space.index, index)
            while place is not None:
                stored = chunk_map.stored(*place)
                if stored.digest in known:
                    break
                known.add(stored.digest)
                result.stored_bytes += stored.stored_size
                place = stored.base
    return result
