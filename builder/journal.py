"""What is known of earlier pushes, so that an interrupted one continues and a finished blob is not sent again.

One JSON file per repository in the user's state directory, 0600, replaced in one step. A key names one data space filled from
exactly these files with these options; its entry is the upload's resume token, or the digest of the finished blob. The journal is a
hint: a token the registry has forgotten starts anew, and a digest is believed only after the bytes made now hash to it. Two builders of one
repository at a time overwrite each other's hints, which costs bytes and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from rafsfs.errors import FormatError
from rafsfs.types import Digest

_LIMIT: Final = 4096
"""Entries kept per repository, the newest."""
_VERSION: Final = 1


class Journal:
    """The journal of one repository. Small synchronous file writes, one per 8 MiB sent."""

    def __init__(self, directory: str, store_name: str) -> None:
        name = hashlib.sha256(store_name.encode()).hexdigest()[:32]
        self._path = os.path.join(directory, "push", f"{name}.json")
        self._entries: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError, AttributeError):
            data = json.loads(Path(self._path).read_bytes())
            if data.get("version") == _VERSION and isinstance(data.get("entries"), dict):
                self._entries = {k: v for k, v in data["entries"].items() if isinstance(v, dict)}

    def token(self, key: str) -> str | None:
        """Return the resume token of an unfinished blob."""
        found = self._entries.get(key, {}).get("token")
        return found if isinstance(found, str) else None

    def finished(self, key: str) -> tuple[Digest, int] | None:
        """Return (digest, size) of a blob that was pushed."""
        entry = self._entries.get(key, {})
        digest, size = entry.get("digest"), entry.get("size")
        if isinstance(digest, str) and isinstance(size, int):
            with suppress(FormatError):
                return Digest(digest), size
        return None

    def note_token(self, key: str, token: str) -> None:
        """Remember where an upload continues."""
        self._put(key, {"token": token})

    def note_finished(self, key: str, digest: Digest, size: int) -> None:
        """Remember that a blob is in the repository."""
        self._put(key, {"digest": str(digest), "size": size})

    def forget(self, key: str) -> None:
        """Drop what is known under a key: it has turned out to be wrong."""
        if self._entries.pop(key, None) is not None:
            self._save()

    def _put(self, key: str, entry: dict[str, Any]) -> None:
        self._entries.pop(key, None)
        self._entries[key] = entry
        while len(self._entries) > _LIMIT:
            self._entries.pop(next(iter(self._entries)))
        self._save()

    def _save(self) -> None:
        with suppress(OSError):  # a hint that cannot be kept costs a longer push, never a wrong one
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            temporary = f"{self._path}.{os.getpid()}"
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps({"version": _VERSION, "entries": self._entries}))  # dump is ten times slower
            os.rename(temporary, self._path)
