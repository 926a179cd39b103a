"""Sizes and durations as people write them. Pure."""

from __future__ import annotations

import math
import re
from typing import Final

from .errors import UsageError

_SIZE: Final = re.compile(r"\A(\d{1,20}(?:\.\d{1,9})?)\s*([KMGT]i?)?B?\Z", re.IGNORECASE | re.ASCII)
_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_DURATION: Final = re.compile(r"\A(\d{1,12}(?:\.\d{1,9})?)\s*(ms|s|m|h)?\Z", re.ASCII)
_SECONDS: Final = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """Return bytes: `4096`, `64K`, `1MiB`, `4GiB`; every unit counts by 1024. Raises UsageError."""
    match = _SIZE.match(text.strip())
    if not match:
        raise UsageError(f"size {text[:40]!r} is not understood, expected a number with K, M, G or T, for example 4MiB")
    scale = 1024 ** _POWERS[(match[2] or "")[:1].upper()]
    return int(match[1]) * scale if match[1].isdigit() else int(float(match[1]) * scale)


def format_size(count: int) -> str:
    """Return bytes in the largest unit that leaves at least 1: `1.5 GiB`, `312 B`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_duration(text: str) -> float:
    """Return seconds: `30`, `0.5`, `250ms`, `90s`, `5m`, `1h`. Raises UsageError."""
    match = _DURATION.match(text.strip())
    if not match:
        raise UsageError(f"duration {text[:40]!r} is not understood, expected seconds or ms, s, m, h, for example 90s")
    return float(match[1]) * _SECONDS[match[2] or ""]


def format_duration(seconds: float) -> str:
    """Return seconds with three digits that mean something: `850 ms`, `2.35 s`, `3 min 20 s`."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
