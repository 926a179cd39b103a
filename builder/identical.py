"""Finding files of the same content, before layout: they share one range of a data space.

Decided here: what is compared, in rising order of cost: size and holes, digest of the first 64 KiB, digest of everything. So a file is
read whole ahead of time only if another one begins alike, which for weights means that it is most likely a copy.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from blake3 import blake3

from rafsfs.errors import SourceError

from .scan import SourceFile, changed, read_error, signature_of

_HEAD: Final = 64 << 10
_BLOCK: Final = 4 << 20


def find_identical(files: Sequence[SourceFile]) -> dict[int, int]:
    """Return {file number: number of the first file with the same content} for every copy. Blocking; reads candidates."""
    copies: dict[int, int] = {}
    for group in _groups(range(len(files)), lambda n: (files[n].size, tuple(files[n].ranges))):
        for alike in _groups(group, lambda n: _digest(files[n], _HEAD)):
            for same in _groups(alike, lambda n: _digest(files[n], None)):
                for number in same[1:]:
                    copies[number] = same[0]
    return copies


def _groups(numbers: Sequence[int] | range, key: Callable[[int], Hashable]) -> list[list[int]]:
    """Return the groups of two and more numbers that share a key, each in order."""
    found: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number in numbers:
        found[key(number)].append(number)
    return [group for group in found.values() if len(group) > 1]


def _digest(file: SourceFile, limit: int | None) -> bytes:
    """Return a digest of the stored ranges of a file, of the first `limit` bytes of each if given."""
    hasher = blake3()
    buffer = memoryview(bytearray(_BLOCK if limit is None else limit))
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for offset, length in file.ranges:
                left = length if limit is None else min(length, limit)
                position = offset
                while left:
                    got = os.preadv(descriptor, [buffer[: min(left, len(buffer))]], position)
                    if not got:
                        raise changed(file.path)
                    hasher.update(buffer[:got])
                    left -= got
                    position += got
            if signature_of(os.fstat(descriptor)) != file.signature:
                raise changed(file.path)
        finally:
            os.close(descriptor)
    except SourceError:
        raise
    except OSError as error:
        raise read_error(file.path, error) from error
    return hasher.digest()
