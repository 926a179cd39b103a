"""Messages between the node daemon and its clients: the command line and the FUSE workers. Pure; docs/protocol/daemon.md.

A frame is a length (u32, little-endian) and that many bytes of msgpack. The client speaks first with Hello; the daemon answers with
Hello. Then the client sends Requests, and the daemon answers each with any number of Events and one Reply, in any order.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from .. import errors

VERSION: Final = 1
MAX_FRAME: Final = 8 << 20
"""Bytes: a status of ten thousand mounts fits; anything larger is not one of ours."""

_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, tag="hello", tag_field="type"):
    """Who speaks. `mount` and `pid` are a worker's."""

    version: int
    program: str
    mount: str = ""
    pid: int = 0


class Request(msgspec.Struct, tag="request", tag_field="type"):
    """One call. `id` is the client's, unique on its connection."""

    id: int
    method: str
    params: dict[str, Any]


class Event(msgspec.Struct, tag="event", tag_field="type"):
    """Progress of a call."""

    id: int
    data: dict[str, Any]


class Reply(msgspec.Struct, tag="reply", tag_field="type"):
    """The end of a call: `result`, or the class name and message of an error of rafsfs.errors."""

    id: int
    result: dict[str, Any] | None = None
    error: str = ""
    message: str = ""


Message = Hello | Request | Event | Reply
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return a message as a frame."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise errors.DaemonError(f"message of {len(body)} bytes, at most {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray) -> list[Message]:
        """Take bytes, return the messages they complete. Raises FormatError for what is not our protocol."""
        self._buffer += data
        found: list[Message] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise errors.FormatError(f"frame of {length} bytes, at most {MAX_FRAME}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            try:
                found.append(_decoder.decode(bytes(self._buffer[_LENGTH.size : end])))
            except (msgspec.DecodeError, RecursionError) as error:
                raise errors.FormatError(f"frame does not hold one of our messages: {error}") from error
            del self._buffer[:end]
        return found


def error_reply(call: int, error: errors.RafsError) -> Reply:
    """Return the reply that carries an error."""
    return Reply(call, None, type(error).__name__, str(error))


def raise_error(reply: Reply) -> None:
    """Raise the error that a reply carries, as its own class."""
    kind = getattr(errors, reply.error, None) if reply.error in errors.__all__ else None
    raise (kind or errors.DaemonError)(reply.message)
