"""What an image's bytes are spent on: by codec, file, dtype, origin. Pure, over the tables of a loaded image.

Decided here: what is counted. A stored chunk is counted once in totals by codec and origin; files and dtypes that share one each show its
full cost, so their sum may exceed the image's. A chunk with several tensors is divided among them by bytes.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rafsfs.format.codec import CODEC_XOR, codec_name
from rafsfs.format.manifest import FROM
from rafsfs.image import Image

from .image_weights import ImageWeights


@dataclass(slots=True)
class Share:
    """Chunks and bytes of one kind."""

    chunks: int = 0
    data_bytes: float = 0
    """Of content."""
    stored_bytes: float = 0


class Census:
    """The figures of one image."""

    def __init__(self, image: Image) -> None:
        self._image = image
        chunk_map = image.chunk_map
        self._count = chunk_map.chunk_count
        self._storage = chunk_map.storage()
        self._lengths = chunk_map.lengths()
        own = self._storage[: self._count]
        places = np.stack([own["blob"].astype(np.uint64), own["offset"]], axis=1)
        self._is_first: NDArray[np.bool_] = np.zeros(self._count, dtype=bool)
        if self._count:
            self._is_first[np.unique(places, axis=0, return_index=True)[1]] = True

    @property
    def duplicate_chunks(self) -> int:
        """Chunks whose stored bytes another chunk of the image has too."""
        return int(self._count - self._is_first.sum())

    def by_codec(self) -> dict[str, Share]:
        """Return shares by codec; stored bytes each counted once."""
        codecs = self._storage["codec"][: self._count]
        return {codec_name(int(number)): self._share(codecs == number) for number in np.unique(codecs)}

    def by_origin(self) -> dict[str, Share]:
        """Return shares by the earlier image whose blobs hold the chunks; the empty name is the image itself."""
        listed = {blob.digest: blob.annotations.get(FROM, "") for blob in self._image.manifest.blobs}
        names = [listed.get(blob.digest, "") for blob in self._image.chunk_map.blobs]
        blobs = self._storage["blob"][: self._count]
        found = {}
        for name in sorted(set(names)):
            numbers = [number for number, other in enumerate(names) if other == name]
            share = self._share(np.isin(blobs, np.array(numbers, dtype=np.uint16)))
            if share.chunks:
                found[name] = share
        return found

    def deltas(self) -> Share:
        """Return the chunks stored as differences."""
        return self._share(self._storage["codec"][: self._count] == CODEC_XOR)

    @cached_property
    def base_bytes(self) -> int:
        """Stored bytes of the bases outside the image: what a node that has none of them fetches besides."""
        return int(self._storage["size"][self._count :].sum(dtype=np.uint64))

    def by_file(self) -> dict[str, tuple[int, Share]]:
        """Return (size, share) of every regular file with content in data spaces, by path."""
        found = {}
        for path, inode in self._image.bootstrap.walk():
            if stat.S_ISREG(inode.mode) and self._image.bootstrap.inline_data(inode.nid) is None:
                found[os.fsdecode(path)] = (inode.size, self._of_range(inode.nid, 0, inode.size))
        return found

    def by_dtype(self, files: Iterable[ImageWeights]) -> dict[str, Share]:
        """Return shares by dtype of the tensors of `files`."""
        found: defaultdict[str, Share] = defaultdict(Share)
        for file in files:
            for tensor in file.weights.tensors:
                share = self._of_range(file.nid, tensor.offset, tensor.length)
                total = found[tensor.dtype]
                total.chunks += share.chunks
                total.data_bytes += share.data_bytes
                total.stored_bytes += share.stored_bytes
        return dict(found)

    def _share(self, mine: NDArray[np.bool_]) -> Share:
        lengths, own = self._lengths[: self._count], self._storage[: self._count]
        return Share(
            int(mine.sum()),
            int(lengths[mine].sum(dtype=np.uint64)),
            int(own["size"][mine & self._is_first].sum(dtype=np.uint64)),
        )

    def _of_range(self, nid: int, offset: int, length: int) -> Share:
        share = Share()
        stop = offset + length
        for extent in self._image.bootstrap.extents(nid):
            first, last = max(offset, extent.file_offset), min(stop, extent.file_offset + extent.length)
            if extent.space is None or first >= last:
                continue
            table = self._image.chunk_map.table(extent.space)
            number = self._image.chunk_map.spaces[extent.space].first
            start = extent.offset + first - extent.file_offset
            end = start + last - first
            for index in table.covering(start, last - first):
                at, size = table.extent(index)
                part = min(end, at + size) - max(start, at)
                share.chunks += 1
                share.data_bytes += part
                share.stored_bytes += int(self._storage["size"][number + index]) * part / size
        return share
