"""A part of an image as an image of its own: the same data spaces, fewer names. For volumes that show some files of a model.

Decided here: what a view shows. With `include`, the files that match, and the directories on the way to them; without, all. Of that, what
`exclude` matches is left out, a directory with all below it. What matches a directory in `include` brings all of it. Rule: a view is a
bootstrap like any other, so every way of mounting serves it and none needs to know; what it does not name cannot be opened, and its chunks
are not fetched. Pure.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence

from .errors import FormatError, UsageError
from .format.bootstrap import Bootstrap
from .format.bootstrap_writer import Node, SpaceSpec, write_bootstrap
from .format.inode import Inode
from .patterns import Patterns
from .types import BLOCK_SIZE

_MOST_INODES = 1 << 22
"""A view is made of objects in memory, about 1 KiB each."""


def view_of(bootstrap: Bootstrap, include: Sequence[str], exclude: Sequence[str]) -> bytes:
    """Return the bootstrap of a view, the same bytes for the same image and patterns.

    Raises UsageError if it shows no file, FormatError for an image that is not as it should be or too large to be viewed in part.
    """
    if bootstrap.inode_count > _MOST_INODES:
        raise FormatError(f"an image of {bootstrap.inode_count} inodes is too large for a view, at most {_MOST_INODES}")
    root = _root(bootstrap, Patterns(include) if include else None, Patterns(exclude))
    if not any(True for _ in _files(root)):
        raise UsageError(f"no file of the image is left by include {list(include)} and exclude {list(exclude)}")
    spaces = [SpaceSpec(bytes.fromhex(slot.tag.decode("ascii")), slot.blocks * BLOCK_SIZE) for slot in bootstrap.spaces]
    return write_bootstrap(root, spaces)


def view_ranges(bootstrap: Bootstrap) -> dict[int, list[range]]:
    """Return which bytes of each data space (by slot) the files of a bootstrap lie in, ascending, joined where they touch."""
    found: dict[int, set[tuple[int, int]]] = {}
    seen: set[int] = set()
    for _, inode in bootstrap.walk():
        if not stat.S_ISREG(inode.mode) or inode.nid in seen or bootstrap.inline_data(inode.nid) is not None:
            continue
        seen.add(inode.nid)
        for extent in bootstrap.extents(inode.nid):
            if extent.space is not None and extent.length:
                found.setdefault(extent.space, set()).add((extent.offset, extent.offset + extent.length))
    return {space: _joined(sorted(ranges)) for space, ranges in found.items()}


def _joined(ranges: list[tuple[int, int]]) -> list[range]:
    out: list[range] = []
    for start, stop in ranges:
        if out and start <= out[-1].stop:
            out[-1] = range(out[-1].start, max(out[-1].stop, stop))
        else:
            out.append(range(start, stop))
    return out


def _root(bootstrap: Bootstrap, include: Patterns | None, exclude: Patterns) -> Node:
    """Return the tree of a view; without recursion, since a hostile image may be deep."""
    nodes: dict[int, Node] = {}
    root = _node(bootstrap, bootstrap.inode(bootstrap.root_nid))
    order: list[tuple[Node, bytes, Node]] = []
    stack: list[tuple[Node, int, bytes, bool]] = [(root, bootstrap.root_nid, b"", include is None)]
    while stack:
        parent, nid, path, whole = stack.pop()
        for entry in bootstrap.entries(nid):
            if entry.name in {b".", b".."}:
                continue
            where = path + entry.name
            inode = bootstrap.inode(entry.nid)
            is_dir = stat.S_ISDIR(inode.mode)
            if exclude.matches(where, is_dir=is_dir):
                continue
            shown = whole or (include is not None and include.matches(where, is_dir=is_dir))
            if is_dir:
                node = _node(bootstrap, inode)
                stack.append((node, entry.nid, where + b"/", shown))
                order.append((parent, entry.name, node))
                if len(order) > bootstrap.inode_count:
                    raise FormatError("the image's directories lead into one another without end")
            elif shown:
                node = nodes.get(entry.nid) or nodes.setdefault(entry.nid, _node(bootstrap, inode))
            else:
                continue
            parent.children[entry.name] = node
    if include is not None:
        # From the leaves up: a directory that shows nothing was only on the way. One that was asked for is not missed: it is empty.
        for parent, name, node in reversed(order):
            if not node.children:
                del parent.children[name]
    return root


def _node(bootstrap: Bootstrap, inode: Inode) -> Node:
    node = Node(inode.mode, inode.uid, inode.gid, inode.mtime_ns, inode.rdev, xattrs=bootstrap.xattrs(inode.nid))
    if stat.S_ISLNK(inode.mode):
        node.target = bootstrap.readlink(inode.nid)
    elif stat.S_ISREG(inode.mode):
        inline = bootstrap.inline_data(inode.nid)
        node.size = inode.size
        if inline is not None:
            node.inline = bytes(inline)
        else:
            node.extents = [extent for extent in bootstrap.extents(inode.nid) if extent.space is not None]
    return node


def _files(root: Node) -> Iterator[Node]:
    stack = [root]
    while stack:
        for child in stack.pop().children.values():
            if stat.S_ISDIR(child.mode):
                stack.append(child)
            elif stat.S_ISREG(child.mode):
                yield child
