"""The image that a build stores its weights as differences to (`--base`): which chunk belongs to which, and its bytes.

Decided here: a tensor's base is the tensor of the same name, dtype and shape, in the file of the same path if several files have one; a
chunk's base is the chunk cut at the same place of it, of the same length, if its own chain of bases is short enough. Concurrency: `find`
has no checkpoint; `read` may be called by several tasks at once. Memory: about 400 bytes per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from rafsfs.format.chunk_index import Extent
from rafsfs.format.chunk_map import MAX_DELTA_DEPTH
from rafsfs.image import ImageReader
from rafsfs.weights.tensor import Tensor

from .earlier_image import EarlierImage
from .image_weights import weights_of


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a tensor of the base is."""

    path: str
    nid: int
    tensor: Tensor


class BaseImage:
    """A base, its tensors known. Made by `open`."""

    def __init__(self, earlier: EarlierImage, homes: dict[str, list[_Home]]) -> None:
        self.earlier = earlier
        self._homes = homes
        self._reader = ImageReader(earlier.store, earlier.image)
        self._extents: dict[int, list[Extent]] = {}

    @classmethod
    async def open(cls, earlier: EarlierImage) -> BaseImage:
        """Read the headers of the base's weights. Raises RemoteError, FormatError, IntegrityError."""
        homes: dict[str, list[_Home]] = {}
        async for found in weights_of(earlier.image, ImageReader(earlier.store, earlier.image)):
            for tensor in found.weights.tensors:
                homes.setdefault(tensor.name, []).append(_Home(found.path, found.nid, tensor))
        return cls(earlier, homes)

    @property
    def tensors(self) -> int:
        """How many tensors the base has."""
        return sum(len(homes) for homes in self._homes.values())

    def find(self, path: str, tensor: Tensor, offset: int, length: int) -> tuple[int, int] | None:
        """Return (data space, chunk) of the base for `length` bytes from `offset` of a tensor of the file `path`, or None."""
        home = self._home(path, tensor)
        if home is None:
            return None
        position = home.tensor.offset + offset
        for extent in self._extents_of(home.nid):
            if extent.space is not None and extent.file_offset <= position < extent.file_offset + extent.length:
                start = extent.offset + position - extent.file_offset
                chunk_map = self.earlier.image.chunk_map
                table = chunk_map.table(extent.space)
                index = table.find(start)
                if index == table.count or table.extent(index) != (start, length):
                    return None
                place = extent.space, index
                return place if self.earlier.depth(place) < MAX_DELTA_DEPTH else None
        return None

    async def read(self, place: tuple[int, int]) -> bytes:
        """Return the bytes of a chunk, verified. Raises RemoteError, FormatError, IntegrityError."""
        return await self._reader.read_chunk(*place)

    def _home(self, path: str, tensor: Tensor) -> _Home | None:
        alike = [
            home
            for home in self._homes.get(tensor.name, ())
            if (home.tensor.dtype, home.tensor.shape) == (tensor.dtype, tensor.shape)
        ]
        same_path = [home for home in alike if home.path == path]
        return (same_path or alike)[0] if same_path or len(alike) == 1 else None

    def _extents_of(self, nid: int) -> list[Extent]:
        found = self._extents.get(nid)
        if found is None:
            found = self._extents[nid] = list(self.earlier.image.bootstrap.extents(nid))
        return found
