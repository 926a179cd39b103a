"""What is fetched that no reader waits for: ahead of streams, whole tensors, and bytes that a plan names.

Decided here: what a demand makes of the flights of a data space, and when a file is looked into for its tensors: once its first chunk
has come, which a loader reads before any tensor, and again when the chunk has come that its header goes on in. How far ahead is
decided in readahead.py, how much in waste.py, what belongs together in layout.py.

Concurrency: trio thread only, no checkpoint but in `_learn`, a task of the fetcher's nursery that reads a header in a thread;
cancelled, it has learnt nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from ..errors import CacheError, FormatError
from ..store.data_space import DataSpace
from ..weights.gguf import looks_like_gguf, parse_gguf
from ..weights.safetensors import looks_like_safetensors, parse_safetensors
from ..weights.tensor import TensorFile
from .layout import ImageLayout, Piece, SpaceLayout
from .queue import Priority
from .readahead import Readahead, Span
from .waste import AheadAccount

_log = logging.getLogger(__name__)

_TABLES: Final = 4096
"""Data spaces whose readers are remembered: more than a node reads at once."""


@dataclass(frozen=True, slots=True)
class Window:
    """How far ahead, bytes."""

    limit: int
    step: int
    grain: int = 1
    """Of what is asked for: see `Readahead.advance`."""


class ChunkGetter(Protocol):
    """What gets chunks: the fetcher."""

    async def ensure(
        self, space_id: bytes, chunks: Sequence[int], *, priority: Priority, on_behalf: Counter[str] | None
    ) -> None:
        """Return when all of `chunks` are present."""


class _AbsentError(Exception):
    """A header goes on in a chunk that is not here."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk


class Prefetcher:
    """Decides and starts what is fetched ahead. `start` begins the flight of a chunk that nobody waits for."""

    def __init__(
        self, start: Callable[[DataSpace, int, Counter[str] | None], None], window: Callable[[], Window]
    ) -> None:
        self._start = start
        self._window = window
        self._layouts: dict[bytes, ImageLayout] = {}
        self._readers: dict[bytes, tuple[Readahead, AheadAccount]] = {}
        self._absent: dict[tuple[bytes, int], int] = {}
        self._busy: set[tuple[bytes, int]] = set()
        self.nursery: trio.Nursery | None = None

    def add_layout(self, layout: ImageLayout) -> None:
        """Say what lies where in the data spaces of an image."""
        self._layouts.update(dict.fromkeys(layout.spaces, layout))

    def remove_layout(self, layout: ImageLayout) -> None:
        """Forget an image that is no longer read from."""
        for space_id in layout.spaces:
            if self._layouts.get(space_id) is layout:
                del self._layouts[space_id]

    def forget(self, space_id: bytes) -> None:
        """Forget the readers of a data space that has been evicted."""
        self._readers.pop(space_id, None)

    def demanded(self, space: DataSpace, chunks: range, own: range | None, on_behalf: Counter[str] | None) -> None:
        """Note that a reader wants `chunks`, of a file that has the chunks `own` there if that is known; start what he will want next."""
        self.touched(space, chunks)
        if space.complete or not chunks:
            return
        ahead, account = self._reader(space)
        begin = space.table.extent(chunks.start)[0]
        end = sum(space.table.extent(chunks.stop - 1))
        layout, piece = self._place(space, begin)
        tensor, following = None, 0
        if piece is not None and layout is not None:
            self._look(space, layout, piece)
            file: Span = piece.first, piece.stop
            tensor = layout.object_at(piece, max(begin, piece.first))
            following = layout.spaces[space.space_id].following(piece)
        elif own:
            file = space.table.extent(own.start)[0], sum(space.table.extent(own.stop - 1))
        else:
            file = 0, space.size
        window = self._window()
        for first, stop in ahead.advance(
            begin,
            end,
            file,
            limit=window.limit,
            step=window.step,
            tensor=tensor,
            following=following,
            grain=window.grain,
        ):
            for index in space.missing(space.table.covering(first, stop - first)):
                if not account.grant(index, space.table.extent(index)[1]):
                    ahead.retreat(max(first, space.table.extent(index)[0]))
                    return
                self._start(space, index, on_behalf)

    def touched(self, space: DataSpace, chunks: range) -> None:
        """Note that a reader got chunks, or will."""
        _, account = self._reader(space)
        for index in chunks:
            account.read(index, space.table.extent(index)[1])

    def came(self, space: DataSpace, chunks: range) -> None:
        """Note that chunks are present now: a header may be among them."""
        if chunks:
            layout, piece = self._place(space, space.table.extent(chunks.start)[0])
            if piece is not None and layout is not None:
                self._look(space, layout, piece)

    @property
    def is_learning(self) -> bool:
        """Whether a header is being read right now."""
        return bool(self._busy)

    def figures(self) -> dict[str, int]:
        """Return bytes asked for ahead of readers, and how many of those were read, and were not, since the daemon started."""
        accounts = [account for _, account in self._readers.values()]
        return {
            "ahead_bytes": sum(account.asked_bytes for account in accounts),
            "ahead_read_bytes": sum(account.used_bytes for account in accounts),
            "ahead_unread_bytes": sum(account.unread_bytes for account in accounts),
        }

    def _reader(self, space: DataSpace) -> tuple[Readahead, AheadAccount]:
        found = self._readers.get(space.space_id)
        if found is None:
            if len(self._readers) >= _TABLES:
                self._readers.clear()
            found = self._readers[space.space_id] = Readahead(space.size), AheadAccount()
        return found

    def _place(self, space: DataSpace, offset: int) -> tuple[ImageLayout | None, Piece | None]:
        layout = self._layouts.get(space.space_id)
        if layout is None:
            return None, None
        pieces: SpaceLayout = layout.spaces[space.space_id]
        return layout, pieces.piece_at(offset)

    def _look(self, space: DataSpace, layout: ImageLayout, piece: Piece) -> None:
        """Look into a file, if its beginning lies here and what is needed has come."""
        if piece.file_offset or layout.is_understood(piece.file) or self.nursery is None:
            return
        key = space.space_id, piece.file
        needed = self._absent.get(key, space.table.find(piece.first))
        if key in self._busy or needed >= space.table.count or not space.is_present(needed):
            return
        self._busy.add(key)
        self.nursery.start_soon(self._learn, space, layout, piece)

    async def _learn(self, space: DataSpace, layout: ImageLayout, piece: Piece) -> None:
        key = space.space_id, piece.file
        try:
            tensors = await trio.to_thread.run_sync(_tensors, space, piece, layout.size(piece.file))
        except _AbsentError as absent:
            self._absent[key] = absent.chunk
            return
        except (FormatError, CacheError) as error:
            _log.debug("file not understood: nid=%d cause=%s", piece.file, error)
            tensors = None
        finally:
            self._busy.discard(key)
        self._absent.pop(key, None)
        layout.learn(piece.file, tensors)


def _tensors(space: DataSpace, piece: Piece, size: int) -> TensorFile | None:
    """Return the tensors of a file whose beginning is `piece`; None if it is not weights. In a thread. Raises _AbsentError, FormatError."""
    absent: list[int] = []

    def read(offset: int, length: int) -> bytes:
        """Return the bytes, fewer where a chunk is not here: a parser reads ahead of what it needs."""
        length = min(length, size - offset)
        if piece.first + offset + length > piece.stop:
            raise FormatError("the header does not lie in one data space")
        found = bytearray()
        for index in space.table.covering(piece.first + offset, length):
            if not space.is_present(index):
                absent.append(index)
                break
            start, _ = space.table.extent(index)
            low = max(0, piece.first + offset - start)
            found += memoryview(space.read(index))[low : piece.first + offset + length - start]
        return bytes(found)

    try:
        head = read(0, min(16, size))
        if looks_like_safetensors(head, size):
            return parse_safetensors(read, size)
        if looks_like_gguf(head):
            return parse_gguf(read, size)
    except FormatError:
        if absent:
            raise _AbsentError(absent[-1]) from None
        raise
    return None


async def header_of(
    fetcher: ChunkGetter, space: DataSpace, first: int, stop: int, size: int, on_behalf: Counter[str]
) -> TensorFile | None:
    """Return the tensors of a file that begins at [first, stop) of a space, its header fetched as far as needed; None if it has none."""
    piece = Piece(first, stop, 0, 0)
    wanted = space.table.find(first)
    while wanted < space.table.count:
        await fetcher.ensure(space.space_id, [wanted], priority=Priority.PREFETCH, on_behalf=on_behalf)
        try:
            return await trio.to_thread.run_sync(_tensors, space, piece, size)
        except _AbsentError as absent:
            wanted = absent.chunk
        except FormatError:
            return None
    return None
