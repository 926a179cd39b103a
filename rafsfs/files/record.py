"""What a node keeps of files of web servers: which data spaces their sections are. CACHE/files/KEY.json; docs/cache.md.

Rule: no URL with its query and no credential is ever written. A record that does not make sense counts as none: its sections are fetched
again, and found by digest if they are there. Blocking calls.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import CacheError
from ..store.data_space import replace_file, write_error

_VERSION: Final = 1


@dataclass(slots=True)
class FileRecord:
    """One version of one file."""

    key: bytes
    url: str
    """Fit to be shown: without query."""
    length: int
    shared: bool
    spaces: dict[int, bytes] = field(default_factory=dict)
    """Data space of each section that is known."""
    own: set[int] = field(default_factory=set)
    """Sections that this node has taken from the server itself, and whose digests it knows from nobody else."""


def list_files(cache_dir: str) -> list[dict[str, Any]]:
    """Return what `rafs cache ls` says of files of web servers. Blocking."""
    return [
        {
            "key": record.key.hex(),
            "url": record.url,
            "length": record.length,
            "shared": record.shared,
            "spaces": [space.hex() for space in record.spaces.values()],
        }
        for record in FileRecords(cache_dir).all()
    ]


class FileRecords:
    """The records of one cache directory."""

    def __init__(self, cache_dir: str) -> None:
        self.directory = os.path.join(cache_dir, "files")

    def prepare(self) -> None:
        """Make the directory, and clear away what was left unfinished. Raises CacheError."""
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            for name in os.listdir(self.directory):
                if ".new-" in name:
                    os.unlink(os.path.join(self.directory, name))
        except OSError as error:
            raise write_error(error, self.directory) from error

    def staging(self, key: bytes, section: int) -> str:
        """Return the name of a file for a section that is being fetched."""
        return os.path.join(self.directory, f"{key.hex()}.new-{section}-{os.urandom(6).hex()}")

    def load(self, key: bytes) -> FileRecord | None:
        """Return the record of a file, None if there is none that makes sense."""
        try:
            data = json.loads(Path(self._path(key)).read_bytes())
            if data["version"] != _VERSION:
                return None
            return FileRecord(
                key=key,
                url=str(data["url"]),
                length=int(data["length"]),
                shared=bool(data["shared"]),
                spaces={int(section): bytes.fromhex(space) for section, space in data["spaces"].items()},
                own={int(section) for section in data["own"]},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def save(self, record: FileRecord) -> None:
        """Write a record. Raises CacheError."""
        data = {
            "version": _VERSION,
            "url": record.url,
            "length": record.length,
            "shared": record.shared,
            "spaces": {str(section): space.hex() for section, space in sorted(record.spaces.items())},
            "own": sorted(record.own),
            "last_used": int(time.time()),
        }
        replace_file(self._path(record.key), json.dumps(data, sort_keys=True).encode())

    def remove(self, key: bytes) -> None:
        """Forget a file."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(key))

    def all(self) -> Iterator[FileRecord]:
        """Yield every record."""
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self.directory)):
                with contextlib.suppress(ValueError):
                    record = self.load(bytes.fromhex(name.removesuffix(".json")))
                    if record is not None:
                        yield record

    def _path(self, key: bytes) -> str:
        return os.path.join(self.directory, f"{key.hex()}.json")


def checked_key(value: object) -> bytes:
    """Return the key of a file. Raises CacheError for what is none."""
    if not isinstance(value, bytes) or len(value) != 32:
        raise CacheError("a file's key is 32 bytes")
    return value
