"""What both stores share about manifests: bounds, media types, and the referrers index of the tag-schema fallback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from ..errors import FormatError
from ..types import Descriptor, Digest

MANIFEST_LIMIT: Final = 4 << 20
"""Largest manifest, bytes: what the distribution spec asks registries to accept."""

MEDIA_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
MEDIA_INDEX: Final = "application/vnd.oci.image.index.v1+json"
ACCEPT: Final = (
    f"{MEDIA_MANIFEST}, {MEDIA_INDEX}, application/vnd.docker.distribution.manifest.v2+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json"
)


def referrers_tag(digest: Digest) -> str:
    """Return the tag under which the fallback keeps the referrers of a manifest (distribution-spec 1.1)."""
    return f"sha256-{digest.hex}"


def media_type_of(data: bytes) -> str:
    """Return the media type that a manifest says it has, the OCI manifest type if it says nothing."""
    try:
        found = json.loads(data).get("mediaType")
    except (ValueError, AttributeError):
        return MEDIA_MANIFEST
    return found if isinstance(found, str) else MEDIA_MANIFEST


def parse_index(data: bytes, artifact_type: str | None = None) -> Iterator[Descriptor]:
    """Yield the descriptors of an index, of one artifact type if given. Raises FormatError."""
    try:
        entries = json.loads(data)["manifests"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError("referrers index is not an OCI index") from error
    if not isinstance(entries, list):
        raise FormatError("referrers index is not an OCI index")
    for entry in entries:
        descriptor = parse_descriptor(entry)
        if artifact_type is None or descriptor.artifact_type == artifact_type:
            yield descriptor


def parse_descriptor(entry: object) -> Descriptor:
    """Check and convert a descriptor object. Raises FormatError."""
    if not isinstance(entry, dict):
        raise FormatError("descriptor is not an object")
    media_type, digest, size = entry.get("mediaType"), entry.get("digest"), entry.get("size")
    annotations = entry.get("annotations") or {}
    artifact_type = entry.get("artifactType")
    if (
        not isinstance(media_type, str)
        or not isinstance(digest, str)
        or not isinstance(size, int)
        or isinstance(size, bool)
        or not 0 <= size < 1 << 62
        or not isinstance(annotations, dict)
        or not all(isinstance(key, str) and isinstance(value, str) for key, value in annotations.items())
        or not (artifact_type is None or isinstance(artifact_type, str))
    ):
        raise FormatError("descriptor lacks a media type, digest or size, or has one of the wrong kind")
    return Descriptor(media_type, Digest(digest), size, annotations, artifact_type)


def descriptor_json(descriptor: Descriptor) -> dict[str, Any]:
    """Return a descriptor as the JSON object of the image spec."""
    found: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": str(descriptor.digest),
        "size": descriptor.size,
    }
    if descriptor.artifact_type:
        found["artifactType"] = descriptor.artifact_type
    if descriptor.annotations:
        found["annotations"] = dict(sorted(descriptor.annotations.items()))
    return found


def extend_index(existing: bytes | None, descriptor: Descriptor) -> bytes:
    """Return a referrers index with `descriptor` in it, once."""
    known = list(parse_index(existing)) if existing else []
    if all(entry.digest != descriptor.digest for entry in known):
        known.append(descriptor)
    index = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": [descriptor_json(entry) for entry in known]}
    return json.dumps(index, sort_keys=True, separators=(",", ":")).encode()


def descriptor_of_manifest(data: bytes, media_type: str) -> Descriptor:
    """Return the descriptor by which a referrers index lists this manifest: with its artifact type and annotations."""
    artifact_type: str | None = None
    annotations: dict[str, str] = {}
    try:
        manifest = json.loads(data)
        artifact_type = manifest.get("artifactType") or (manifest.get("config") or {}).get("mediaType")
        annotations = manifest.get("annotations") or {}
    except (ValueError, AttributeError):
        pass
    return Descriptor(media_type, Digest.of(data), len(data), annotations, artifact_type)
