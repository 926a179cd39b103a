"""Sizes and durations as people write them. Pure."""

from __future__ import annotations

import re

from .errors import UsageError

_SIZE = re.compile(r"\A(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\Z", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Return bytes: `4096`, `64K`, `1MiB`, `4GiB`; every unit counts by 1024. Raises UsageError."""
    match = _SIZE.match(text.strip())
    if not match:
        raise UsageError(f"size {text[:40]!r} is not understood, expected a number with K, M, G or T, for example 4MiB")
    return int(float(match[1]) * 1024 ** _POWERS[(match[2] or "")[:1].upper()])


def format_size(count: int) -> str:
    """Return bytes in the largest unit that leaves at least 1: `1.5 GiB`, `312 B`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
