"""What a client of a registry mirror asks for. Pure.

Decided here: which requests of the OCI distribution API (1.1) are answered, and which registry is meant: the `ns` that
containerd sends, else the mirror's default. Everything else is refused before anybody is asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

from ..errors import FormatError, UsageError
from ..registry.reference import is_repository, is_tag, parse_reference
from ..types import Digest

_PATH: Final = re.compile(
    r"\A/v2/(?P<name>[^?]{1,255})/(?P<kind>manifests|blobs)/(?P<reference>[A-Za-z0-9_.:-]{1,140})\Z"
)
_RANGE: Final = re.compile(r"\Abytes=(\d{1,15})-(\d{0,15})\Z|\Abytes=-(\d{1,15})\Z")
_HOST: Final = re.compile(r"\A[A-Za-z0-9.\[\]:-]{1,255}\Z")


@dataclass(frozen=True, slots=True)
class MirrorRequest:
    """A manifest or a blob of a registry."""

    registry: str
    repository: str
    reference: str
    """A tag, or the text of a digest."""
    is_blob: bool

    @property
    def digest(self) -> Digest | None:
        """The digest that was asked for, None for a tag."""
        return Digest(self.reference) if self.reference.startswith("sha256:") else None


def parse_request(path: str, query: str, default: str) -> MirrorRequest | None:
    """Return what a path of the API asks for, None for `/v2/` itself. Raises UsageError for what is no such request."""
    if path in {"/v2", "/v2/"}:
        return None
    match = _PATH.match(path)
    if match is None or not is_repository(match["name"]):
        raise UsageError("only GET and HEAD of manifests and blobs are answered here")
    reference, is_blob = match["reference"], match["kind"] == "blobs"
    if reference.startswith("sha256:"):
        try:
            Digest(reference)
        except FormatError as error:
            raise UsageError(str(error)) from None
    elif is_blob or not is_tag(reference):
        raise UsageError("expected a tag or a sha256 digest")
    registry = parse_registry(query, default)
    if not registry:
        raise UsageError("no registry is meant: expected ns=REGISTRY, or a mirror that was started with a default")
    parse_reference(
        f"{registry if '.' in registry or ':' in registry or registry == 'localhost' else registry + '.'}/a"
    )
    return MirrorRequest(registry, match["name"], reference, is_blob)


def parse_registry(query: str, default: str) -> str:
    """Return the registry that a query names, else the default; empty if there is none. Raises UsageError."""
    try:
        named = [value for name, value in parse_qsl(query, max_num_fields=16) if name == "ns"]
    except ValueError:
        raise UsageError("the query has too many fields") from None
    registry = (named[0] if named else default).lower()
    if registry and not _HOST.match(registry):
        raise UsageError(f"{registry[:60]!r} is no registry")
    return registry


def parse_range(text: str | None, length: int) -> tuple[int, int] | None:
    """Return (offset, length) of a Range field for a body of `length` bytes, None for all of it. Raises ValueError if it lies outside.

    What is not one range of bytes is ignored, as RFC 9110 allows.
    """
    match = _RANGE.match((text or "").strip())
    if match is None:
        return None
    if match[3]:
        size = min(int(match[3]), length)
        if not size:
            raise ValueError("an empty range")
        return length - size, size
    first = int(match[1])
    last = min(int(match[2]), length - 1) if match[2] else length - 1
    if match[2] and int(match[2]) < first:
        return None
    if first >= length:
        raise ValueError(f"a range from {first} of {length} bytes")
    return first, last - first + 1
