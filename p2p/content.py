"""A data space of the cache as the decisions of the swarm see it."""

from __future__ import annotations

from collections.abc import Iterable

from rafsfs.store.data_space import DataSpace

from .protocol.groups import GROUP_BYTES, group_count, group_of


class SpaceContent:
    """Implements `core.task.Content`."""

    def __init__(self, space: DataSpace) -> None:
        self.space = space
        self.count = space.table.count
        self.groups = group_count(space.size)

    @property
    def complete(self) -> bool:
        """Whether all chunks are here."""
        return self.space.complete

    def length(self, chunk: int) -> int:
        """Return the bytes of a chunk."""
        return self.space.table.extent(chunk)[1]

    def group(self, chunk: int) -> int:
        """Return the group that a chunk starts in."""
        return group_of(self.space.table.extent(chunk)[0])

    def chunks_of(self, group: int) -> range:
        """Return the chunks that start in a group."""
        start = group * GROUP_BYTES
        return range(self._first_at(start), self._first_at(start + GROUP_BYTES))

    def missing(self, chunks: Iterable[int]) -> list[int]:
        """Return those of `chunks` that are not here, in their order."""
        return self.space.missing(chunks)

    def _first_at(self, offset: int) -> int:
        """Return the first chunk that starts at or behind `offset`."""
        table = self.space.table
        index = table.find(offset)
        return index + 1 if index < table.count and table.extent(index)[0] < offset else index
