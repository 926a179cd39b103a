"""Trees of nodes for tests of the bootstrap, with the bytes of their data spaces."""

from __future__ import annotations

import hashlib
import os
import stat
import struct

from rafsfs.format.bootstrap_writer import Extent, Node, SpaceSpec

REG, DIR, LNK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK
MIB = 1 << 20


def directory(mode: int = 0o755, **fields: object) -> Node:
    return Node(DIR | mode, **fields)  # type: ignore[arg-type]


def file(mode: int = 0o644, **fields: object) -> Node:
    return Node(REG | mode, **fields)  # type: ignore[arg-type]


def symlink(target: bytes, **fields: object) -> Node:
    return Node(LNK | 0o777, target=target, **fields)  # type: ignore[arg-type]


def space_id(number: int) -> bytes:
    return hashlib.sha256(b"space %d" % number).digest()


def pattern(length: int, seed: int) -> bytes:
    """Bytes that differ at every offset and for every seed."""
    return hashlib.shake_128(b"%d" % seed).digest(length)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The xattr form of a POSIX ACL of (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ACCESS = acl((1, 7, 0xFFFFFFFF), (2, 5, 1234), (4, 5, 0xFFFFFFFF), (16, 5, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))


def every_kind() -> tuple[Node, list[SpaceSpec], list[bytes]]:
    """A tree with every kind of inode and layout, its two data spaces and their contents."""
    contents = [pattern(8 * MIB, 1), pattern(3 * MIB + 4096, 2)]
    spaces = [SpaceSpec(space_id(index), len(content)) for index, content in enumerate(contents)]
    root = directory(0o755, mtime_ns=1_700_000_000_123_456_789)
    at = root.children
    at[b"small"] = file(0o640, inline=b"hello", uid=1000, gid=100, mtime_ns=1_234_567_890_987_654_321)
    at[b"hard link"] = at[b"small"]
    at[b"full block"] = file(inline=pattern(4032, 3))
    at[b"empty"] = file(0o4755, mtime_ns=1)
    at[b"one piece"] = file(0o600, size=3 * MIB + 17, extents=[Extent(0, 3 * MIB + 17, 0, 4096)])
    at[b"two pieces"] = file(size=5 * MIB, extents=[Extent(0, 4 * MIB, 0, 4 * MIB), Extent(4 * MIB, MIB, 1, 0)])
    at[b"same bytes"] = file(size=2 * MIB, extents=[Extent(0, 2 * MIB, 0, 4096)], uid=0xFFFFFFFE, gid=70000)
    at[b"sparse"] = file(size=(1 << 33) + 5, extents=[Extent(1 << 30, MIB, 1, MIB), Extent(1 << 32, MIB, 0, 0)])
    at[b"hole then data"] = file(size=MIB + 100, extents=[Extent(MIB, 100, 1, 8192)])
    at[b"hole"] = file(size=12345)
    at[b"attributes"] = file(
        inline=b"x" * 500,
        xattrs={
            b"user.comment": b"\x00\xff binary",
            b"user.empty": b"",
            b"trusted.overlay.opaque": b"y",
            b"security.capability": struct.pack("<IIIII", 0x2000001, 8192, 0, 0, 0),
            b"system.posix_acl_access": ACCESS,
            b"user.long": b"v" * 2000,
        },
    )
    at[b"attributes"].mode = REG | 0o750
    at[b"huge attributes"] = file(
        size=4096, extents=[Extent(0, 4096, 0, 0)], xattrs={b"user.%d" % index: b"v" * 60000 for index in range(4)}
    )
    at[b"link"] = symlink(b"small", mtime_ns=-1)
    at[b"long link"] = symlink(b"t" * 4095, xattrs={b"trusted.a": b"1" * 100})
    at[b"inline link"] = symlink(b"t" * 4032)
    at[b"char"] = Node(stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3))
    at[b"block"] = Node(stat.S_IFBLK | 0o660, rdev=os.makedev(259, 70000), gid=6)
    at[b"whiteout"] = Node(stat.S_IFCHR, rdev=0)
    at[b"fifo"] = Node(stat.S_IFIFO | 0o600)
    at[b"socket"] = Node(stat.S_IFSOCK | 0o755)
    at[b"d"] = directory(0o1777, xattrs={b"system.posix_acl_default": ACCESS}, mtime_ns=-1_500_000_000)
    at[b"d"].children[b"e"] = directory(0o700)
    at[b"d"].children[b"again"] = at[b"small"]
    many = at[b"many"] = directory()
    for index in range(1000):
        many.children[b"%d-%s" % (index, b"n" * (index % 200))] = file(inline=b"%d" % index)
    names = at[b"names"] = directory()
    for name in (
        b"!before dot",
        b"-",
        b".hidden",
        b"...",
        b"\xff\xfe not utf-8",
        b"n" * 255,
        b"\xc3\xa9",
        b"a b",
        b"\n",
    ):
        names.children[name] = file(inline=name)
    return root, spaces, contents


def golden() -> tuple[Node, list[SpaceSpec]]:
    """A small tree with every kind of inode and layout: the golden bootstrap's, see fixtures/README.md."""
    spaces = [SpaceSpec(bytes(range(32)), 8 * MIB), SpaceSpec(bytes(range(32, 64)), 3 * MIB + 5)]
    root = directory(0o755, uid=1, gid=2, mtime_ns=1_700_000_000_123_456_789)
    at = root.children
    at[b"config.json"] = file(0o640, inline=b'{"a": 1}', uid=1000, gid=100, mtime_ns=1_234_567_890_987_654_321)
    at[b"hard link"] = at[b"config.json"]
    at[b"empty"] = file(0o4755, mtime_ns=1)
    at[b"one piece"] = file(0o600, size=3 * MIB + 17, extents=[Extent(0, 3 * MIB + 17, 0, 4096)])
    at[b"two pieces"] = file(size=5 * MIB, extents=[Extent(0, 4 * MIB, 0, 4 * MIB), Extent(4 * MIB, MIB, 1, 0)])
    at[b"sparse"] = file(size=(1 << 26) + 5, extents=[Extent(1 << 25, MIB, 1, MIB), Extent(1 << 26, 5, 0, 0)])
    at[b"hole"] = file(size=(1 << 41) + 1)
    at[b"attributes"] = file(
        inline=b"x" * 50,
        xattrs={b"user.a": b"1", b"trusted.b": b"", b"security.c": b"\0", b"system.posix_acl_access": ACCESS},
    )
    at[b"link"] = symlink(b"config.json", mtime_ns=-1)
    at[b"long link"] = symlink(b"t" * 4095)
    at[b"char"] = Node(stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3))
    at[b"block"] = Node(stat.S_IFBLK | 0o660, rdev=os.makedev(259, 70000))
    at[b"fifo"] = Node(stat.S_IFIFO | 0o600)
    at[b"socket"] = Node(stat.S_IFSOCK | 0o755)
    at[b"!d"] = directory(0o1777, mtime_ns=-1_500_000_000)
    at[b"!d"].children[b"again"] = at[b"config.json"]
    at[b"!d"].children[b"\xff\xfe"] = directory(0o700)
    for index in range(30):
        at[b"%02d" % index + b"n" * 253] = file(inline=b"%d" % index)
    return root, spaces


def content(node: Node, contents: list[bytes], first: int, stop: int) -> bytes:
    """Bytes [first, stop) of a regular file as its node and its data spaces tell."""
    if node.inline is not None:
        return node.inline[first:stop]
    out = bytearray(max(0, min(stop, node.size) - first))
    for extent in node.extents:
        begin, end = max(extent.file_offset, first), min(extent.file_offset + extent.length, stop)
        if extent.space is not None and begin < end:
            at = extent.offset + begin - extent.file_offset
            out[begin - first : end - first] = contents[extent.space][at : at + end - begin]
    return bytes(out)


def file_size(node: Node) -> int:
    if node.target is not None:
        return len(node.target)
    return node.size if node.inline is None else len(node.inline)


def paths(root: Node) -> dict[bytes, Node]:
    """Every path below `root` with its node, b"" for the root, without recursion."""
    found = {b"": root}
    stack = [(b"", root)]
    while stack:
        path, node = stack.pop()
        for name, child in node.children.items():
            below = path + b"/" + name if path else name
            found[below] = child
            if stat.S_ISDIR(child.mode):
                stack.append((below, child))
    return found


def link_counts(root: Node) -> dict[int, int]:
    """The link count that each node, by id(), must get."""
    counts = {id(root): 2}
    for path, node in paths(root).items():
        if path:
            counts[id(node)] = counts.get(id(node), 0) + 1
        if stat.S_ISDIR(node.mode):
            subdirectories = sum(stat.S_ISDIR(child.mode) for child in node.children.values())
            counts[id(node)] = 2 + subdirectories
    return counts
