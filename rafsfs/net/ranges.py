"""Range and Content-Range (RFC 9110 §14), single byte ranges only. Pure.

Decided here: what an answer to a range request delivers, and whether the asked bytes can be had from it. Rule: bytes
at another offset than asked are never taken for the right ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from .http_head import Head, ProtocolError

_CONTENT_RANGE: Final = re.compile(r"\Abytes ([0-9]{1,18})-([0-9]{1,18})/(?:([0-9]{1,18})|\*)\Z", re.IGNORECASE)

SKIP_LIMIT: Final = 8 << 20
"""Most bytes read and dropped to reach the offset when a server ignores Range, bytes: a second at 64 Mbit/s."""


class RangeRefusedError(Exception):
    """The answer cannot serve the range; another try would get the same. `str()` says why."""


@dataclass(frozen=True, slots=True)
class ContentRange:
    """What a 206 says that it delivers: bytes [start, stop) of `total` (None if not said)."""

    start: int
    stop: int
    total: int | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """How to get the range out of a body: drop `skip` bytes first. `total` is the size of the whole, if known."""

    skip: int
    total: int | None


def format_range(offset: int, length: int) -> str:
    """Return the Range header value for bytes [offset, offset+length)."""
    return f"bytes={offset}-{offset + length - 1}"


def parse_content_range(value: str | None) -> ContentRange:
    """Parse the Content-Range of a 206. Raises ProtocolError if it is missing, malformed or impossible."""
    if value is None:
        raise ProtocolError("the partial answer has no Content-Range")
    match = _CONTENT_RANGE.match(value.strip())
    if match is None:
        raise ProtocolError(f"the Content-Range {value[:60]!r} is not of the form bytes A-B/N")
    start, last = int(match[1]), int(match[2])
    total = int(match[3]) if match[3] is not None else None
    if last < start or (total is not None and last >= total):
        raise ProtocolError(f"the Content-Range {value[:60]!r} is impossible")
    return ContentRange(start, last + 1, total)


def plan_delivery(head: Head, offset: int, length: int) -> Delivery:
    """Judge a 200 or 206 against bytes [offset, offset+length). Raises RangeRefusedError, ProtocolError."""
    coding = head.headers.get("content-encoding")
    if coding is not None and coding.strip().lower() not in {"", "identity"}:
        raise RangeRefusedError(f"the body comes with content encoding {coding[:40]!r}, expected none")
    if head.status == 206:
        return _plan_partial(head, offset, length)
    if head.length is not None and head.length < offset + length:
        raise RangeRefusedError(f"it is {head.length} bytes, expected at least {offset + length}")
    if offset > SKIP_LIMIT:
        raise RangeRefusedError(
            f"the server ignores Range requests and byte {offset} is too far in to read and drop what comes before"
        )
    return Delivery(offset, head.length)


def _plan_partial(head: Head, offset: int, length: int) -> Delivery:
    got = parse_content_range(head.headers.get("content-range"))
    if (got.start, got.stop) != (offset, offset + length):
        raise RangeRefusedError(
            f"the answer covers bytes {got.start}-{got.stop - 1}, expected {offset}-{offset + length - 1}"
        )
    if head.length is not None and head.length != length:
        raise RangeRefusedError(f"the partial answer is {head.length} bytes long, expected {length}")
    return Delivery(0, got.total)
