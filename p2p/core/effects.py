"""What a peer decides to do, as values: its shell performs them in order, without a checkpoint between."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.messages import FromPeer
from ..selection import Run
from .task import NeighbourView


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the scheduler of a task. If it cannot be queued there, tell the core (`PeerCore.unsent`)."""

    task: bytes
    message: FromPeer


@dataclass(frozen=True, slots=True)
class Requeue:
    """Give a chunk that has waited back to the fetch pipeline."""

    task: bytes
    chunk: int


@dataclass(frozen=True, slots=True)
class FillGroup:
    """Have chunks fetched that are ours to fetch, whether anybody here reads them or not."""

    task: bytes
    chunks: list[int]


@dataclass(frozen=True, slots=True)
class ShowPending:
    """Tell all who listen which groups are being fetched from the registry here."""

    task: bytes
    groups: list[int]


@dataclass(frozen=True, slots=True)
class ShowRelayed:
    """Tell all who listen which groups are being followed here, and at what depth: others may follow them here."""

    task: bytes
    depths: dict[int, int]


@dataclass(frozen=True, slots=True)
class Listen:
    """Listen to the have-map of a new neighbour."""

    task: bytes
    neighbour: NeighbourView


@dataclass(frozen=True, slots=True)
class Follow:
    """Take chunks from a neighbour that is getting them, as they come; say when it begins (`PeerCore.follow_began`) and how it ended
    (`PeerCore.follow_ended`).
    """

    task: bytes
    run: Run


Effect = Send | Requeue | FillGroup | ShowPending | ShowRelayed | Listen | Follow
Effects = list[Effect]
