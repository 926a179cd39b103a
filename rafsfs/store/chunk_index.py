"""Index of chunks on this node: digest → (data space, chunk number), in LMDB.

A hint, never an authority: whoever follows an entry checks the presence map and the digest of what is there. So a lost or
stale entry costs a fetch, not a wrong byte, and the database needs no sync of its own.

Schema (one unnamed database): key = BLAKE3-256 of the chunk, 32 bytes; value = space id, 32 bytes, then chunk number u32,
little-endian. The newest entry wins. LMDB rules kept here: one environment per process, write transactions begin and end inside
one call, never across a fork, local disks only.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Iterable
from typing import Final

import lmdb

from ..errors import CacheError

_VALUE = struct.Struct("<32sI")
_MAP_SIZE: Final = 16 << 30
"""Address space set aside, not disk: room for about 150 million chunks."""
_log = logging.getLogger(__name__)


class ChunkIndex:
    """An open index. Thread-safe."""

    def __init__(self, directory: str) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._write_lock = threading.Lock()
        try:
            self._env = lmdb.open(directory, map_size=_MAP_SIZE, sync=False, metasync=False, max_readers=64, mode=0o600)
            self._env.reader_check()
        except lmdb.Error as error:
            raise CacheError(f"chunk index {directory}: {error}") from error

    def put_many(self, entries: Iterable[tuple[bytes, bytes, int]]) -> None:
        """Enter (digest, space id, chunk number) triples. A failure is logged and forgotten: entries are hints."""
        try:
            with self._write_lock, self._env.begin(write=True) as transaction:
                for digest, space_id, number in entries:
                    transaction.put(digest, _VALUE.pack(space_id, number))
        except lmdb.Error as error:
            _log.warning("chunk index: %s", error)

    def find(self, digest: bytes) -> tuple[bytes, int] | None:
        """Return (space id, chunk number) of a place where the chunk may be."""
        try:
            with self._env.begin() as transaction:
                value = transaction.get(digest)
        except lmdb.Error as error:
            _log.warning("chunk index: %s", error)
            return None
        if value is None or len(value) != _VALUE.size:
            return None
        space_id, number = _VALUE.unpack(value)
        return space_id, number

    def remove_space(self, space_id: bytes, digests: Iterable[bytes]) -> None:
        """Remove the entries of a data space that goes away."""
        try:
            with self._write_lock, self._env.begin(write=True) as transaction:
                for digest in digests:
                    value = transaction.get(digest)
                    if value is not None and value[:32] == space_id:
                        transaction.delete(digest)
        except lmdb.Error as error:
            _log.warning("chunk index: %s", error)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
