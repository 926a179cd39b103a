"""Manifests and indexes as JSON documents (image-spec 1.1): read, described, and indexes changed. Pure.

Used for index.json of layouts, for the referrers API and for its tag fallback. Rule: what we do not know in an index
survives our edit of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from ..errors import FormatError
from ..types import Descriptor, Digest

MANIFEST_MEDIA_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX_MEDIA_TYPE: Final = "application/vnd.oci.image.index.v1+json"
INDEX_TYPES: Final = frozenset({INDEX_MEDIA_TYPE, "application/vnd.docker.distribution.manifest.list.v2+json"})
MAX_DOCUMENT: Final = 4 << 20
"""Longest manifest or index accepted, bytes (distribution-spec: registries accept at least 4 MiB)."""
MAX_ENTRIES: Final = 20_000
ACCEPT: Final = (
    f"{MANIFEST_MEDIA_TYPE}, {INDEX_MEDIA_TYPE}, application/vnd.docker.distribution.manifest.v2+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json"
)
"""What we can be given as a manifest."""

Document = dict[str, Any]


def parse_document(data: bytes | bytearray | memoryview) -> Document:
    """Return the JSON object in `data`. Raises FormatError for anything else."""
    if len(data) > MAX_DOCUMENT:
        raise FormatError(f"JSON document of {len(data)} bytes is larger than {MAX_DOCUMENT}")
    try:
        value = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not a JSON document: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise FormatError("not a JSON object")
    return value


def parse_index(data: bytes | bytearray | memoryview) -> Document:
    """Return the index in `data`, its `manifests` a checked list of objects. Raises FormatError."""
    document = parse_document(data)
    manifests = document.get("manifests")
    if not isinstance(manifests, list) or not all(isinstance(entry, dict) for entry in manifests):
        raise FormatError("not an OCI image index: it has no list of manifests")
    if len(manifests) > MAX_ENTRIES:
        raise FormatError(f"OCI image index has {len(manifests)} entries, more than {MAX_ENTRIES}")
    return document


def new_index() -> Document:
    """Return an index without entries."""
    return {"schemaVersion": 2, "mediaType": INDEX_MEDIA_TYPE, "manifests": []}


def encode_index(index: Document) -> bytes:
    """Return the bytes of an index; the same index gives the same bytes."""
    return json.dumps(index, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def descriptor_of(entry: Mapping[str, Any]) -> Descriptor:
    """Return the descriptor in a JSON object. Raises FormatError."""
    media_type, digest, size = entry.get("mediaType"), entry.get("digest"), entry.get("size")
    if not isinstance(media_type, str) or not isinstance(digest, str):
        raise FormatError("descriptor without media type or digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
        raise FormatError("descriptor without a valid size")
    annotations = entry.get("annotations") or {}
    artifact_type = entry.get("artifactType")
    if not isinstance(annotations, dict) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in annotations.items()
    ):
        raise FormatError("descriptor with malformed annotations")
    if artifact_type is not None and not isinstance(artifact_type, str):
        raise FormatError("descriptor with a malformed artifact type")
    return Descriptor(media_type, Digest(digest), size, annotations, artifact_type or None)


def entry_of(descriptor: Descriptor) -> Document:
    """Return the JSON object of a descriptor."""
    entry: Document = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest.text,
        "size": descriptor.size,
    }
    if descriptor.artifact_type is not None:
        entry["artifactType"] = descriptor.artifact_type
    if descriptor.annotations:
        entry["annotations"] = dict(descriptor.annotations)
    return entry


def valid_descriptors(index: Document) -> Iterable[Descriptor]:
    """Yield the descriptors of an index, leaving out entries that are none (other digests, other writers' mistakes)."""
    for entry in index["manifests"]:
        try:
            yield descriptor_of(entry)
        except FormatError:
            continue


def of_platform(index: Document, platform: str) -> Descriptor:
    """Return the manifest of an index for a platform, `os/architecture[/variant]`; one that names no platform is for all.

    Raises FormatError, naming those that there are.
    """
    wanted = platform.split("/")
    named: list[str] = []
    anything = None
    for entry in index["manifests"]:
        said = entry.get("platform")
        if not isinstance(said, dict):
            anything = anything or entry
            continue
        parts = [str(said.get(key) or "") for key in ("os", "architecture", "variant")]
        named.append("/".join(filter(None, parts)))
        if parts[: len(wanted)] == wanted:
            return descriptor_of(entry)
    if anything is not None:
        return descriptor_of(anything)
    raise FormatError(f"the index has nothing for platform {platform}, only {', '.join(named[:20]) or 'nothing'}")


def describe_manifest(data: bytes, media_type: str) -> Descriptor:
    """Return the descriptor under which a manifest is listed as a referrer: with artifact type and annotations.

    distribution-spec 1.1: the artifact type is the manifest's own, else its config's media type.
    """
    artifact_type: str | None = None
    annotations: dict[str, str] = {}
    try:
        document = parse_document(data)
    except FormatError:
        document = {}
    config = document.get("config")
    for candidate in (document.get("artifactType"), config.get("mediaType") if isinstance(config, dict) else None):
        if isinstance(candidate, str) and candidate:
            artifact_type = candidate
            break
    found = document.get("annotations")
    if isinstance(found, dict):
        annotations = {k: v for k, v in found.items() if isinstance(v, str)}
    return Descriptor(media_type, Digest.of(data), len(data), annotations, artifact_type)


def subject_of(document: Document) -> str | None:
    """Return the digest text of a manifest's subject, if it has one."""
    subject = document.get("subject")
    digest = subject.get("digest") if isinstance(subject, dict) else None
    return digest if isinstance(digest, str) else None


def without(index: Document, drop: Callable[[Document], bool]) -> Document:
    """Return the index without the entries for which `drop` is true."""
    return {**index, "manifests": [entry for entry in index["manifests"] if not drop(entry)]}


def with_entry(index: Document, entry: Document) -> Document:
    """Return the index with `entry` at its end."""
    return {**index, "manifests": [*index["manifests"], entry]}


def media_type_inside(data: bytes) -> str:
    """Return the media type that a manifest gives itself, or an empty text."""
    try:
        value = parse_document(data).get("mediaType")
    except FormatError:
        return ""
    return value if isinstance(value, str) else ""


def referrers_tag(digest: Digest) -> str:
    """Return the tag under which the fallback keeps the referrers of a manifest (distribution-spec 1.1)."""
    return f"sha256-{digest.hex}"
