"""Range and Content-Range headers (RFC 9110 §14), single byte ranges only. Pure."""

from __future__ import annotations

import re

from ..errors import RemoteError

_CONTENT_RANGE = re.compile(r"\Abytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\Z")


def format_range(offset: int, length: int) -> str:
    """Return the Range header value for bytes [offset, offset+length)."""
    return f"bytes={offset}-{offset + length - 1}"


def check_content_range(value: str | None, offset: int, length: int) -> None:
    """Raise RemoteError unless a Content-Range is exactly the range that was asked for."""
    match = _CONTENT_RANGE.match(value or "")
    if not match or (int(match[1]), int(match[2])) != (offset, offset + length - 1):
        raise RemoteError(f"answer covers {value!r}, expected bytes {offset}-{offset + length - 1}")
