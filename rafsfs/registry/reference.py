"""What a user writes to name an image: `host[:port]/repo[:tag][@digest]` or `oci:DIR[:TAG][@digest]`.

Decided here: the grammar (that of docker, but a registry host is always written out, because guessing one sends
credentials and models to the wrong place). Pure: no file and no network is looked at. Rule: `parse_reference(str(r)) == r`.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass, replace
from typing import Final, Literal

from ..errors import FormatError, UsageError
from ..net.origin import is_loopback
from ..types import Digest

DEFAULT_TAG: Final = "latest"
_FORM: Final = "expected host[:port]/repository[:tag][@sha256:...] or oci:DIR[:TAG]"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST: Final = re.compile(rf"\A(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::([0-9]{{1,5}}))?\Z")
_COMPONENT: Final = re.compile(r"\A[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*\Z")
_TAG: Final = re.compile(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_DIGEST_SUFFIX: Final = re.compile(r"@(sha256:[0-9a-f]{64})\Z")
_MAX_REPOSITORY: Final = 255


@dataclass(frozen=True, slots=True)
class Reference:
    """One image, by name."""

    kind: Literal["registry", "oci"]
    registry: str = ""
    """`host[:port]`; empty for a layout."""
    repository: str = ""
    tag: str | None = None
    digest: Digest | None = None
    path: str = ""
    """The layout's directory as written (not made absolute); empty for a registry."""

    @property
    def reference(self) -> str:
        """What to ask the store for: the digest if there is one, else the tag, else `latest`."""
        if self.digest is not None:
            return self.digest.text
        return self.tag or DEFAULT_TAG

    @property
    def store_name(self) -> str:
        """How messages call the store: `host:port/repository` or `oci:DIR`."""
        return f"oci:{self.path}" if self.kind == "oci" else f"{self.registry}/{self.repository}"

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is on this machine, where plain HTTP is the default."""
        host = re.sub(r":[0-9]+\Z", "", self.registry).strip("[]")
        return self.kind == "registry" and is_loopback(host)

    def with_digest(self, digest: Digest) -> Reference:
        """Return the same reference pinned to a digest."""
        return replace(self, digest=digest)

    def absolute(self) -> Reference:
        """Return the same reference with the layout's directory made absolute, to hand to another process."""
        return replace(self, path=os.path.abspath(self.path)) if self.kind == "oci" else self

    def __str__(self) -> str:
        text = self.store_name
        if self.tag is not None:
            text += f":{self.tag}"
        if self.digest is not None:
            text += f"@{self.digest}"
        return text


def parse_reference(text: str) -> Reference:
    """Parse a reference. Raises UsageError saying what is wrong and what form is expected."""
    shown = repr(text[:200])
    if not text or text != text.strip() or not text.isprintable():
        raise UsageError(f"reference {shown} is empty or has blanks or control characters in it; {_FORM}")
    digest = None
    rest = text
    if match := _DIGEST_SUFFIX.search(text):
        digest, rest = Digest(match[1]), text[: match.start()]
    if rest.startswith("oci:"):
        return _parse_layout(rest[4:], digest, shown)
    if "://" in rest:
        raise UsageError(f"reference {shown} is written as a URL; leave out the part up to '://': {_FORM}")
    if "@" in rest:
        raise UsageError(f"reference {shown} has a malformed digest; expected @sha256: and 64 lower-case hex digits")
    return _parse_registry(rest, digest, shown)


def is_tag(text: str) -> bool:
    """Tell whether `text` can be a tag."""
    return _TAG.match(text) is not None


def is_repository(text: str) -> bool:
    """Tell whether `text` can be a repository name."""
    return len(text) <= _MAX_REPOSITORY and all(_COMPONENT.match(part) for part in text.split("/"))


def parse_digest_or_tag(text: str) -> Digest | str:
    """Return what the `reference` argument of a store method means. Raises UsageError."""
    if text.startswith("sha256:"):
        try:
            return Digest(text)
        except FormatError as error:
            raise UsageError(str(error)) from None
    if not is_tag(text):
        raise UsageError(f"{text[:150]!r} is neither a tag nor a digest")
    return text


def _parse_layout(rest: str, digest: Digest | None, shown: str) -> Reference:
    # What follows the last colon is a tag if it can be one; a directory named like `a:b` is written with a tag after it.
    path, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        path, tag = rest, ""
    elif not is_tag(tag):
        raise UsageError(f"reference {shown} has a malformed tag {tag[:50]!r}; {_FORM}")
    if not path:
        raise UsageError(f"reference {shown} names no directory; {_FORM}")
    return Reference("oci", path=path, tag=tag or None, digest=digest)


def _parse_registry(rest: str, digest: Digest | None, shown: str) -> Reference:
    host, slash, remainder = rest.partition("/")
    if not slash or not (host == "localhost" or any(c in host for c in ".:")):
        raise UsageError(
            f"reference {shown} does not begin with a registry host; {_FORM}, like localhost:5000/model:v1"
        )
    match = _HOST.match(host)
    if match is None or (match[1] is not None and not 0 < int(match[1]) < 65536):
        raise UsageError(f"reference {shown} has a malformed registry host {host[:100]!r}; {_FORM}")
    repository, colon, tag = remainder.partition(":")
    if not is_repository(repository):
        raise UsageError(
            f"reference {shown} has a malformed repository name {repository[:100]!r}; expected lower-case letters, digits "
            "and single . _ - between them, in parts divided by /"
        )
    if colon and not is_tag(tag):
        raise UsageError(f"reference {shown} has a malformed tag {tag[:50]!r}; {_FORM}")
    return Reference("registry", registry=host.lower(), repository=repository, tag=tag or None, digest=digest)
