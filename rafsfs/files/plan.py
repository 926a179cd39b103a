"""How a file of a web server is cut: into sections, each a data space of its own, and sections into chunks. Pure.

Decided here: sizes, from the length alone, so that all nodes cut alike and a scheduler can check what it is told. Rule: a change of these
rules changes what nodes of two versions mean by the same section: it needs another context in identity.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..format.space_table import MAX_CHUNK, SpaceTable, pack_record
from ..types import BLOCK_SIZE, align_up

SECTION_BYTES: Final = 16 << 20
"""Smallest section: what others wait for at most until they can take a part of a small file from each other."""
MAX_SECTIONS: Final = 256
"""Sections of a file: each is a directory, two descriptors and a task in the swarm; a part of 1/256 is waited for as a whole."""
CHUNK_BYTES: Final = 1 << 20
"""As in images: what ten hops of a swarm take along best."""
MAX_CHUNKS: Final = 4096
"""Chunks of a section: 128 KiB of digests in one message."""
MAX_LENGTH: Final = MAX_SECTIONS * MAX_CHUNKS * MAX_CHUNK
"""16 TiB."""
DIGEST_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class FilePlan:
    """The cut of a file of `length` bytes, 1 to MAX_LENGTH."""

    length: int
    section_bytes: int
    """Of all sections but the last, which may be shorter."""
    chunk_bytes: int

    @property
    def sections(self) -> int:
        """How many sections there are."""
        return -(-self.length // self.section_bytes)

    def extent(self, section: int) -> tuple[int, int]:
        """Return (offset, length) of a section in the file. Raises IndexError."""
        if not 0 <= section < self.sections:
            raise IndexError(f"section {section} of {self.sections}")
        offset = section * self.section_bytes
        return offset, min(self.section_bytes, self.length - offset)

    def chunks(self, section: int) -> int:
        """Return how many chunks a section has."""
        return -(-self.extent(section)[1] // self.chunk_bytes)

    def fits(self, section: int, digests: bytes) -> bool:
        """Tell whether `digests`, 32 bytes per chunk, are as many as a section has chunks."""
        return 0 <= section < self.sections and len(digests) == DIGEST_BYTES * self.chunks(section)

    def table(self, section: int, digests: bytes) -> SpaceTable:
        """Return the content table of a section whose chunks have these digests. Raises ValueError if they do not fit."""
        if not self.fits(section, digests):
            raise ValueError(f"{len(digests)} bytes of digests for section {section}")
        length = self.extent(section)[1]
        records = bytearray()
        for chunk in range(self.chunks(section)):
            start = chunk * self.chunk_bytes
            digest = digests[DIGEST_BYTES * chunk : DIGEST_BYTES * (chunk + 1)]
            records += pack_record(digest, start, min(self.chunk_bytes, length - start))
        return SpaceTable(bytes(records), align_up(length, BLOCK_SIZE))


def plan_file(length: int) -> FilePlan:
    """Return the cut of a file. Raises ValueError for a length that cannot be cut."""
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"a file of {length} bytes, expected 1 to {MAX_LENGTH}")
    section = SECTION_BYTES
    while section * MAX_SECTIONS < length:
        section *= 2
    return FilePlan(length, section, max(CHUNK_BYTES, section // MAX_CHUNKS))


def digests_of(table: SpaceTable) -> bytes:
    """Return the digests of a content table, 32 bytes per chunk."""
    return b"".join(table.digest(chunk) for chunk in range(table.count))
