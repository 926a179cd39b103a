"""Strict comparison of two trees: what a mount shows against what it was built from.

Compared: kind, mode, owners, size, links, mtime to the nanosecond, device numbers, content, symlink targets, all
xattrs that lists show, which names are the same inode, and that holes take no blocks (not on EROFS, whose driver counts
every byte of a file). Not compared: atime, ctime, inode
numbers, and the size and blocks of directories, which are the file system's own.
Rule: every difference is a line; no line means equal.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Final

from .processes import file_system_of

_STEP: Final = 1024 * 1024
_AROUND: Final = 64 * 1024
"""Bytes of hole read on both sides of data in files too large to be read whole."""

Path = str | bytes | os.PathLike[str]


def compare_trees(left: Path, right: Path, *, read_whole: int = 1 << 30, content: bool = True) -> list[str]:
    """Return the differences between two trees, as lines; an empty list if they are the same.

    Files above `read_whole` bytes are compared at the data of `left` and a little around it. Reads as the caller: root,
    to see everything.
    """
    tops = os.fsencode(os.fspath(left)), os.fsencode(os.fspath(right))
    found: list[str] = []
    counts_holes = file_system_of(right) == "erofs"
    groups: tuple[dict[tuple[int, int], bytes], dict[tuple[int, int], bytes]] = ({}, {})
    for path in _union(tops, found):
        a, b = (os.path.join(top, path) if path else top for top in tops)
        one, other = os.lstat(a), os.lstat(b)
        shown = os.fsdecode(path) or "."
        differences = [*_stat(one, other, counts_holes), *_xattrs(a, b)]
        # The first name under which an inode was met stands for its hardlink group.
        # A mount of ours numbers inodes alike in all its generations; its device number changes when it is promoted meanwhile.
        keys = (one.st_dev, one.st_ino), (0 if counts_holes else other.st_dev, other.st_ino)
        first = tuple(group.setdefault(key, path) for group, key in zip(groups, keys, strict=True))
        if not stat.S_ISDIR(one.st_mode) and first[0] != first[1]:
            differences.append(f"same inode as {first[0]!r}, other {first[1]!r}")
        if stat.S_IFMT(one.st_mode) == stat.S_IFMT(other.st_mode):
            if stat.S_ISLNK(one.st_mode) and os.readlink(a) != os.readlink(b):
                differences.append(f"target {os.readlink(a)[:80]!r}, other {os.readlink(b)[:80]!r}")
            if content and stat.S_ISREG(one.st_mode) and one.st_size == other.st_size and first[0] == path:
                differences.extend(_content(a, b, one.st_size, read_whole))
        found.extend(f"{shown!r}: {difference}" for difference in differences)
    return found


def _union(tops: tuple[bytes, bytes], found: list[str]) -> Iterator[bytes]:
    """Yield the relative paths that both trees have, parents first; note the others."""
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        yield path
        directories = [os.path.join(top, path) for top in tops]
        if not all(stat.S_ISDIR(os.lstat(directory).st_mode) for directory in directories):
            continue
        here, there = (os.listdir(directory) for directory in directories)
        for side, names in (("left", here), ("right", there)):
            if len(names) != len(set(names)):
                found.append(f"{os.fsdecode(path)!r}: {side} lists a name twice")
        for name in sorted(set(here) ^ set(there)):
            found.append(f"{os.fsdecode(os.path.join(path, name))!r}: only {'left' if name in here else 'right'}")
        waiting.extend(os.path.join(path, name) for name in sorted(set(here) & set(there), reverse=True))


def _stat(one: os.stat_result, other: os.stat_result, counts_holes: bool) -> Iterator[str]:
    fields = ["st_mode", "st_uid", "st_gid", "st_mtime_ns", "st_nlink"]
    if not stat.S_ISDIR(one.st_mode):
        fields.append("st_size")
    if stat.S_ISCHR(one.st_mode) or stat.S_ISBLK(one.st_mode):
        fields.append("st_rdev")
    for name in fields:
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            show = oct if name == "st_mode" else str
            yield f"{name} {show(mine)}, other {show(theirs)}"
    if stat.S_ISREG(one.st_mode) and not counts_holes:
        dense = (other.st_size + 4095) // 4096 * 8
        if other.st_blocks > max(dense, one.st_blocks):
            yield f"{other.st_blocks} blocks of 512 bytes for {other.st_size} bytes"
        # Holes may be rounded up to the unit in which an image stores them (a small file is a block), but not lost.
        if one.st_blocks == 0 and other.st_blocks > 8:
            yield f"a hole in whole, but the other has {other.st_blocks} blocks"
        if one.st_blocks * 4 < dense and other.st_blocks * 2 > dense > 8:
            yield f"mostly hole ({one.st_blocks} of {dense} blocks), but the other has {other.st_blocks}"
        if other.st_size and other.st_blocks == 0 and one.st_blocks > 8:
            yield f"{one.st_blocks} blocks, but the other has none"


def _xattrs(a: bytes, b: bytes) -> Iterator[str]:
    mine, theirs = (
        {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}
        for path in (a, b)
    )
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            yield f"xattr {name!r} {_short(mine.get(name))}, other {_short(theirs.get(name))}"


def _short(value: bytes | None) -> str:
    return "absent" if value is None else repr(value[:40])


def _content(a: bytes, b: bytes, size: int, read_whole: int) -> Iterator[str]:
    try:
        one, other = os.open(a, os.O_RDONLY), os.open(b, os.O_RDONLY)
    except OSError as error:
        yield f"cannot be opened: {error}"
        return
    try:
        for offset, length in [(0, size)] if size <= read_whole else _data(one, size):
            for at in range(offset, offset + length, _STEP):
                step = min(_STEP, offset + length - at)
                mine, theirs = os.pread(one, step, at), os.pread(other, step, at)
                if mine != theirs:
                    bad = next((i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y), len(theirs))
                    yield f"content differs at byte {at + bad} (read {len(mine)} and {len(theirs)} bytes at {at})"
                    return
        if os.pread(other, 1, size):
            yield f"there is data past the end at {size}"
    except OSError as error:
        yield f"cannot be read: {error}"
    finally:
        os.close(one)
        os.close(other)


def _data(fd: int, size: int) -> list[tuple[int, int]]:
    """Return the data of a sparse file, each range widened a little into the holes around it."""
    ranges = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        first = max(0, start - _AROUND)
        ranges.append((first, min(size, at + _AROUND) - first))
    return ranges or [(0, min(size, _AROUND)), (max(0, size - _AROUND), min(size, _AROUND))]
