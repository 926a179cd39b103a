"""What a simulated node holds of the model: one number per unit, which is right or wrong like the bytes it stands for."""

from __future__ import annotations

from collections.abc import Iterable


def right_value(chunk: int) -> int:
    """Return what a unit should hold."""
    return chunk * 2654435761 % (1 << 32)


class SimContent:
    """Implements `p2p.core.task.Content`: one chunk per group."""

    def __init__(self, count: int, size: float) -> None:
        self.count = self.groups = count
        self.values: list[int | None] = [None] * count
        self.left = count
        self._length = int(size / count)

    @property
    def complete(self) -> bool:
        return not self.left

    def length(self, chunk: int) -> int:
        return self._length

    def group(self, chunk: int) -> int:
        return chunk

    def chunks_of(self, group: int) -> range:
        return range(group, group + 1)

    def missing(self, chunks: Iterable[int]) -> list[int]:
        values = self.values
        if type(chunks) is list and len(chunks) == 1:
            return chunks if values[chunks[0]] is None else []
        return [chunk for chunk in chunks if values[chunk] is None]

    def has(self, chunk: int) -> bool:
        return self.values[chunk] is not None

    def held(self) -> list[int]:
        return [chunk for chunk, value in enumerate(self.values) if value is not None]

    def store(self, chunk: int, value: int) -> bool:
        """Keep a unit if it is what it should be; return whether it is."""
        if value != right_value(chunk):
            return False
        if self.values[chunk] is None:
            self.values[chunk] = value
            self.left -= 1
        return True
