"""Messages between a peer and a scheduler: msgpack arrays with a tag in front. docs/protocol/swarm.md.

Decided here: names, order of fields, bounds. Rule: new fields go to the end with a default, so old and new understand each other; what does
not decode is a FormatError, never a guess.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Final

import msgspec

from rafsfs.errors import FormatError

VERSION: Final = 1
MAX_FRAME: Final = 1 << 20
MAX_GROUPS: Final = 1 << 20
"""Groups of a task: 4 TiB."""
MAX_LISTED: Final = 65536
MAX_CONTACTS: Final = 1024

Task = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
PeerId = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[0-9A-Za-z._-]+$")]
Group = Annotated[int, msgspec.Meta(ge=0, lt=MAX_GROUPS)]
Groups = Annotated[list[Group], msgspec.Meta(max_length=MAX_LISTED)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Port = Annotated[int, msgspec.Meta(ge=0, lt=65536)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
Section = Annotated[int, msgspec.Meta(ge=0, lt=256)]
Sections = Annotated[list[Section], msgspec.Meta(max_length=256)]
Digests = Annotated[bytes, msgspec.Meta(max_length=4096 * 32)]


class Kind(IntEnum):
    """What a connected program is."""

    PEER = 0
    SEED = 1
    TOOL = 2


class Verdict(IntEnum):
    """What to do about a group that was asked for."""

    LEASE = 0
    HELD = 1
    WAIT = 2
    LATER = 3


class Complaint(IntEnum):
    """What a peer says of another one."""

    CORRUPT = 0
    STALLED = 1
    UNREACHABLE = 2


class Contact(msgspec.Struct, array_like=True, frozen=True):
    """How to reach a peer."""

    id: PeerId
    host: Name
    port: Port
    kind: Kind = Kind.PEER


class Hello(msgspec.Struct, array_like=True, frozen=True, tag="hello"):
    """First of a connection."""

    version: int
    id: PeerId
    port: Port
    kind: Kind
    zone: Name = ""
    rack: Name = ""
    token: Name = ""
    address: Name = ""
    key: Name = ""
    """A secret of this run of the program: who says an id that is connected must say the same key."""


class Welcome(msgspec.Struct, array_like=True, frozen=True, tag="welcome"):
    """Answer to it."""

    version: int
    heartbeat_s: float


class Join(msgspec.Struct, array_like=True, frozen=True, tag="join"):
    """Take part in a task."""

    task: Task
    groups: Annotated[int, msgspec.Meta(ge=0, le=MAX_GROUPS)]
    image: Text = ""
    have: Annotated[bytes, msgspec.Meta(max_length=MAX_GROUPS // 8)] = b""


class Leave(msgspec.Struct, array_like=True, frozen=True, tag="leave"):
    """Take part no longer."""

    task: Task


class Neighbours(msgspec.Struct, array_like=True, frozen=True, tag="neighbours"):
    """More peers to exchange have-maps with."""

    task: Task
    peers: Annotated[list[Contact], msgspec.Meta(max_length=MAX_CONTACTS)]


class Ask(msgspec.Struct, array_like=True, frozen=True, tag="ask"):
    """Who has these groups, or may I fetch them?"""

    number: Count
    task: Task
    groups: Groups
    urgent: bool = False
    again: Count = 0
    """How often one of them has been asked about, and waited for in vain."""


class Ruling(msgspec.Struct, array_like=True, frozen=True):
    """The answer for one group."""

    group: Group
    verdict: Verdict
    peer: Contact | None = None
    after_s: float = 0.0
    """Seconds to wait before asking again; 0: as the peer thinks right."""


class Answer(msgspec.Struct, array_like=True, frozen=True, tag="answer"):
    """Answer to `ask`."""

    number: Count
    rulings: Annotated[list[Ruling], msgspec.Meta(max_length=MAX_LISTED)]


class Done(msgspec.Struct, array_like=True, frozen=True, tag="done"):
    """These groups are complete here."""

    task: Task
    groups: Groups


class Progress(msgspec.Struct, array_like=True, frozen=True, tag="progress"):
    """These leases are alive."""

    task: Task
    groups: Groups


class Failed(msgspec.Struct, array_like=True, frozen=True, tag="failed"):
    """These leases are given back."""

    task: Task
    groups: Groups
    reason: Text = ""


class Order(msgspec.Struct, array_like=True, frozen=True, tag="order"):
    """Fetch this group: its lease is yours."""

    task: Task
    group: Group
    image: Text = ""


class Revoke(msgspec.Struct, array_like=True, frozen=True, tag="revoke"):
    """These leases are no longer yours."""

    task: Task
    groups: Groups


class Report(msgspec.Struct, array_like=True, frozen=True, tag="report"):
    """Another peer has failed me."""

    task: Task
    peer: PeerId
    what: Complaint


class Ping(msgspec.Struct, array_like=True, frozen=True, tag="ping"):
    """I am alive."""


class Preheat(msgspec.Struct, array_like=True, frozen=True, tag="preheat"):
    """Have an image fetched by seeds, or by all peers."""

    number: Count
    image: Text
    everybody: bool = False


class Fill(msgspec.Struct, array_like=True, frozen=True, tag="fill"):
    """Fetch all of an image."""

    number: Count
    image: Text


class Filled(msgspec.Struct, array_like=True, frozen=True, tag="filled"):
    """How far that is."""

    number: Count
    done: Count
    total: Count
    error: Text = ""


class NodeProgress(msgspec.Struct, array_like=True, frozen=True):
    """How far one node is."""

    peer: PeerId
    done: Count
    total: Count
    error: Text = ""


class Preheated(msgspec.Struct, array_like=True, frozen=True, tag="preheated"):
    """How far all of them are."""

    number: Count
    nodes: Annotated[list[NodeProgress], msgspec.Meta(max_length=MAX_LISTED)]


class PinVerdict(IntEnum):
    """What is with a section of a file of a web server."""

    LEASE = 0
    """Fetch it, hash it, say what it is."""
    PINNED = 1
    WAIT = 2
    """Somebody fetches it, or may not yet: news come."""


class Pin(msgspec.Struct, array_like=True, frozen=True):
    """One section of a file."""

    section: Section
    verdict: PinVerdict
    digests: Digests = b""
    """Of its chunks, 32 bytes each, if it is pinned."""


class PinAsk(msgspec.Struct, array_like=True, frozen=True, tag="pin_ask"):
    """What are these sections of a file? At most `room` of them I would fetch."""

    number: Count
    file: Task
    length: Count
    wanted: Sections
    room: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0


class PinPut(msgspec.Struct, array_like=True, frozen=True, tag="pin_put"):
    """A section is this. Answered with what is pinned; number 0: no answer is wanted."""

    number: Count
    file: Task
    length: Count
    section: Section
    digests: Digests


class PinAlive(msgspec.Struct, array_like=True, frozen=True, tag="pin_alive"):
    """These sections are coming."""

    file: Task
    sections: Sections


class PinFailed(msgspec.Struct, array_like=True, frozen=True, tag="pin_failed"):
    """These sections are given back."""

    file: Task
    sections: Sections
    reason: Text = ""


class PinAnswer(msgspec.Struct, array_like=True, frozen=True, tag="pin_answer"):
    """Answer to `pin_ask` and `pin_put`; number 0: news of what was waited for."""

    number: Count
    file: Task
    pins: list[Pin]


FromPeer = (
    Hello
    | Join
    | Leave
    | Ask
    | Done
    | Progress
    | Failed
    | Report
    | Ping
    | Preheat
    | Filled
    | PinAsk
    | PinPut
    | PinAlive
    | PinFailed
)
FromScheduler = Welcome | Neighbours | Answer | Order | Revoke | Fill | Preheated | Ping | PinAnswer

_encoder = msgspec.msgpack.Encoder()
_from_peer: msgspec.msgpack.Decoder[FromPeer] = msgspec.msgpack.Decoder(FromPeer)
_from_scheduler: msgspec.msgpack.Decoder[FromScheduler] = msgspec.msgpack.Decoder(FromScheduler)


def encode(message: FromPeer | FromScheduler) -> bytes:
    """Return a message as one frame, its length in front."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise FormatError(f"message {type(message).__name__} of {len(body)} bytes, expected at most {MAX_FRAME}")
    return len(body).to_bytes(4, "big") + body


def decode_from_peer(body: bytes | bytearray | memoryview) -> FromPeer:
    """Return the message of a frame that a scheduler got. Raises FormatError."""
    try:
        return _from_peer.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise FormatError(f"message of {len(body)} bytes is not understood: {error}") from None


def decode_from_scheduler(body: bytes | bytearray | memoryview) -> FromScheduler:
    """Return the message of a frame that a peer got. Raises FormatError."""
    try:
        return _from_scheduler.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise FormatError(f"message of {len(body)} bytes is not understood: {error}") from None
