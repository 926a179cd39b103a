"""Writing a bootstrap: a tree of nodes and a list of data spaces become an EROFS file system image.

Decided here: where each inode, directory block and inline tail goes. All of it is planned before a byte is written, in two
passes without recursion. Rule: the result depends on the tree alone, not on the order of any dict.

Layout: block 0 holds superblock and device slots (more blocks if there are many); the metadata area follows with inodes in
the order of a breadth-first walk, each with its xattrs, indexes or inline tail; whole blocks of directories and long
symlinks come last. nids 0 and 1 stay unused: FUSE gives number 1 to the root, 0 means "no inode".
Specification: docs/format/bootstrap.md.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import FormatError
from ..types import BLOCK_SIZE, align_up
from . import dirent as dirents
from .chunk_index import Extent, pack_indexes
from .inode import (
    EXTENDED_SIZE,
    LAYOUT_CHUNK,
    LAYOUT_INLINE,
    LAYOUT_PLAIN,
    SLOT,
    encode_rdev,
    pack_inode,
)
from .superblock import (
    SLOT_SIZE,
    SUPER_OFFSET,
    SUPER_SIZE,
    Superblock,
    device_slot,
    pack_slot,
)
from .xattr import pack_xattrs

_FIRST_NID = 2
_MAX_DEPTH_OF_PATHS = 200
"""Characters of a path shown in a message."""


@dataclass(slots=True, eq=False)
class Node:
    """One inode to be written. The same Node under several names is a hard link."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    target: bytes | None = None
    """Symlinks: where to."""
    inline: bytes | None = None
    """Regular files: the content, when the bootstrap holds it. At most `inline_capacity(xattrs)` bytes."""
    size: int = 0
    """Regular files with extents: bytes."""
    extents: list[Extent] = field(default_factory=list)
    """Regular files: sorted ranges of data spaces; what they leave out is a hole."""
    children: dict[bytes, Node] = field(default_factory=dict)
    """Directories: names, without "." and ".."."""


@dataclass(frozen=True, slots=True)
class SpaceSpec:
    """A data space as the bootstrap names it."""

    space_id: bytes
    size: int


@dataclass(slots=True)
class _Placed:
    """A node with its place: filled in by the planning pass, read by the writing pass."""

    node: Node
    path: bytes
    parent: Node
    xattrs: bytes
    nid: int = 0
    nlink: int = 0
    layout: int = LAYOUT_PLAIN
    size: int = 0
    i_u: int = 0
    following: bytes = b""
    """Chunk indexes, or the inline content of a file or symlink."""
    names: list[list[bytes]] | None = None
    whole: bytes = b""
    """Symlink data that does not fit inline."""


def inline_capacity(xattrs: dict[bytes, bytes]) -> int:
    """Return how many bytes of a file's content fit beside its inode and these xattrs in one block; 0 if none."""
    return max(0, BLOCK_SIZE - EXTENDED_SIZE - len(pack_xattrs(xattrs)))


def write_bootstrap(root: Node, spaces: Sequence[SpaceSpec]) -> bytes:
    """Return the bootstrap of the tree below `root`. Raises FormatError, naming the path, for what EROFS cannot hold."""
    slots_at = SUPER_OFFSET + SUPER_SIZE
    meta_start = align_up(slots_at + SLOT_SIZE * len(spaces), BLOCK_SIZE)
    placed = _collect(root)
    end = _place(placed)
    data_block = (meta_start + align_up(end, BLOCK_SIZE)) // BLOCK_SIZE
    total = _place_blocks(placed, data_block)
    if total > 0xFFFFFFFF:
        raise FormatError("the bootstrap has more blocks than EROFS addresses")
    out = bytearray(total * BLOCK_SIZE)
    by_node = {id(entry.node): entry for entry in placed}
    for entry in placed:
        _write(out, meta_start, entry, by_node)
    superblock = Superblock(
        root_nid=placed[0].nid,
        inos=len(placed),
        blocks=total,
        meta_blkaddr=meta_start // BLOCK_SIZE,
        extra_devices=len(spaces),
        devt_slotoff=slots_at // SLOT_SIZE,
    )
    out[SUPER_OFFSET : SUPER_OFFSET + SUPER_SIZE] = superblock.pack()
    for index, space in enumerate(spaces):
        at = slots_at + SLOT_SIZE * index
        out[at : at + SLOT_SIZE] = pack_slot(device_slot(space.space_id, space.size))
    return bytes(out)


def _collect(root: Node) -> list[_Placed]:
    """Return every node once, breadth first in byte order of names, with link counts."""
    if not stat.S_ISDIR(root.mode):
        raise FormatError("the root of a bootstrap must be a directory")
    first = _Placed(root, b"", root, _xattr_bytes(root, b""), nlink=2)
    placed = [first]
    known = {id(root): first}
    at = 0
    while at < len(placed):
        entry = placed[at]
        at += 1
        for name in sorted(entry.node.children):
            child = entry.node.children[name]
            path = entry.path + b"/" + name if entry.path else name
            dirents.check_name(name)
            if name in {b".", b".."}:
                raise FormatError(f"{_show(path)}: this name cannot stand in a directory")
            found = known.get(id(child))
            is_dir = stat.S_ISDIR(child.mode)
            if found is None:
                found = _Placed(child, path, entry.node, _xattr_bytes(child, path), nlink=1 if is_dir else 0)
                known[id(child)] = found
                placed.append(found)
            elif is_dir:
                raise FormatError(f"{_show(path)}: a directory cannot have two names")
            found.nlink += 1
            if is_dir:
                entry.nlink += 1
    return placed


def _xattr_bytes(node: Node, path: bytes) -> bytes:
    try:
        return pack_xattrs(node.xattrs)
    except FormatError as error:
        raise FormatError(f"{_show(path)}: {error}") from error


def _place(placed: list[_Placed]) -> int:
    """Give each inode its nid; return the end of the metadata area relative to its start."""
    position = _FIRST_NID * SLOT
    for entry in placed:
        _shape(entry)
        fixed = EXTENDED_SIZE + len(entry.xattrs)
        position = align_up(position, SLOT)
        if entry.layout == LAYOUT_INLINE:
            need = fixed + _tail_size(entry)
            if position % BLOCK_SIZE + need > BLOCK_SIZE:
                position = align_up(position, BLOCK_SIZE)
            entry.nid = position // SLOT
            position += need
        else:
            entry.nid = position // SLOT
            position += fixed
            if entry.layout == LAYOUT_CHUNK:
                position = align_up(position, 8) + len(entry.following)
    return position


def _shape(entry: _Placed) -> None:
    """Choose the data layout of a node and what follows its inode."""
    node = entry.node
    room = BLOCK_SIZE - EXTENDED_SIZE - len(entry.xattrs)
    if stat.S_ISDIR(node.mode):
        entry.names = dirents.split_blocks(sorted([b".", b"..", *node.children]))
        entry.size = dirents.directory_size(entry.names)
        tail = entry.size % BLOCK_SIZE
        entry.layout = LAYOUT_INLINE if tail and tail <= room else LAYOUT_PLAIN
    elif stat.S_ISLNK(node.mode):
        target = node.target or b""
        if not 0 < len(target) < BLOCK_SIZE or b"\0" in target:
            raise FormatError(f"{_show(entry.path)}: symlink target of {len(target)} bytes cannot be stored")
        entry.size = len(target)
        if len(target) <= room:
            entry.layout, entry.following = LAYOUT_INLINE, target
        else:
            entry.whole = target
    elif stat.S_ISREG(node.mode):
        _shape_file(entry, room)
    else:
        dirents.file_type(node.mode)
        if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
            entry.i_u = encode_rdev(node.rdev)


def _shape_file(entry: _Placed, room: int) -> None:
    node = entry.node
    if node.inline:
        if len(node.inline) > room:
            raise FormatError(f"{_show(entry.path)}: {len(node.inline)} bytes do not fit inline, room for {room}")
        entry.layout, entry.following, entry.size = LAYOUT_INLINE, node.inline, len(node.inline)
        return
    entry.layout, entry.size = LAYOUT_CHUNK, node.size if node.inline is None else 0
    try:
        entry.i_u, entry.following = pack_indexes(entry.size, node.extents)
    except FormatError as error:
        raise FormatError(f"{_show(entry.path)}: {error}") from error


def _tail_size(entry: _Placed) -> int:
    return entry.size % BLOCK_SIZE if entry.names is not None else len(entry.following)


def _place_blocks(placed: list[_Placed], block: int) -> int:
    """Give directories and long symlinks their whole blocks from `block` on; return the end in blocks."""
    for entry in placed:
        if entry.names is not None:
            whole = entry.size // BLOCK_SIZE
            if entry.layout == LAYOUT_PLAIN and entry.size % BLOCK_SIZE:
                whole += 1
        else:
            whole = 1 if entry.whole else 0
        if whole:
            entry.i_u = block
            block += whole
    return block


def _write(out: bytearray, meta_start: int, entry: _Placed, by_node: dict[int, _Placed]) -> None:
    node = entry.node
    at = meta_start + entry.nid * SLOT
    try:
        inode = pack_inode(
            layout=entry.layout,
            xattr_size=len(entry.xattrs),
            mode=node.mode,
            size=entry.size,
            i_u=entry.i_u,
            ino=entry.nid,
            uid=node.uid,
            gid=node.gid,
            mtime_ns=node.mtime_ns,
            nlink=entry.nlink,
        )
    except FormatError as error:
        raise FormatError(f"{_show(entry.path)}: {error}") from error
    out[at : at + len(inode)] = inode
    at += len(inode)
    out[at : at + len(entry.xattrs)] = entry.xattrs
    at += len(entry.xattrs)
    if entry.layout == LAYOUT_CHUNK:
        at = align_up(at, 8)
    if entry.names is not None:
        _write_directory(out, at, entry, by_node)
    else:
        out[at : at + len(entry.following)] = entry.following
        start = entry.i_u * BLOCK_SIZE
        out[start : start + len(entry.whole)] = entry.whole


def _write_directory(out: bytearray, tail_at: int, entry: _Placed, by_node: dict[int, _Placed]) -> None:
    entries = {name: _entry_of(by_node[id(child)]) for name, child in entry.node.children.items()}
    entries[b"."] = _entry_of(entry)
    entries[b".."] = _entry_of(by_node[id(entry.parent)])
    assert entry.names is not None
    for number, names in enumerate(entry.names):
        block = dirents.pack_block(names, entries)
        last = number == len(entry.names) - 1
        at = tail_at if last and entry.layout == LAYOUT_INLINE else (entry.i_u + number) * BLOCK_SIZE
        out[at : at + len(block)] = block


def _entry_of(placed: _Placed) -> tuple[int, int]:
    return placed.nid, dirents.file_type(placed.node.mode)


def _show(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")[-_MAX_DEPTH_OF_PATHS:] or "/"
