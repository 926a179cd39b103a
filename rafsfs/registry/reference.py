"""References: `host[:port]/repository[:tag][@digest]` and `oci:DIR[:TAG]`. Pure parsing and printing."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from ..errors import FormatError, UsageError
from ..types import Digest

_HOST = re.compile(r"\A(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::\d{1,5})?\Z")
_REPOSITORY = re.compile(r"\A[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")
_TAG = re.compile(r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_FORMS = "expected host[:port]/repository[:tag][@sha256:digest] or oci:DIR[:TAG]"


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference. `kind` is "registry" or "oci"."""

    kind: str
    registry: str
    """host[:port]; empty for a layout."""
    repository: str
    tag: str | None
    digest: Digest | None
    path: str
    """Directory of a layout; empty for a registry."""

    @property
    def reference(self) -> str:
        """What to ask the store for: the digest if there is one, else the tag, else `latest`."""
        return str(self.digest) if self.digest else self.tag or "latest"

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is on this machine, where plain HTTP is the default."""
        host = self.registry.rsplit(":", 1)[0] if not self.registry.endswith("]") else self.registry
        host = host.strip("[]")
        if host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def with_digest(self, digest: Digest) -> Reference:
        """Return this reference pinned to a digest."""
        return Reference(self.kind, self.registry, self.repository, self.tag, digest, self.path)

    def __str__(self) -> str:
        base = f"oci:{self.path}" if self.kind == "oci" else f"{self.registry}/{self.repository}"
        return base + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def parse_reference(text: str) -> Reference:
    """Parse a reference. Raises UsageError with the forms that are understood."""
    digest: Digest | None = None
    rest = text
    if "@" in rest:
        rest, _, digest_text = rest.rpartition("@")
        try:
            digest = Digest(digest_text)
        except FormatError as error:
            raise UsageError(f"reference {text[:200]!r}: {error}") from error
    if rest.startswith("oci:"):
        return _parse_layout(text, rest[4:], digest)
    host, slash, name = rest.partition("/")
    if not slash or not (host == "localhost" or any(sign in host for sign in ".:[")):
        raise UsageError(f"reference {text[:200]!r} names no registry host; {_FORMS}")
    tag: str | None = None
    if ":" in name:
        name, _, tag = name.rpartition(":")
    if (
        not _HOST.match(host)
        or not _REPOSITORY.match(name)
        or len(name) > 255
        or (tag is not None and not _TAG.match(tag))
    ):
        raise UsageError(f"reference {text[:200]!r} is malformed; {_FORMS} (repositories are lower case)")
    return Reference("registry", host, name, tag, digest, "")


def _parse_layout(text: str, rest: str, digest: Digest | None) -> Reference:
    path, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        path, tag = rest, ""
    if not path or (tag and not _TAG.match(tag)):
        raise UsageError(f"reference {text[:200]!r} is malformed; {_FORMS}")
    return Reference("oci", "", "", tag or None, digest, path)
