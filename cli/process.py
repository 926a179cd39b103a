"""Waiting for another process to end, without being its parent and without asking again and again."""

from __future__ import annotations

import os

import trio


async def wait_ended(pid: int, limit_s: float) -> bool:
    """Return whether process `pid` has ended within `limit_s` seconds; one that is not there has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        with trio.move_on_after(limit_s):
            await trio.lowlevel.wait_readable(descriptor)
            return True
        return False
    finally:
        os.close(descriptor)
