"""Writing a bootstrap: a tree of nodes and a list of data spaces become an EROFS file system image.

Decided here: where each inode, directory block and inline tail goes. All of it is planned before a byte is written, in
passes without recursion. Rule: the result depends on the tree alone, not on the order of any dict.

Layout: block 0 holds superblock and device slots (more blocks if there are many); the metadata area follows with inodes
in the order of a breadth-first walk, each with its xattrs, indexes or inline tail; whole blocks of directories and long
symlinks come last. nids 0 and 1 stay unused: FUSE gives number 1 to the root, 0 means "no inode".
Specification: docs/format/bootstrap.md.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ..errors import FormatError
from ..types import BLOCK_SIZE, align_up
from . import dirent as dirents
from .chunk_index import INDEX_SIZE, Extent, pack_indexes, plan_data_ranges
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
    MAX_BLOCK,
    MAX_DEVICES,
    SLOT_SIZE,
    SUPER_OFFSET,
    SUPER_SIZE,
    DeviceSlot,
    Superblock,
    device_slot,
    pack_slot,
)
from .xattr import pack_xattrs

__all__ = ["Extent", "Node", "SpaceSpec", "inline_capacity", "plan_data_ranges", "write_bootstrap"]

_FIRST_NID: Final = 2
_OPEN_BLOCKS: Final = 8
"""Partly filled metadata blocks that may still take an inode: few, so that an inode stays near its directory."""
_MAX_LINK: Final = 4095
"""Longest symlink target: PATH_MAX less its NUL."""
_SHOWN: Final = 200
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


@dataclass(slots=True, eq=False)
class _Placed:
    """A node with its place: filled in by the planning passes, read by the writing pass."""

    node: Node
    parent: _Placed | None
    name: bytes
    nid: int = 0
    nlink: int = 0
    layout: int = LAYOUT_PLAIN
    size: int = 0
    i_u: int = 0
    xattrs: bytes = b""
    following: bytes = b""
    """Chunk indexes, or the inline content of a file or symlink."""
    whole: bytes = b""
    """Symlink target that does not fit inline."""
    entries: list[tuple[bytes, _Placed]] | None = None
    """Directories: sorted, with "." and ".."."""
    bounds: Sequence[int] = ()
    """Directories: where each block begins in `entries`, and the end."""


def inline_capacity(xattrs: Mapping[bytes, bytes]) -> int:
    """Return how many bytes of a file's content fit beside its inode and these xattrs in one block; 0 if none."""
    return max(0, BLOCK_SIZE - EXTENDED_SIZE - len(pack_xattrs(xattrs)))


def write_bootstrap(root: Node, spaces: Sequence[SpaceSpec]) -> bytes:
    """Return the bootstrap of the tree below `root`, the same bytes whatever the order of dicts.

    Raises FormatError, naming the path, for what EROFS cannot hold.
    """
    slots = _device_slots(spaces)
    slots_at = SUPER_OFFSET + SUPER_SIZE
    meta_block = align_up(slots_at + SLOT_SIZE * len(slots), BLOCK_SIZE) // BLOCK_SIZE
    placed = _collect(root)
    for entry in placed:
        try:
            _shape(entry, spaces)
        except FormatError as error:
            raise FormatError(f"{_show(entry)}: {error}") from error
    data_block = meta_block + _place_inodes(placed)
    total = _place_blocks(placed, data_block)
    if total > MAX_BLOCK:
        raise FormatError(f"the bootstrap has {total} blocks, EROFS addresses {MAX_BLOCK}")
    out = bytearray(total * BLOCK_SIZE)
    for entry in placed:
        _write(out, meta_block * BLOCK_SIZE, entry)
    superblock = Superblock(
        root_nid=placed[0].nid,
        inos=len(placed),
        blocks=total,
        meta_blkaddr=meta_block,
        extra_devices=len(slots),
        devt_slotoff=slots_at // SLOT_SIZE,
    )
    out[SUPER_OFFSET:slots_at] = superblock.pack()
    uniaddr = total
    for slot in slots:
        out[slots_at : slots_at + SLOT_SIZE] = pack_slot(slot, uniaddr)
        slots_at += SLOT_SIZE
        uniaddr += slot.blocks
    return bytes(out)


def _device_slots(spaces: Sequence[SpaceSpec]) -> list[DeviceSlot]:
    if len(spaces) > MAX_DEVICES:
        raise FormatError(f"{len(spaces)} data spaces, EROFS has room for {MAX_DEVICES}: use a larger bound")
    return [device_slot(space.space_id, space.size) for space in spaces]


def _collect(root: Node) -> list[_Placed]:
    """Return every node once, breadth first in byte order of names, with link counts and sorted entries."""
    first = _Placed(root, None, b"", nlink=2)
    if not _is_dir(root):
        raise FormatError("the root of a bootstrap must be a directory")
    placed = [first]
    known = {id(root): first}
    for entry in placed:  # grows while it is walked
        children = entry.node.children
        if not _is_dir(entry.node):
            if children:
                raise FormatError(f"{_show(entry)}: has entries but is no directory")
            continue
        if b"." in children or b".." in children:
            raise FormatError(f'{_show(entry)}: a directory cannot have entries of its own named "." or ".."')
        entries: list[tuple[bytes, _Placed]] = []
        for name in sorted([*children, b".", b".."]):
            child = children.get(name)
            if child is None:
                entries.append((name, entry if name == b"." else entry.parent or entry))
                continue
            found = known.get(id(child))
            is_dir = _is_dir(child)
            if found is None:
                found = _Placed(child, entry, name, nlink=1 if is_dir else 0)
                known[id(child)] = found
                placed.append(found)
                dirents.check_name(name)
            elif is_dir:
                raise FormatError(f"{_show(found)}: a directory cannot have a second name ({name[:64]!r})")
            else:
                dirents.check_name(name)
            found.nlink += 1
            entry.nlink += is_dir
            entries.append((name, found))
        entry.entries = entries
    return placed


def _is_dir(node: Node) -> bool:
    return node.mode & 0o170000 == stat.S_IFDIR


def _shape(entry: _Placed, spaces: Sequence[SpaceSpec]) -> None:
    """Choose the data layout of a node, its size and what follows its inode."""
    node = entry.node
    dirents.file_type(node.mode)
    if node.xattrs:
        entry.xattrs = pack_xattrs(node.xattrs)
    room = BLOCK_SIZE - EXTENDED_SIZE - len(entry.xattrs)
    kind = stat.S_IFMT(node.mode)
    if entry.entries is not None:
        names = [name for name, _ in entry.entries]
        entry.bounds = dirents.split_blocks(names)
        entry.size = dirents.directory_size(names, entry.bounds)
        if (entry.size - 1) % BLOCK_SIZE + 1 <= room:
            entry.layout = LAYOUT_INLINE
    elif kind == stat.S_IFLNK:
        _shape_symlink(entry, room)
    elif kind == stat.S_IFREG:
        _shape_file(entry, room, spaces)
    elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
        entry.i_u = encode_rdev(node.rdev)


def _shape_symlink(entry: _Placed, room: int) -> None:
    target = entry.node.target or b""
    if not 0 < len(target) <= _MAX_LINK or b"\0" in target:
        raise FormatError(f"symlink target of {len(target)} bytes: 1 to {_MAX_LINK} bytes without NUL can be stored")
    entry.size = len(target)
    if len(target) <= room:
        entry.layout, entry.following = LAYOUT_INLINE, target
    else:
        entry.whole = target


def _shape_file(entry: _Placed, room: int, spaces: Sequence[SpaceSpec]) -> None:
    node = entry.node
    if node.inline is not None and (node.extents or node.size not in {0, len(node.inline)}):
        raise FormatError("has both inline content and a size or extents of its own")
    if node.inline:
        if len(node.inline) > room:
            raise FormatError(f"{len(node.inline)} bytes of inline content, there is room for {max(room, 0)}")
        entry.layout, entry.following, entry.size = LAYOUT_INLINE, node.inline, len(node.inline)
        return
    if not 0 <= node.size < 1 << 63:
        raise FormatError(f"size {node.size} is out of range")
    for extent in node.extents:
        if extent.space is None:
            continue
        if not 0 <= extent.space < len(spaces) or extent.offset + extent.length > spaces[extent.space].size:
            raise FormatError(
                f"its piece [{extent.offset}, {extent.offset + extent.length}) leaves data space {extent.space} "
                f"of {len(spaces)}"
            )
    entry.layout, entry.size = LAYOUT_CHUNK, node.size
    entry.i_u, entry.following = pack_indexes(entry.size, node.extents)


def _place_inodes(placed: list[_Placed]) -> int:
    """Give each inode its nid; return the blocks of the metadata area.

    What fits in a block never crosses one: inode, xattrs, indexes or tail stay together in the oldest of the last
    few blocks that has room for them. What does not fit in a block starts one.
    """
    blocks = 1
    open_blocks = [[_FIRST_NID * SLOT, BLOCK_SIZE]]
    for entry in placed:
        fixed = EXTENDED_SIZE + len(entry.xattrs)
        if entry.layout == LAYOUT_CHUNK:
            need = align_up(fixed, INDEX_SIZE) + len(entry.following)
        elif entry.entries is not None and entry.layout == LAYOUT_INLINE:
            need = fixed + (entry.size - 1) % BLOCK_SIZE + 1
        else:
            need = fixed + len(entry.following)
        need = align_up(need, SLOT)
        for place in open_blocks:
            if place[1] - place[0] >= need:
                break
        else:
            taken = align_up(need, BLOCK_SIZE)
            place = [blocks * BLOCK_SIZE, blocks * BLOCK_SIZE + taken]
            blocks += taken // BLOCK_SIZE
            open_blocks.append(place)
            if len(open_blocks) > _OPEN_BLOCKS:
                del open_blocks[0]
        entry.nid = place[0] // SLOT
        place[0] += need
        if place[1] - place[0] < EXTENDED_SIZE:
            open_blocks.remove(place)
    return blocks


def _place_blocks(placed: list[_Placed], block: int) -> int:
    """Give directories and long symlinks their whole blocks from `block` on; return the end in blocks."""
    for entry in placed:
        whole = len(entry.bounds) - 1 - (entry.layout == LAYOUT_INLINE) if entry.bounds else bool(entry.whole)
        if whole:
            entry.i_u = block
            block += whole
    return block


def _write(out: bytearray, meta_start: int, entry: _Placed) -> None:
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
        raise FormatError(f"{_show(entry)}: {error}") from error
    out[at : at + EXTENDED_SIZE] = inode
    at += EXTENDED_SIZE
    if entry.xattrs:
        out[at : at + len(entry.xattrs)] = entry.xattrs
        at += len(entry.xattrs)
    if entry.layout == LAYOUT_CHUNK:
        at = align_up(at, INDEX_SIZE)
    if entry.entries is not None:
        _write_directory(out, at, entry)
        return
    out[at : at + len(entry.following)] = entry.following
    if entry.whole:
        start = entry.i_u * BLOCK_SIZE
        out[start : start + len(entry.whole)] = entry.whole


def _write_directory(out: bytearray, tail_at: int, entry: _Placed) -> None:
    assert entry.entries is not None
    last = len(entry.bounds) - 2
    for number in range(last + 1):
        found = entry.entries[entry.bounds[number] : entry.bounds[number + 1]]
        block = dirents.pack_block([(name, child.nid, dirents.file_type(child.node.mode)) for name, child in found])
        at = tail_at if number == last and entry.layout == LAYOUT_INLINE else (entry.i_u + number) * BLOCK_SIZE
        out[at : at + len(block)] = block


def _show(entry: _Placed) -> str:
    """Return the path of an entry for a message, its end if it is long."""
    names: list[bytes] = []
    length = 0
    at: _Placed | None = entry
    while at is not None and at.parent is not None and length < _SHOWN:
        names.append(at.name)
        length += len(at.name) + 1
        at = at.parent
    path = b"/".join(reversed(names)).decode("utf-8", "backslashreplace")
    return path[-_SHOWN:] or "/"
