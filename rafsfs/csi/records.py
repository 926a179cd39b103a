"""What volumes there are on this node, on disk: one file per published volume, replaced as a whole. No secrets.

Decided here: names and the order of writing. Rule: a record is written before anything is mounted for it and removed after
everything has been taken away, so whatever a crash leaves behind is named by a record. Blocking, small.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from ..errors import CacheError
from .volume import VolumeSpec, key_of

_log = logging.getLogger(__name__)

_MOST: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """A volume at one target path."""

    volume_id: str
    target: str
    spec: VolumeSpec
    digest: str = ""
    """Of the manifest: what the volume holds for as long as it lives, whatever becomes of the tag."""
    mount_key: str = ""
    pod: dict[str, str] = field(default_factory=dict)
    """Name, namespace and uid of the pod."""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of a dynamic volume: name of a model → its spec, digest and mount_key."""

    @property
    def key(self) -> str:
        """Its file name."""
        return key_of(f"{self.volume_id}\0{self.target}")

    def with_models(self, models: dict[str, dict[str, Any]]) -> VolumeRecord:
        """Return it with other models."""
        return replace(self, models=models)


class Records:
    """All of them."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._records = {record.key: record for record in self._load()}

    def _load(self) -> Iterator[VolumeRecord]:
        for name in sorted(os.listdir(self._directory)):
            if not name.endswith(".json"):
                continue
            path = os.path.join(self._directory, name)
            try:
                with open(path, "rb") as file:
                    values = json.loads(file.read(_MOST))
                yield VolumeRecord(**{**values, "spec": VolumeSpec.from_json(values["spec"])})
            except (OSError, ValueError, TypeError, KeyError) as error:
                _log.warning("volume record cannot be read: path=%s cause=%s", path, error)

    def __iter__(self) -> Iterator[VolumeRecord]:
        return iter(list(self._records.values()))

    def find(self, volume_id: str, target: str) -> VolumeRecord | None:
        """Return the record of a volume at a target."""
        return self._records.get(key_of(f"{volume_id}\0{target}"))

    def of_volume(self, volume_id: str) -> list[VolumeRecord]:
        """Return the records of a volume, one per target."""
        return [record for record in self._records.values() if record.volume_id == volume_id]

    def mount_keys(self) -> set[str]:
        """Return the mounts that volumes use."""
        own = {record.mount_key for record in self._records.values()}
        models = {model["mount_key"] for record in self._records.values() for model in record.models.values()}
        return (own | models) - {""}

    def save(self, record: VolumeRecord) -> None:
        """Write a record. Raises CacheError."""
        path = os.path.join(self._directory, f"{record.key}.json")
        try:
            fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                json.dump({**asdict(record), "spec": record.spec.to_json()}, file, indent=1, sort_keys=True)
            os.rename(f"{path}.new", path)
        except OSError as error:
            raise CacheError(f"{path}: {error.strerror}") from error
        self._records[record.key] = record

    def remove(self, record: VolumeRecord) -> None:
        """Delete a record."""
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self._directory, f"{record.key}.json"))
        self._records.pop(record.key, None)
