"""The OCI manifest of an image: which layer is what, and the config that says which readers can read it.

Decided here: media types, the order of layers (bootstrap, chunk map, blobs), the config's fields, how newer versions are refused.
Rule: the same parts give the same bytes. Specification: docs/format/oci.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import FormatError, UnsupportedError
from ..types import Descriptor, Digest

ARTIFACT_TYPE: Final = "application/vnd.rafs.image.v1"
MEDIA_TYPE_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
MEDIA_TYPE_CONFIG: Final = "application/vnd.rafs.image.config.v1+json"
MEDIA_TYPE_BOOTSTRAP: Final = "application/vnd.rafs.bootstrap.v1.erofs+zstd"
MEDIA_TYPE_CHUNK_MAP: Final = "application/vnd.rafs.chunkmap.v1"
MEDIA_TYPE_BLOB: Final = "application/vnd.rafs.blob.v1"
UNCOMPRESSED_SIZE: Final = "vnd.rafs.uncompressed-size"
"""Annotation of the bootstrap layer: its size after decompression, bytes, decimal."""

XATTRS: Final = "vnd.rafs.xattrs"
"""Annotation of the manifest: `none` if no file has extended attributes, so that a mount need not be asked for any."""

FROM: Final = "vnd.rafs.from"
"""Annotation of a blob layer: the image, earlier than this one, that it was found in."""
FEATURE_DELTA: Final = "delta"
"""Chunks stored as differences (codec 3), base spaces."""

VERSION: Final = 1
MAX_MANIFEST: Final = 4 << 20
MAX_CONFIG: Final = 1 << 20
MAX_BOOTSTRAP: Final = 1 << 30
"""Largest bootstrap, uncompressed: about 4 million files."""
_FEATURES: Final = frozenset({FEATURE_DELTA})
"""Names in the config's `requires` that this program reads."""


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The config blob: what an image holds, in figures. Informative but for version and requires."""

    files: int
    data_bytes: int
    stored_bytes: int
    requires: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Return the config blob."""
        return _json(
            {
                "version": VERSION,
                "requires": list(self.requires),
                "files": self.files,
                "data_bytes": self.data_bytes,
                "stored_bytes": self.stored_bytes,
            }
        )


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """A parsed manifest."""

    digest: Digest
    """Of the manifest's own bytes: the image's name for ever."""
    config: Descriptor
    bootstrap: Descriptor
    bootstrap_size: int
    """Bytes of the bootstrap after decompression."""
    chunk_map: Descriptor
    blobs: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_xattrs(self) -> bool:
        """Whether some file may have extended attributes."""
        return self.annotations.get(XATTRS) != "none"


def encode_manifest(
    *,
    config: Descriptor,
    bootstrap: Descriptor,
    chunk_map: Descriptor,
    blobs: Sequence[Descriptor],
    annotations: Mapping[str, str] | None = None,
) -> bytes:
    """Return the bytes of a manifest. Raises FormatError if registries would not take it."""
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MEDIA_TYPE_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": _descriptor_json(config),
        "layers": [_descriptor_json(layer) for layer in (bootstrap, chunk_map, *blobs)],
    }
    if annotations:
        manifest["annotations"] = dict(sorted(annotations.items()))
    data = _json(manifest)
    if len(data) > MAX_MANIFEST:
        raise FormatError(f"manifest of {len(data)} bytes lists {len(blobs)} blobs; use larger data spaces")
    return data


def parse_manifest(data: bytes) -> ImageManifest:
    """Parse a manifest. Raises FormatError saying what it is if it is not a RAFS image, UnsupportedError if newer."""
    if len(data) > MAX_MANIFEST:
        raise FormatError(f"manifest of {len(data)} bytes, at most {MAX_MANIFEST}")
    manifest = _object(data, "manifest")
    _check_kind(manifest)
    layers = manifest.get("layers")
    if not isinstance(layers, list) or len(layers) < 2:
        raise FormatError("manifest has no bootstrap and chunk map layers")
    bootstrap, chunk_map, *blobs = [_descriptor(layer) for layer in layers]
    expected = [MEDIA_TYPE_BOOTSTRAP, MEDIA_TYPE_CHUNK_MAP, *[MEDIA_TYPE_BLOB] * len(blobs)]
    found = [layer.media_type for layer in (bootstrap, chunk_map, *blobs)]
    for number, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        if got != wanted:
            raise UnsupportedError(f"layer {number} of the manifest is {got[:100]}, expected {wanted}; upgrade rafs")
    size_text = bootstrap.annotations.get(UNCOMPRESSED_SIZE, "")
    if not size_text.isdecimal() or len(size_text) > 12 or not 0 < int(size_text) <= MAX_BOOTSTRAP:
        raise FormatError(f"manifest says the bootstrap has {size_text[:20]!r} bytes, expected 1 to {MAX_BOOTSTRAP}")
    annotations = manifest.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise FormatError("manifest has annotations that are not an object")
    config = _descriptor(manifest.get("config"))
    return ImageManifest(Digest.of(data), config, bootstrap, int(size_text), chunk_map, tuple(blobs), annotations)


def parse_config(data: bytes) -> ImageConfig:
    """Parse the config blob. Raises UnsupportedError for a newer version or a feature unknown here."""
    config = _object(data, "image config")
    version = config.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(f"image config has version {version!r}")
    requires = config.get("requires", [])
    if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
        raise FormatError("image config has a `requires` that is not a list of names")
    unknown = [name[:40] for name in requires if name not in _FEATURES]
    if version > VERSION:
        raise UnsupportedError(f"the image has format version {version}, this program reads {VERSION}; upgrade rafs")
    if unknown:
        raise UnsupportedError(f"the image needs {', '.join(unknown)}, unknown to this program; upgrade rafs")
    figures = []
    for name in ("files", "data_bytes", "stored_bytes"):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
            raise FormatError(f"image config has {name} {value!r}")
        figures.append(value)
    return ImageConfig(figures[0], figures[1], figures[2], tuple(requires))


def _check_kind(manifest: dict[str, Any]) -> None:
    kind = manifest.get("artifactType")
    if kind == ARTIFACT_TYPE:
        return
    if isinstance(kind, str) and kind.startswith("application/vnd.rafs.image."):
        raise UnsupportedError(f"the image is {kind[:100]}, this program reads {ARTIFACT_TYPE}; upgrade rafs")
    config = manifest.get("config")
    media_type = config.get("mediaType") if isinstance(config, dict) else None
    if "manifests" in manifest:
        what = "an index of several manifests"
    elif kind:
        what = f"an artifact of type {str(kind)[:100]}"
    elif isinstance(media_type, str) and ("docker.container" in media_type or "oci.image.config" in media_type):
        what = "an ordinary container image"
    else:
        what = f"something with config {str(media_type)[:100]}"
    raise FormatError(f"not a RAFS image but {what}; build one with `rafs build`")


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not JSON") from error
    if not isinstance(found, dict):
        raise FormatError(f"{what} is not a JSON object")
    return found


def _descriptor(entry: object) -> Descriptor:
    if not isinstance(entry, dict):
        raise FormatError("manifest has a descriptor that is not an object")
    media_type, digest, size = entry.get("mediaType"), entry.get("digest"), entry.get("size")
    annotations = entry.get("annotations") or {}
    if (
        not isinstance(media_type, str)
        or not isinstance(digest, str)
        or not isinstance(size, int)
        or isinstance(size, bool)
        or not 0 <= size < 1 << 62
        or not isinstance(annotations, dict)
        or not all(isinstance(value, str) for value in annotations.values())
    ):
        raise FormatError("manifest has a descriptor without a proper media type, digest or size")
    return Descriptor(media_type, Digest(digest), size, annotations)


def _descriptor_json(descriptor: Descriptor) -> dict[str, Any]:
    found: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": str(descriptor.digest),
        "size": descriptor.size,
    }
    if descriptor.annotations:
        found["annotations"] = dict(sorted(descriptor.annotations.items()))
    return found


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
