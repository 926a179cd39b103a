"""Value types that every package shares: OCI digests, descriptors, chunk digests. Frozen, validated at birth."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from .errors import FormatError

ChunkDigest = bytes
"""BLAKE3-256 of a chunk's uncompressed bytes: 32 raw bytes."""

SpaceId = bytes
"""Identity of a data space: BLAKE3-256 of its content table (docs/format.md): 32 raw bytes."""

BLOCK_SIZE: Final = 4096
"""EROFS block size of every image, bytes; data-space ranges are aligned to it."""

_SHA256 = re.compile(r"\Asha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """An OCI content digest, always `sha256:<64 lower-case hex>`: names a manifest, layer or blob by its stored bytes."""

    text: str

    def __post_init__(self) -> None:
        if not _SHA256.match(self.text):
            raise FormatError(f"digest {self.text[:100]!r} is not of the form sha256:<64 hex digits>")

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Digest:
        """Return the digest of `data`."""
        return cls("sha256:" + hashlib.sha256(data).hexdigest())

    @property
    def hex(self) -> str:
        """The 64 hex digits without the algorithm."""
        return self.text[7:]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An OCI descriptor: what a manifest says of one of its parts (image-spec 1.1, descriptor.md)."""

    media_type: str
    digest: Digest
    size: int
    """Bytes as stored."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str | None = None


def align_up(value: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` (a power of two) that is >= `value`."""
    return (value + alignment - 1) & -alignment
