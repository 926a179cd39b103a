"""Log lines: one line each, time, level, logger, message. Messages carry key=value pairs; secrets never reach a logger."""

from __future__ import annotations

import logging
import os
import sys
import time

from .errors import UsageError


class _Formatter(logging.Formatter):
    @staticmethod
    def converter(seconds: float | None) -> time.struct_time:
        return time.gmtime(seconds)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text.replace("\n", " | ")  # a log line is a line, tracebacks too


def configure(level: str | None = None) -> None:
    """Send log lines to stderr. `level`: debug, info, warning or error; $RAFS_LOG, else info."""
    name = (level or os.environ.get("RAFS_LOG") or "info").upper()
    if name not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise UsageError(f"log level {name.lower()!r} is unknown, expected debug, info, warning or error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in ("rafsfs", "p2p", "scheduler", "cli"):
        logging.getLogger(package).setLevel(name)
