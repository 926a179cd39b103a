"""What makes two downloads the same file: its URL, the version that the server names, its length. Pure. docs/protocol/get.md.

Decided here: what of a URL counts, which validators are strong enough to tell versions apart, when a URL is private, what a file may be
called. Rules: two versions of a file never have one key; a key tells nobody the URL, and cannot be made by who knows the URL alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import unquote, unquote_to_bytes

from blake3 import blake3

from ..net.origin import Target

_CONTEXT: Final = "rafs.file.v1 2026-11 url version length secret"
_UNRESERVED: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})")
_SETTLED_S: Final = 60.0
"""A Last-Modified at least this much older than the answer names one version (RFC 9110 §8.8.2.2): it counts whole seconds, and the
clocks behind one name differ."""
_SIGNED: Final = re.compile(
    r"\A(x-(amz|goog|oss|cos|ms)-.*|.*sig(nature)?|.*token|.*secret|.*password|.*api[_-]?key|.*auth.*|.*credential.*|policy|expires|"
    r"key-pair-id|awsaccesskeyid|googleaccessid|se|sp|sv|sr)\Z",
    re.IGNORECASE,
)
"""Names of query parameters that carry rights: of signed URLs of the large stores, and what access tokens are called."""
SAMPLE_BYTES: Final = 16 << 10
_SAMPLES: Final = 4
_MAX_NAME: Final = 255
"""Bytes of a name that file systems take."""


@dataclass(frozen=True, slots=True)
class Validator:
    """What a server says that changes with every version of a file."""

    name: str
    """`etag` or `last-modified`."""
    value: str


def normalise(target: Target, ignored: Iterable[str] = ()) -> str:
    """Return the URL that counts: lower-case host, no default port, dot segments resolved, escapes in one form, parameters named in
    `ignored` (`*`: all) left out. The order of parameters counts.
    """
    path, mark, query = target.path.partition("?")
    segments: list[str] = []
    for segment in _escapes(path).split("/")[1:]:
        if segment == "..":
            del segments[-1:]
        elif segment != ".":
            segments.append(segment)
    if _escapes(path).endswith(("/.", "/..")):
        segments.append("")
    unwanted = set(ignored)
    kept = [
        part
        for part in (_escapes(query).split("&") if mark else [])
        if "*" not in unwanted and unquote(part.partition("=")[0]) not in unwanted
    ]
    return f"{target.origin}/{'/'.join(segments)}" + (f"?{'&'.join(kept)}" if kept else "")


def _escapes(text: str) -> str:
    """Return text with escapes of harmless characters undone and the others in capitals."""

    def one(match: re.Match[str]) -> str:
        code = int(match[1], 16)
        return chr(code) if code in _UNRESERVED else f"%{match[1].upper()}"

    return _ESCAPE.sub(one, text)


def strong_validator(etag: str | None, last_modified: str | None, date: str | None) -> Validator | None:
    """Return what tells versions apart byte by byte, None if the server names nothing that does."""
    if etag is not None and re.fullmatch(r'"[\x21\x23-\x7e\x80-\xff]{1,1024}"', etag.strip()):
        return Validator("etag", etag.strip())
    try:
        changed, now = parsedate_to_datetime(last_modified or ""), parsedate_to_datetime(date or "")
        settled = (now - changed).total_seconds() >= _SETTLED_S
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return Validator("last-modified", (last_modified or "").strip()) if settled else None


def file_key(url: str, validator: Validator, length: int, secret: bytes = b"") -> bytes:
    """Return the key of a version of a file, 32 bytes. `url` as `normalise` returns it; `secret`: of a private file, what its server
    gave of its content.
    """
    hasher = blake3(derive_key_context=_CONTEXT)
    for field in (url, validator.name, validator.value, str(length)):
        data = field.encode("utf-8", "surrogateescape")
        hasher.update(len(data).to_bytes(8, "big") + data)
    return hasher.update(secret).digest()


def why_private(target: Target, *, credentials: bool, cache_control: str | None) -> str:
    """Return why a file is not for everybody, empty if nothing says so."""
    if credentials:
        return "credentials are sent for it"
    for part in target.path.partition("?")[2].split("&"):
        name = unquote(part.partition("=")[0])
        if name and _SIGNED.match(name):
            return f"its query has {name[:40]!r}, which looks like a right to read"
    words = {word.partition("=")[0].strip().lower() for word in (cache_control or "").split(",")}
    if words & {"private", "no-store"}:
        return "its server says that it is not to be shared (Cache-Control)"
    return ""


def sample_extents(length: int) -> list[tuple[int, int]]:
    """Return (offset, length) of what is read of a private file to prove that its server lets one: spread over all of it."""
    size = min(SAMPLE_BYTES, length)
    return sorted({((length - size) * number // (_SAMPLES - 1), size) for number in range(_SAMPLES)})


def file_name(target: Target, disposition: str | None) -> str:
    """Return what to call the file: the last part of the URL, else what the server proposes; empty if neither can be used."""
    last = target.path.partition("?")[0].rpartition("/")[2]
    name = unquote_to_bytes(last).decode("utf-8", "surrogateescape")
    if is_name(name):
        return name
    message = Message()
    message["content-disposition"] = (disposition or "")[:4096].replace("\n", " ").replace("\r", " ")
    try:
        proposed = message.get_filename("") or ""
    except (ValueError, LookupError, UnicodeError):
        return ""
    proposed = re.split(r"[/\\]", proposed)[-1]
    return proposed if is_name(proposed) else ""


def is_name(name: str) -> bool:
    """Tell whether a name is one component that stays in its directory and can be printed."""
    try:
        size = len(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return 0 < size <= _MAX_NAME and name not in {".", ".."} and "/" not in name and shown.isprintable()


def parse_headers(lines: Sequence[str]) -> dict[str, str]:
    """Return the fields of `Name: value` lines. Raises ValueError, which holds no value."""
    found: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}", name.strip()):
            raise ValueError(f"header {name[:20]!r} is not of the form NAME: VALUE")
        if not re.fullmatch(r"[\t\x20-\x7e\x80-\xff]{0,8192}", value):
            raise ValueError(f"the value of header {name.strip()!r} holds what cannot be sent")
        if name.strip().lower() in {
            "host",
            "range",
            "if-range",
            "connection",
            "accept-encoding",
            "transfer-encoding",
            "content-length",
        }:
            raise ValueError(f"header {name.strip()!r} is set by rafs itself")
        found[name.strip()] = value.strip()
    return found
