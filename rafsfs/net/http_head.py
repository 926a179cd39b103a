"""Heads of HTTP/1.1 responses, and how they frame the body. Pure.

Decided here: what a response head may look like: bounds, no folding, no conflicting lengths. Any bytes give a value or
a ProtocolError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

MAX_HEAD: Final = 64 << 10
"""Longest response head, bytes: token challenges and signed redirects stay far below."""
MAX_FIELDS: Final = 256

_STATUS: Final = re.compile(rb"\AHTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?\Z")
_NAME: Final = re.compile(rb"\A[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}\Z")
_NUMBER: Final = re.compile(r"\A[0-9]{1,18}\Z")


class ProtocolError(Exception):
    """The other side does not speak HTTP/1.1 as we accept it; `str()` says what is wrong with it."""


class Headers:
    """Header fields in order; names are matched without case."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Sequence[tuple[str, str]]) -> None:
        self._fields = tuple((name.lower(), value) for name, value in fields)

    def get(self, name: str) -> str | None:
        """Return the first field of that name, or None."""
        return next(self._matching(name), None)

    def get_all(self, name: str) -> list[str]:
        """Return all fields of that name, in order."""
        return list(self._matching(name))

    def _matching(self, name: str) -> Iterator[str]:
        wanted = name.lower()
        return (value for key, value in self._fields if key == wanted)


@dataclass(frozen=True, slots=True)
class Head:
    """A parsed response head."""

    status: int
    keep_alive: bool
    chunked: bool
    length: int | None
    """Content-Length, bytes; None if not said (chunked, or until the connection ends)."""
    headers: Headers


def parse_head(data: bytes | bytearray | memoryview) -> Head:
    """Parse a response head, without the empty line that ends it. Raises ProtocolError."""
    lines = bytes(data).split(b"\r\n")
    status_line = _STATUS.match(lines[0])
    if status_line is None:
        raise ProtocolError(f"the answer does not begin like HTTP/1.1: {lines[0][:40]!r}")
    if len(lines) - 1 > MAX_FIELDS:
        raise ProtocolError(f"the answer has more than {MAX_FIELDS} header fields")
    headers = Headers([_parse_field(line) for line in lines[1:]])
    chunked = _is_chunked(headers)
    options = {word.strip().lower() for value in headers.get_all("connection") for word in value.split(",")}
    minor = status_line[1]
    keep_alive = "close" not in options and (minor == b"1" or "keep-alive" in options)
    length = _content_length(headers)
    if chunked and length is not None:
        # Two framings at once is how requests are smuggled: read by chunks, then never use the connection again.
        length, keep_alive = None, False
    return Head(int(status_line[2]), keep_alive, chunked, length, headers)


def _parse_field(line: bytes) -> tuple[str, str]:
    name, colon, value = line.partition(b":")
    if not colon or not _NAME.match(name):
        raise ProtocolError(f"the answer has a malformed header line: {line[:40]!r}")
    if b"\n" in value or b"\r" in value or b"\0" in value:
        raise ProtocolError(f"the header {name[:40].decode('ascii')} holds a control character")
    return name.decode("ascii"), value.strip(b" \t").decode("latin-1")


def _is_chunked(headers: Headers) -> bool:
    codings = headers.get_all("transfer-encoding")
    if not codings:
        return False
    if ",".join(codings).strip().lower() != "chunked":
        raise ProtocolError(f"the transfer encoding {','.join(codings)[:40]!r} is not supported, expected chunked")
    return True


def _content_length(headers: Headers) -> int | None:
    values = {part.strip() for value in headers.get_all("content-length") for part in value.split(",")}
    if not values:
        return None
    if len(values) > 1:
        raise ProtocolError("the answer has two different Content-Lengths")
    text = values.pop()
    if not _NUMBER.match(text):
        raise ProtocolError(f"the Content-Length {text[:30]!r} is not a number of bytes")
    return int(text)
