"""Who keeps a superblock alive that is mounted here no longer: processes with open files or mappings, and other mount namespaces.

Read from /proc alone: nothing here touches a file of the mount. What cannot be read (a process of another user, one that has just ended) is
left out, so the answer is for people and decides nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

MOST: Final = 8
"""Keepers that are named."""


def keepers(devices: Collection[str], mount_ids: Collection[int]) -> list[str]:
    """Return who keeps the superblocks of `devices` (`major:minor`), whose mounts here had `mount_ids`: some words for each. Blocking."""
    found: list[str] = []
    mapped = {_as_in_maps(device) for device in devices if device}
    seen = {_namespace("self")}
    for pid in _pids():
        how = ""
        namespace = _namespace(pid)
        if _has_open(pid, mount_ids):
            how = "has a file open"
        elif _has_mapped(pid, mapped):
            how = "has a file mapped"
        elif namespace and namespace not in seen and _has_copy(pid, devices):
            how = "is in a mount namespace that has a copy"
        if namespace:
            seen.add(namespace)
        if how:
            found.append(f"process {pid} ({_name(pid)}) {how}")
        if len(found) >= MOST:
            break
    return found


def _pids() -> Iterator[str]:
    yield from sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int)


def _namespace(pid: str) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/mnt")
    return ""


def _name(pid: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return "?"


def _has_open(pid: str, mount_ids: Collection[int]) -> bool:
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fdinfo"):
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/fdinfo/{number}").read_bytes().splitlines():
                    name, _, value = line.partition(b":")
                    if name == b"mnt_id":
                        if int(value) in mount_ids:
                            return True
                        break
    return False


def _has_mapped(pid: str, devices: Collection[bytes]) -> bool:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
            fields = line.split(None, 4)
            if len(fields) > 3 and fields[3] in devices:
                return True
    return False


def _has_copy(pid: str, devices: Collection[str]) -> bool:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape").splitlines():
            if line.split(" ", 3)[2] in devices:
                return True
    return False


def _as_in_maps(device: str) -> bytes:
    major, _, minor = device.partition(":")
    return b"%02x:%02x" % (int(major), int(minor))
