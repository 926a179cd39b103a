"""What commands print: JSON, aligned lines, and a progress bar where a person looks on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rafsfs.units import format_size


def print_json(value: object) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, sort_keys=True))


def print_table(rows: Sequence[Sequence[object]], *, header: Sequence[str] | None = None) -> None:
    """Print rows in aligned columns."""
    shown = [[str(cell) for cell in row] for row in ([header, *rows] if header else rows)]
    if not shown:
        return
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))]
    for row in shown:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_path(path: bytes) -> str:
    """Return a path for a person: as it is if it can be printed, else with what cannot, and backslashes, escaped."""
    text = os.fsdecode(path)
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"  # a byte that is not UTF-8
    if character == "\\" or not character.isprintable():
        return character.encode("unicode_escape").decode()
    return character


@contextmanager
def progress_bar(title: str, *, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) in bytes that draws a bar on stderr, if that is a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console  # noqa: PLC0415 - rich costs 50 ms that a script should not pay
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def ratio(stored: int, raw: int) -> str:
    """Return stored ÷ raw with three digits."""
    return f"{stored / raw:.3f}" if raw else "-"


def size(count: int) -> str:
    """Return bytes for a person."""
    return format_size(count)


def lines_of(values: dict[str, Any]) -> None:
    """Print `name: value` lines."""
    width = max(len(name) for name in values)
    for name, value in values.items():
        print(f"{name + ':':<{width + 1}} {value}")


def existing_parent(path: str) -> str:
    """Return `path`, or the nearest directory above it that exists."""
    found = os.path.abspath(path)
    while not os.path.isdir(found) and os.path.dirname(found) != found:
        found = os.path.dirname(found)
    return found
