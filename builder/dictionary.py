"""The chunk dictionary of this machine: content → where a blob that was pushed from here stores it, in LMDB.

A hint: whoever follows an entry makes sure that the blob is in the repository at hand, or can be mounted from one that is known to
have it. A dictionary that cannot be opened or is full costs sending chunks again. Bounds: 4 GiB on disk, room for about 50 million chunks;
when full it is emptied.

Schema, version 1. `chunks`: BLAKE3-256 of the chunk → blob number u32, offset u64, stored size u32, codec u8, parameter u8.
`blobs`: number u32 big-endian → SHA-256, size u64. `names`: SHA-256 → number u32. `repositories`: SHA-256 + name of the repository
→ nothing.
Chunks stored as differences are not entered: their bases would have to come along. LMDB rules kept: write transactions within one
call, local disks only, several processes may use it at once.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import lmdb

from rafsfs.types import Digest

_log = logging.getLogger("rafsfs.builder")

_MAP_SIZE: Final = 4 << 30
_CHUNK = struct.Struct("<IQIBB")
_BLOB = struct.Struct("<32sQ")
_NUMBER = struct.Struct(">I")
_MOST_REPOSITORIES: Final = 16


@dataclass(frozen=True, slots=True)
class DictionaryEntry:
    """Where a chunk is stored."""

    blob: Digest
    blob_size: int
    offset: int
    stored_size: int
    codec: int
    param: int


class ChunkDictionary:
    """An open dictionary. Any thread may look things up, one at a time notes them."""

    def __init__(self, environment: lmdb.Environment) -> None:
        self._env = environment
        self._chunks, self._blobs, self._names, self._repositories = (
            environment.open_db(name) for name in (b"chunks-1", b"blobs-1", b"names-1", b"repositories-1")
        )

    @classmethod
    def open(cls, directory: str) -> Self | None:
        """Open the dictionary in a directory, made if it is not there; None, with a line in the log, if that fails."""
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            try:
                return cls(_environment(directory))
            except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
                _log.warning("chunk dictionary %s begins anew: %s", directory, error)
                os.unlink(os.path.join(directory, "data.mdb"))
                return cls(_environment(directory))
        except (lmdb.Error, OSError) as error:
            _log.warning(
                "chunk dictionary %s cannot be used: %s; chunks of earlier builds are sent again", directory, error
            )
            return None

    def find(self, digests: Sequence[bytes]) -> list[DictionaryEntry | None]:
        """Return what is known of each chunk."""
        try:
            with self._env.begin() as transaction:
                return [self._entry(transaction, transaction.get(digest, db=self._chunks)) for digest in digests]
        except lmdb.Error as error:
            _log.warning("chunk dictionary: %s", error)
            return [None] * len(digests)

    def _entry(self, transaction: lmdb.Transaction, value: bytes | None) -> DictionaryEntry | None:
        if value is None or len(value) != _CHUNK.size:
            return None
        number, offset, stored_size, codec, param = _CHUNK.unpack(value)
        blob = transaction.get(_NUMBER.pack(number), db=self._blobs)
        if blob is None or len(blob) != _BLOB.size:
            return None
        sha256, size = _BLOB.unpack(blob)
        if not 0 < stored_size <= size - offset:
            return None
        return DictionaryEntry(Digest(f"sha256:{sha256.hex()}"), size, offset, stored_size, codec, param)

    def repositories(self, blob: Digest, registry: str) -> list[str]:
        """Return repositories of a registry (`host:port`) that are known to have had a blob, without the registry's name."""
        prefix = bytes.fromhex(blob.hex) + registry.encode() + b"/"
        found: list[str] = []
        try:
            with self._env.begin(db=self._repositories) as transaction, transaction.cursor() as cursor:
                more = cursor.set_range(prefix)
                while more and len(found) < _MOST_REPOSITORIES and cursor.key().startswith(prefix):
                    found.append(cursor.key()[len(prefix) :].decode())
                    more = cursor.next()
        except (lmdb.Error, UnicodeDecodeError) as error:
            _log.warning("chunk dictionary: %s", error)
        return found

    def note_blob(
        self, blob: Digest, size: int, store_name: str, chunks: Iterable[tuple[bytes, int, int, int, int]]
    ) -> None:
        """Enter a blob that `store_name` has, with (digest, offset, stored size, codec, parameter) of its chunks. Newer entries win."""
        for attempt in range(2):
            try:
                with self._env.begin(write=True) as transaction:
                    number = self._number(transaction, blob, size)
                    transaction.put(_repository_key(blob, store_name), b"", db=self._repositories)
                    for digest, *place in chunks:
                        transaction.put(digest, _CHUNK.pack(number, *place), db=self._chunks)
                return
            except lmdb.MapFullError:
                if attempt:
                    return
                chunks = list(chunks)
                self._clear()
            except lmdb.Error as error:
                _log.warning("chunk dictionary: %s", error)
                return

    def _number(self, transaction: lmdb.Transaction, blob: Digest, size: int) -> int:
        sha256 = bytes.fromhex(blob.hex)
        known = transaction.get(sha256, db=self._names)
        if known is not None:
            found: int = _NUMBER.unpack(known)[0]
            return found
        with transaction.cursor(db=self._blobs) as cursor:
            number = _NUMBER.unpack(cursor.key())[0] + 1 if cursor.last() else 0
        transaction.put(_NUMBER.pack(number), _BLOB.pack(sha256, size), db=self._blobs)
        transaction.put(sha256, _NUMBER.pack(number), db=self._names)
        return int(number)

    def _clear(self) -> None:
        _log.warning("chunk dictionary is full and begins anew")
        with self._env.begin(write=True) as transaction:
            for database in (self._chunks, self._blobs, self._names, self._repositories):
                transaction.drop(database, delete=False)

    def close(self) -> None:
        """Close the files."""
        self._env.close()


def _environment(directory: str) -> lmdb.Environment:
    return lmdb.open(directory, map_size=_MAP_SIZE, max_dbs=4, metasync=False, mode=0o600)


def _repository_key(blob: Digest, store_name: str) -> bytes:
    return (bytes.fromhex(blob.hex) + store_name.encode())[:500]
