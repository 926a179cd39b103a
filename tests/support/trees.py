"""Source trees for tests: every kind of inode an image can hold, made by the calls that users' tools make.

Needs root (device nodes, owners, trusted and security xattrs) and a file system that holds all of it: ext4 and xfs do;
tmpfs lacks user xattrs before Linux 6.6, and refuses nothing else here. Rule: the tree is a function of its arguments,
so that two builds of it can be compared. `make_tree` raises what the file system raises: a tree that lacks a kind would
prove less than it claims.
"""

from __future__ import annotations

import os
import random
import socket
import stat
import struct
import subprocess
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
TIB: Final = 1024 * 1024 * MIB

BIG_DIRECTORY: Final = b"many"
TERABYTE: Final = b"sparse/terabyte"
TERABYTE_SIZE: Final = TIB + 12_345
TERABYTE_DATA: Final = ((0, 100_000), (TIB // 2 + 4096 * 7, 70_000), (TERABYTE_SIZE - 10_000, 10_000))
"""Ranges of the terabyte file that hold data; the rest is one hole after the other."""

_CAPABILITY: Final = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
"""security.capability, revision 2, effective: CAP_NET_BIND_SERVICE permitted."""

_NAMES: Final = (
    b"!before-the-dots",
    b"#",
    b"-",
    b"-rf",
    b" leading space",
    b"trailing space ",
    b"new\nline",
    b"tab\tand\x01control",
    b"...",
    b".hidden",
    b"quote'\"`$(x)",
    b"back\\slash",
    b"\xff\xfe not utf-8 \xc3",
    "größe-模型.txt".encode(),
    b"n" * 255,
    b"\x7f" * 254 + b"\xff",
)


def pattern(size: int, seed: int) -> bytes:
    """Return `size` bytes that no compressor shrinks, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def make_tree(top: str | bytes | os.PathLike[str], *, entries: int = 2_000, terabyte: bool = False) -> None:
    """Make a tree with every kind of inode below the new directory `top`.

    `entries`: names in the big directory. `terabyte`: also a file of more than 1 TiB that is nearly all hole; tools
    that read whole files (diff, rsync) must then be kept off it.
    """
    root = os.fsencode(os.fspath(top))
    os.mkdir(root, 0o755)
    _regular(root)
    _sparse(root, terabyte=terabyte)
    _links(root)
    _specials(root)
    _directories(root, entries)
    _names(root)
    _modes_and_owners(root)
    _attributes(root)
    _times(root)


def make_flat(top: str | bytes | os.PathLike[str], files: int, size: int = 0) -> None:
    """Make `files` regular files of `size` bytes each, all different if not empty, in 100 directories below `top`."""
    root = os.fsencode(os.fspath(top))
    os.mkdir(root)
    for number in range(min(100, files)):
        os.mkdir(os.path.join(root, b"d%02d" % number))
    for number in range(files):
        _write(os.path.join(root, b"d%02d" % (number % 100), b"file-%06d" % number), pattern(size, number))


def _write(path: bytes, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def _ranges(path: bytes, size: int, ranges: tuple[tuple[int, int], ...], seed: int) -> None:
    """Make a sparse file of `size` bytes with data at (offset, length) and nowhere else."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.truncate(fd, size)
        for number, (offset, length) in enumerate(ranges):
            os.pwrite(fd, pattern(length, seed + number), offset)
    finally:
        os.close(fd)


def _regular(root: bytes) -> None:
    where = os.path.join(root, b"regular")
    os.mkdir(where)
    sizes = (1, 2, 100, 4_000, 4_095, 4_096, 4_097, 8_192, 65_536, 300_001, MIB - 1, MIB, MIB + 1, 3 * MIB + 123)
    for size in sizes:
        _write(os.path.join(where, b"size-%d" % size), pattern(size, size))
    _write(os.path.join(where, b"empty"), b"")
    _write(os.path.join(where, b"text"), b"the same line again and again\n" * 50_000)
    _write(os.path.join(where, b"dense zeros"), bytes(2 * MIB))
    twin = pattern(3 * MIB // 2, 7)
    for name in (b"twin-a", b"twin-b"):
        _write(os.path.join(where, name), twin)
    _write(os.path.join(where, b"twin-but-for-the-last-byte"), twin[:-1] + bytes([twin[-1] ^ 1]))


def _sparse(root: bytes, *, terabyte: bool) -> None:
    where = os.path.join(root, b"sparse")
    os.mkdir(where)
    _ranges(os.path.join(where, b"hole-first"), 2 * MIB, ((MIB, 64 * KIB), (2 * MIB - 100, 100)), 1)
    _ranges(os.path.join(where, b"hole-middle"), 3 * MIB + 5, ((0, 70_000), (2 * MIB, MIB + 5)), 10)
    _ranges(os.path.join(where, b"hole-last"), 5 * MIB + 77, ((0, MIB + 1),), 20)
    _ranges(os.path.join(where, b"hole-only"), 16 * MIB + 1, (), 30)
    _ranges(os.path.join(where, b"comb"), 4 * MIB, tuple((n * 128 * KIB, 4 * KIB) for n in range(32)), 40)
    _ranges(os.path.join(where, b"tiny-hole-only"), 100, (), 50)
    if terabyte:
        _ranges(os.path.join(root, TERABYTE), TERABYTE_SIZE, TERABYTE_DATA, 60)


def _links(root: bytes) -> None:
    where = os.path.join(root, b"links")
    os.makedirs(os.path.join(where, b"below"))
    os.symlink(b"../regular/size-4096", os.path.join(where, b"short"))
    os.symlink(b"dangling/" * 444 + b"end\n", os.path.join(where, b"long dangling"))
    os.symlink(b".", os.path.join(where, b"to-itself"))
    os.symlink(b"/", os.path.join(where, b"absolute"))
    os.symlink(b"\xff\xfe", os.path.join(where, b"not-utf-8"))
    os.symlink(b"x" * 4_000, os.path.join(where, b"4000 bytes"))
    first = os.path.join(where, b"hard-1")
    _write(first, pattern(200_000, 99))
    os.link(first, os.path.join(where, b"hard-2"))
    os.link(first, os.path.join(where, b"below", b"hard-3"))
    small = os.path.join(where, b"small-hard-1")
    _write(small, b"inline and linked\n")
    os.link(small, os.path.join(root, b"small-hard-2"))
    os.link(os.path.join(where, b"short"), os.path.join(where, b"hard-symlink"), follow_symlinks=False)


def _specials(root: bytes) -> None:
    where = os.path.join(root, b"special")
    os.mkdir(where)
    os.mkfifo(os.path.join(where, b"fifo"), 0o640)
    os.link(os.path.join(where, b"fifo"), os.path.join(where, b"fifo-linked"))
    os.mknod(os.path.join(where, b"null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(os.path.join(where, b"big-numbers"), stat.S_IFCHR | 0o600, os.makedev(511, 65_537))
    os.mknod(os.path.join(where, b"block"), stat.S_IFBLK | 0o660, os.makedev(7, 200))
    os.mknod(os.path.join(where, b"whiteout"), stat.S_IFCHR | 0o000, os.makedev(0, 0))
    # A path of sockaddr_un holds 108 bytes: bind by way of a short name in /proc.
    fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"/proc/self/fd/{fd}/socket")
    finally:
        os.close(fd)


def _directories(root: bytes, entries: int) -> None:
    os.mkdir(os.path.join(root, b"empty directory"))
    os.makedirs(os.path.join(root, *[b"deep-%02d" % level for level in range(40)]))
    many = os.path.join(root, BIG_DIRECTORY)
    os.mkdir(many)
    for number in range(entries):
        # Of different lengths, so that directory blocks end at odd places.
        name = b"entry-%06d" % number + b"x" * (number % 50)
        fd = os.open(os.path.join(many, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        if number % 100 == 0:
            os.write(fd, name)
        os.close(fd)


def _names(root: bytes) -> None:
    where = os.path.join(root, b"names")
    os.mkdir(where)
    for number, name in enumerate(_NAMES):
        _write(os.path.join(where, name), b"%d" % number)
    os.mkdir(os.path.join(where, b"d" * 255))
    _write(os.path.join(where, b"d" * 255, b"f" * 255), b"far down")


def _modes_and_owners(root: bytes) -> None:
    where = os.path.join(root, b"modes")
    os.mkdir(where)
    for mode in (0o000, 0o400, 0o644, 0o755, 0o4755, 0o2755, 0o1644, 0o7777):
        path = os.path.join(where, b"file-%04o" % mode)
        _write(path, b"mode %o" % mode)
        os.chmod(path, mode)
        path = os.path.join(where, b"dir-%04o" % mode)
        os.mkdir(path)
        os.chmod(path, mode)
    owners = os.path.join(root, b"owners")
    os.mkdir(owners)
    for uid, gid in ((0, 0), (1000, 1000), (12_345, 54_321), (65_534, 65_534), (3_000_000_000, 4_000_000_000)):
        path = os.path.join(owners, b"%d-%d" % (uid, gid))
        _write(path, b"owned")
        os.chown(path, uid, gid)
    os.symlink(b"whoever", os.path.join(owners, b"link"))
    os.chown(os.path.join(owners, b"link"), 1001, 1002, follow_symlinks=False)
    os.chown(owners, 1003, 1004)


def _attributes(root: bytes) -> None:
    where = os.path.join(root, b"xattrs")
    os.mkdir(where)
    file = os.path.join(where, b"file")
    _write(file, b"with attributes")
    os.setxattr(file, b"user.comment", b"plain text")
    os.setxattr(file, b"user.empty", b"")
    os.setxattr(file, b"user.binary", bytes(range(256)))
    os.setxattr(file, b"user.\xff" + b"n" * 200, b"long name")
    os.setxattr(file, b"trusted.overlay.opaque", b"y")
    os.setxattr(file, b"security.capability", _CAPABILITY)
    big = os.path.join(where, b"large-value")
    _write(big, pattern(3_000, 3))
    os.setxattr(big, b"user.large", pattern(3_000, 4))
    chunked = os.path.join(where, b"chunked")
    _write(chunked, pattern(150_000, 5))
    os.setxattr(chunked, b"user.kind", b"chunk based")
    os.setxattr(where, b"user.on-a-directory", b"yes")
    os.symlink(b"file", os.path.join(where, b"link"))
    os.setxattr(os.path.join(where, b"link"), b"trusted.on-a-symlink", b"yes", follow_symlinks=False)
    acl = os.path.join(where, b"acl")
    _write(acl, b"with an access list")
    subprocess.run(["setfacl", "-m", "u:1234:r--,g:4321:rw-,m::rw-", acl], check=True)
    inheriting = os.path.join(where, b"acl-directory")
    os.mkdir(inheriting)
    subprocess.run(["setfacl", "-m", "u:1234:rwx", inheriting], check=True)
    subprocess.run(["setfacl", "-d", "-m", "u:1234:r-x,g:4321:r-x", inheriting], check=True)
    _write(os.path.join(inheriting, b"inherited"), b"from above")


def _times(root: bytes) -> None:
    """Give every inode a time of its own, and some of them odd ones; directories last, for entries change theirs."""
    where = os.path.join(root, b"times")
    os.mkdir(where)
    # ext4 with 256-byte inodes holds 1901 to 2446.
    odd = (
        0,
        1,
        -1,
        -1_500_000_000_000_000_001,
        1_699_999_999_999_999_999,
        2**32 * 10**9,
        9_000_000_000_000_000_007,
    )
    for time_ns in odd:
        path = os.path.join(where, b"at%d" % time_ns)
        _write(path, b"%d" % time_ns)
        os.utime(path, ns=(0, time_ns))
    os.symlink(b"then", os.path.join(where, b"link"))
    done: set[int] = set()
    base = 1_600_000_000_000_000_000
    for number, (directory, names, files) in enumerate(os.walk(root, topdown=False)):
        for index, name in enumerate(sorted(files)):
            path = os.path.join(directory, name)
            inode = os.lstat(path).st_ino
            if inode not in done and not name.startswith(b"at"):
                os.utime(path, ns=(0, base + number * 1_000_000_007 + index), follow_symlinks=False)
            done.add(inode)
        for name in names:
            path = os.path.join(directory, name)
            if os.path.islink(path):
                os.utime(path, ns=(0, base - len(name)), follow_symlinks=False)
        os.utime(directory, ns=(0, base + number * 10_000_019 + 999_999_999))
