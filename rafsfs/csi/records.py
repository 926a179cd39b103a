"""What volumes there are on this node, on disk: one file per published volume, replaced as a whole. No secrets.

Decided here: names, the order of writing, and how drivers of different versions read each other's records. Rules: a record is written
before anything is mounted for it and removed after everything has been taken away, so whatever a crash leaves behind is named by a
record. A format only ever gains keys: an older driver passes over what it does not know, a newer one takes the default for what is
missing. While a record cannot be read at all, no mount counts as unused (`is_whole`), since pods may read through it. Blocking, small.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from ..errors import CacheError
from .volume import VolumeSpec, key_of

_log = logging.getLogger(__name__)

FORMAT: Final = 2
"""Of the records that are written. 1, until 0.1.0, did not say so, and is else the same."""
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
    exclusive: bool = False
    """Whether it may be at one target only."""

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
        self._unreadable: set[str] = set()
        self._records = {record.key: record for record in self._load()}

    @property
    def is_whole(self) -> bool:
        """Whether every record could be read, so that a mount that none names is unused."""
        return not self._unreadable

    def _load(self) -> Iterator[VolumeRecord]:
        for name in sorted(os.listdir(self._directory)):
            if not name.endswith(".json"):
                continue
            path = os.path.join(self._directory, name)
            try:
                with open(path, "rb") as file:
                    values = json.loads(file.read(_MOST))
                yield parse_record(values)
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                self._unreadable.add(name.removesuffix(".json"))
                _log.warning("volume record cannot be read, all mounts are kept: path=%s cause=%s", path, error)

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

    def users_of(self, key: str) -> list[VolumeRecord]:
        """Return the volumes that use a mount, by themselves or by a model."""
        return [
            record
            for record in self._records.values()
            if record.mount_key == key or any(model["mount_key"] == key for model in record.models.values())
        ]

    def is_unused(self, key: str) -> bool:
        """Tell whether a mount can go: no volume names it, and none could that cannot be read."""
        return self.is_whole and key not in self.mount_keys()

    def save(self, record: VolumeRecord) -> None:
        """Write a record. Raises CacheError."""
        path = os.path.join(self._directory, f"{record.key}.json")
        try:
            fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                values = {"format": FORMAT, **asdict(record), "spec": record.spec.to_json()}
                json.dump(values, file, indent=1, sort_keys=True)
            os.rename(f"{path}.new", path)
        except OSError as error:
            raise CacheError(f"{path}: {error.strerror}") from error
        self._records[record.key] = record
        self._unreadable.discard(record.key)

    def remove(self, volume_id: str, target: str) -> None:
        """Delete the record of a volume at a target, also one that could not be read; none is fine."""
        key = key_of(f"{volume_id}\0{target}")
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self._directory, f"{key}.json"))
        self._records.pop(key, None)
        self._unreadable.discard(key)


def parse_record(values: dict[str, Any]) -> VolumeRecord:
    """Return the record that a driver of any version wrote. Raises KeyError, TypeError, ValueError for what is none. Pure."""
    known = {one.name for one in fields(VolumeRecord)}
    taken = {key: value for key, value in values.items() if key in known}
    record = VolumeRecord(**{**taken, "spec": VolumeSpec.from_json(values["spec"])})
    if not isinstance(record.exclusive, bool):
        raise TypeError("exclusive is neither true nor false")
    texts = (record.volume_id, record.target, record.digest, record.mount_key)
    tables = (record.pod, record.models, *record.models.values())
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(table, dict) for table in tables):
        raise TypeError("a field is of another kind")
    for model in record.models.values():
        VolumeSpec.from_json(model["spec"])
        if not isinstance(model["digest"], str) or not isinstance(model["mount_key"], str):
            raise TypeError("a model's field is of another kind")
    return record
