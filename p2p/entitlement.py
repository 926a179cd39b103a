"""What entitles to a chunk: knowing its record in the content table, which only the image's metadata tell. Pure."""

from __future__ import annotations

from blake3 import blake3

from rafsfs.format.space_table import SpaceTable


def proof(table: SpaceTable, first: int, last: int) -> str:
    """Return the proof for chunks `first` to `last`: 32 hex digits of the BLAKE3 of their records. Raises IndexError if they are
    not there.
    """
    if not 0 <= first <= last < table.count:
        raise IndexError(f"chunks {first} to {last} of {table.count}")
    width = len(table.buffer) // table.count
    return blake3(table.buffer[first * width : (last + 1) * width]).hexdigest(length=16)


def whole_proof(table: SpaceTable) -> str:
    """Return the proof for all chunks."""
    return proof(table, 0, table.count - 1)
