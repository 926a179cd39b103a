"""Which files of an image somebody means by paths and patterns. Pure.

Rule: a pattern's `*` does not cross a `/`, `**` does; a pattern that names a directory means all below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..errors import UsageError
from ..format.bootstrap import Bootstrap
from ..format.chunk_map import ChunkMap
from ..format.inode import Inode

_PIECE = re.compile(rb"\*\*/|\*\*|\*|\?|\[!?\]?[^\]/]*\]|[^*?\[]+|\[", re.DOTALL)


def compile_pattern(text: str) -> re.Pattern[bytes]:
    """Return what matches the paths that a pattern means. Raises UsageError."""
    data = text.encode("utf-8", "surrogateescape").strip(b"/")
    if any(part in {b"", b".", b".."} for part in data.split(b"/")):
        raise UsageError(f"path {text[:100]!r} is not a path inside an image")
    out = b""
    for piece in _PIECE.findall(data):
        if piece == b"**/":
            out += b"(?:.*/)?"
        elif piece == b"**":
            out += b".*"
        elif piece == b"*":
            out += b"[^/]*"
        elif piece == b"?":
            out += b"[^/]"
        elif len(piece) > 1 and piece.startswith(b"["):
            negated = piece[1:2] == b"!"
            inside = piece[2 if negated else 1 : -1].replace(b"\\", b"\\\\").replace(b"[", b"\\[")
            inside = (
                inside.replace(b"]", b"\\]")
                .replace(b"^", b"\\^")
                .replace(b"&", b"\\&")
                .replace(b"~", b"\\~")
                .replace(b"|", b"\\|")
            )
            out += b"[" + (b"^/" if negated else b"") + inside + b"]"
        else:
            out += re.escape(piece)
    try:
        return re.compile(rb"\A" + out + rb"(?:/.*)?\Z", re.DOTALL)
    except re.error as error:
        raise UsageError(f"path {text[:100]!r} is not a pattern: {error}") from None


def select(bootstrap: Bootstrap, patterns: Sequence[str]) -> dict[bytes, Inode]:
    """Return the paths that patterns mean, with the directories above them, in the order of a walk; everything if there is no pattern.

    Raises UsageError for a pattern that means nothing of the image.
    """
    compiled = [compile_pattern(text) for text in patterns]
    everything = dict(bootstrap.walk())
    if not compiled:
        return everything
    used = [False] * len(compiled)
    wanted: set[bytes] = {b""}
    for path in everything:
        hits = [number for number, pattern in enumerate(compiled) if path and pattern.match(path)]
        for number in hits:
            used[number] = True
        if hits:
            above = path
            while above not in wanted:
                wanted.add(above)
                above = above.rpartition(b"/")[0]
    if not all(used):
        raise UsageError(f"nothing in the image is called {patterns[used.index(False)]!r}; see `rafs ls`")
    return {path: inode for path, inode in everything.items() if path in wanted}


def chunks_of(bootstrap: Bootstrap, chunk_map: ChunkMap, nids: Iterable[int]) -> dict[int, list[int]]:
    """Return the chunks that hold the contents of regular files, by data space."""
    found: dict[int, set[int]] = {}
    for nid in nids:
        if bootstrap.inline_data(nid) is None:
            for extent in bootstrap.extents(nid):
                if extent.space is not None:
                    covering = chunk_map.table(extent.space).covering(extent.offset, extent.length)
                    found.setdefault(extent.space, set()).update(covering)
    return {space: sorted(chunks) for space, chunks in sorted(found.items())}
