"""Which boot this is: a page cache, processes and superblocks survive a process, not a boot."""

from __future__ import annotations

from pathlib import Path


def boot_id() -> str:
    """Return the kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
