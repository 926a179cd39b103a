"""Have-maps on the wire: the stream of frames with which a peer tells its neighbours what it has. Pure, but for the queue of one
subscriber.

Frames: length u32 big-endian, msgpack. `[0, bitmap]` all of it, `[1, [chunk, ...]]` more, `[2, [group, ...]]` what is being fetched from
the registry, `[3, [group, depth, ...]]` what is being followed. docs/protocol/swarm.md.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
import trio

from rafsfs.errors import FormatError

from .protocol.groups import unpack_bits

MAX_FRAME: Final = 4 << 20
_LEAST_FRAME: Final = 64 << 10
PROMPT_S: Final = 0.01
LAZY_S: Final = 0.5
"""Longest delay of news that matter less: a chunk that came from a peer, which others can have there, too."""
_ALL: Final = 0
_MORE: Final = 1
_PENDING: Final = 2
_RELAYED: Final = 3
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[int, bytes | list[int]])


def all_frame(bits: bytes) -> bytes:
    """Return the frame of a whole have-map."""
    return _frame([_ALL, bits])


def more_frame(chunks: list[int]) -> bytes:
    """Return the frame of chunks that have come; none: still here."""
    return _frame([_MORE, chunks])


def pending_frame(groups: list[int]) -> bytes:
    """Return the frame of groups that are being fetched."""
    return _frame([_PENDING, groups])


def relayed_frame(depths: dict[int, int]) -> bytes:
    """Return the frame of groups that are being followed, at what depth."""
    return _frame([_RELAYED, [number for pair in depths.items() for number in pair]])


def _frame(value: list[object]) -> bytes:
    body = _encoder.encode(value)
    return len(body).to_bytes(4, "big") + body


class HaveReader:
    """Takes the bytes of a stream, keeps the map. What does not make sense is a FormatError."""

    def __init__(self, have: bytearray) -> None:
        self._have = have
        self._buffer = bytearray()
        # A map, all chunks by number, or a list of groups: a msgpack integer takes up to 5 bytes.
        self._most = min(MAX_FRAME, max(_LEAST_FRAME, 5 * len(have) + 64))
        self._names_left = 2 * len(have) + 64
        self._has_all = False
        self.frames = 0
        """How many have been whole."""
        self.pending: set[int] = set()
        self.relayed: dict[int, int] = {}

    def feed(self, data: bytes | bytearray | memoryview) -> list[int]:
        """Take bytes; return the chunks that are new."""
        self._buffer += data
        fresh: list[int] = []
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "big")
            if length > self._most:
                raise FormatError(f"have-map frame of {length} bytes, expected at most {self._most}")
            if len(self._buffer) < 4 + length:
                break
            fresh += self._take(bytes(self._buffer[4 : 4 + length]))
            del self._buffer[: 4 + length]
            self.frames += 1
        return fresh

    def _take(self, body: bytes) -> list[int]:
        try:
            kind, value = _decoder.decode(body)
        except msgspec.DecodeError as error:
            raise FormatError(f"have-map frame is not understood: {error}") from None
        if kind == _PENDING and isinstance(value, list):
            self.pending = set(value[: 1 << 16])
            return []
        if kind == _RELAYED and isinstance(value, list):
            pairs = value[: 1 << 12]
            self.relayed = {group: depth for group, depth in zip(pairs[::2], pairs[1::2], strict=False) if depth > 0}
            return []
        if kind == _ALL and isinstance(value, bytes):
            if self._has_all:
                raise FormatError("have-map told as a whole twice")
            self._has_all = True
            chunks = unpack_bits(value, len(self._have))
            self._have[:] = bytes(len(self._have))  # what was evicted since the last connection is not there
            for chunk in chunks:
                self._have[chunk] = 1
            return list(chunks)
        if kind == _MORE and isinstance(value, list):
            chunks = value
        else:
            return []  # of a later version
        # Each chunk comes once; who names them again and again wants us to be busy.
        self._names_left -= len(chunks)
        if self._names_left < 0:
            raise FormatError(f"have-map of {len(self._have)} chunks names more than twice as many")
        fresh = []
        for chunk in chunks:
            if not 0 <= chunk < len(self._have):
                raise FormatError(f"have-map names chunk {chunk} of {len(self._have)}")
            if not self._have[chunk]:
                self._have[chunk] = 1
                fresh.append(chunk)
        return fresh


class Subscriber:
    """What one neighbour has not been told yet.

    News are gathered: a frame for each chunk and neighbour would be most of a node's work in a swarm. What no other peer has is told
    within PROMPT_S, since everybody waits for it; the rest within LAZY_S. Concurrency: one task calls `next`.
    """

    def __init__(self) -> None:
        self._chunks: list[int] = []
        self._pending: list[int] | None = None
        self._relayed: dict[int, int] | None = None
        self._due = math.inf
        self._rest: trio.CancelScope | None = None
        self.ended = False
        """Whether there is nothing more to come."""

    def end(self) -> None:
        """Tell the neighbour that this was all. No checkpoint."""
        self.ended = True
        self._tell_within(0)

    def add(self, chunk: int, *, prompt: bool) -> None:
        """A chunk has come. No checkpoint."""
        self._chunks.append(chunk)
        self._tell_within(PROMPT_S if prompt else LAZY_S)

    def set_pending(self, groups: list[int], *, prompt: bool = True) -> None:
        """These groups are being fetched. No checkpoint."""
        self._pending = groups
        self._tell_within(PROMPT_S if prompt else LAZY_S)

    def set_relayed(self, depths: dict[int, int], *, prompt: bool = True) -> None:
        """These groups are being followed. No checkpoint."""
        self._relayed = depths
        self._tell_within(PROMPT_S if prompt else LAZY_S)

    def _tell_within(self, seconds: float) -> None:
        self._due = min(self._due, trio.current_time() + seconds)
        if self._rest is not None:
            self._rest.deadline = min(self._rest.deadline, self._due)

    async def next(self, keep_alive_s: float) -> bytes:
        """Return the next frames, when news are due or the time is up."""
        with trio.CancelScope(deadline=min(self._due, trio.current_time() + keep_alive_s)) as self._rest:
            await trio.sleep_forever()
        self._rest = None
        self._due = math.inf
        chunks, self._chunks = self._chunks, []
        pending, self._pending = self._pending, None
        relayed, self._relayed = self._relayed, None
        frames = more_frame(chunks) if chunks else b""
        frames += pending_frame(pending) if pending is not None else b""
        frames += relayed_frame(relayed) if relayed is not None else b""
        return frames or more_frame([])
