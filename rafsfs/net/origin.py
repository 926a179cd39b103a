"""URLs taken apart: origins, loopback, and how a URL may be shown.

Decided here: what counts as the same origin (who may see credentials) and what counts as loopback (where plain
HTTP is fine). Pure. Rule: whatever goes into a message or a log passes through `public_url`, because queries of
object-storage URLs are signatures.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlencode, urljoin, urlsplit

_HOST: Final = re.compile(r"\A[A-Za-z0-9._-]{1,255}\Z")
_SAFE: Final = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in '"<>\\^`{|}#')
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
MAX_URL: Final = 16 << 10
"""Longest URL accepted, characters: signed storage URLs reach 2-4 KiB."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port of a URL (RFC 6454): the unit to which credentials and connections belong."""

    scheme: str
    host: str
    """Lower-case name or address, IPv6 without brackets."""
    port: int

    @property
    def is_tls(self) -> bool:
        """Whether bytes to this origin are encrypted."""
        return self.scheme == "https"

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine."""
        return is_loopback(self.host)

    @property
    def netloc(self) -> str:
        """`host[:port]` as a Host header wants it: the default port is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}"


@dataclass(frozen=True, slots=True)
class Target:
    """An origin and what to ask of it."""

    origin: Origin
    path: str
    """Path and query as they go on the wire; begins with `/`."""

    @property
    def url(self) -> str:
        """The absolute URL."""
        return f"{self.origin}{self.path}"

    def with_query(self, parameters: Sequence[tuple[str, str]]) -> Target:
        """Return the target with query parameters added to those it has."""
        joiner = "&" if "?" in self.path else "?"
        return Target(self.origin, self.path + joiner + urlencode(parameters))

    def __str__(self) -> str:
        return public_url(self.url)


def parse_url(url: str) -> Target:
    """Take an absolute http(s) URL apart. Raises ValueError (one line, no secret) for anything else."""
    if len(url) > MAX_URL:
        raise ValueError(f"URL of {len(url)} characters is longer than {MAX_URL}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError(f"URL scheme {parts.scheme[:20]!r} is neither http nor https")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL with a user name or password in it is refused")
    host = (parts.hostname or "").lower()
    if not _HOST.match(host) and not _is_ipv6(host):
        raise ValueError(f"URL host {host[:100]!r} is not a host name or address")
    path = quote(parts.path or "/", safe=_SAFE)
    if not path.startswith("/"):
        path = "/" + path
    if parts.query:
        path += "?" + quote(parts.query, safe=_SAFE)
    return Target(Origin(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme]), path)


def resolve_url(base: Target, location: str) -> Target:
    """Resolve a Location header, relative or absolute, against the URL that answered it. Raises ValueError."""
    if len(location) > MAX_URL:
        raise ValueError(f"Location of {len(location)} characters is longer than {MAX_URL}")
    try:
        joined = urljoin(base.url, location)
    except ValueError as error:
        raise ValueError(f"Location is not a URL: {error}") from None
    return parse_url(joined)


def public_url(url: str) -> str:
    """Return `url` fit for a message: without query, fragment and user information, of bounded length."""
    bare = re.split(r"[?#]", url[: MAX_URL + 1], maxsplit=1)[0]
    bare = re.sub(r"\A([A-Za-z][A-Za-z0-9+.-]*://)[^/]*@", r"\1", bare)
    shown = "".join(c if c.isprintable() else "?" for c in bare)
    return shown if len(shown) <= 300 else shown[:297] + "..."


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine: localhost, 127.0.0.0/8, ::1."""
    if host.lower() in {"localhost", "localhost."}:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return "%" not in host
