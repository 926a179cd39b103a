"""Finding files of the same content, before layout: they share one range of a data space.

Decided here: what is compared, in rising order of cost: size and holes, digest of the first 64 KiB, digest of everything. So a file is
read whole ahead of time only if another one begins alike, which for weights means that it is most likely a copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from blake3 import blake3

from .source_file import READ_AHEAD, OpenFiles, SourceFile

_HEAD: Final = 64 << 10
_BLOCK: Final = 4 << 20


def find_identical(files: Sequence[SourceFile]) -> dict[int, int]:
    """Return {file number: number of the first file with the same content} for every copy.

    Raises SourceError. Blocking; reads candidates and changes nothing, so a thread that runs it can be abandoned.
    """
    finder = _Finder(files)
    copies: dict[int, int] = {}
    for group in _groups(range(len(files)), lambda n: (files[n].size, tuple(files[n].ranges))):
        for same in _groups(group, lambda n: finder.digest(n, _HEAD)):
            for confirmed in finder.confirm(same):
                for number in confirmed[1:]:
                    copies[number] = confirmed[0]
    return copies


def _groups(numbers: Sequence[int] | range, key: Callable[[int], Hashable]) -> list[list[int]]:
    """Return the groups of two and more numbers that share a key, each in order."""
    found: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number in numbers:
        found[key(number)].append(number)
    return [group for group in found.values() if len(group) > 1]


class _Finder:
    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = files
        self._buffer = memoryview(bytearray(_BLOCK))

    def confirm(self, alike: list[int]) -> list[list[int]]:
        """Return the groups of files of equal content among files whose ranges begin alike."""
        if all(length <= _HEAD for _, length in self._files[alike[0]].ranges):
            return [alike]  # the heads were everything
        return _groups(alike, lambda n: self.digest(n, None))

    def digest(self, number: int, limit: int | None) -> bytes:
        """Return a digest of the stored ranges of a file, of the first `limit` bytes of each if given."""
        hasher = blake3()
        with OpenFiles(self._files, ahead=0 if limit else READ_AHEAD) as opened:
            for offset, length in self._files[number].ranges:
                end = offset + (length if limit is None else min(length, limit))
                for position in range(offset, end, _BLOCK):
                    block = self._buffer[: min(_BLOCK, end - position)]
                    opened.read_into(number, block, position)
                    hasher.update(block)
        return hasher.digest()
