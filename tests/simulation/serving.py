"""Units from one simulated node to another: a request with its slot, refusal and stall, as p2p/upload.py and p2p/neighbour.py do it, and
following what another node is fetching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2p.core.task import NeighbourView
from p2p.neighbour import STALL_S
from p2p.selection import Run
from p2p.upload import FEWEST_FOLLOWERS, FOLLOWERS
from scheduler.engine import LEASE_S

from .content import right_value

if TYPE_CHECKING:
    from .node import SimNode
    from .pipeline import Flight

SILENT_S = 6.0
STALL_FACTOR = 4.0
ASKED, SENDING, OVER = range(3)


class Request:
    """One unit asked of a neighbour."""

    __slots__ = ("_chunk", "_flight", "_giver", "_size", "_started", "_state", "_taker", "_transfer", "_view")

    def __init__(self, taker: SimNode, flight: Flight, run: Run) -> None:
        self._taker = taker
        self._flight = flight
        self._chunk = run.first
        self._size = run.size
        self._view: NeighbourView | None = taker.task.neighbours.get(run.peer)
        self._giver: SimNode | None = taker.world.nodes.get(run.peer)
        self._state = ASKED
        self._transfer = 0
        self._started = taker.world.now

    def send(self) -> None:
        """Ask."""
        world, view, giver = self._taker.world, self._view, self._giver
        if view is None or giver is None:
            world.after(0, self._taker.pipeline.request_over, self._flight)
            return
        standing = view.standing
        standing.under_way += self._size
        patience = STALL_FACTOR * (standing.under_way + self._size) / standing.rate
        world.after(max(STALL_S, patience), self._stalled)
        world.after(world.latency(self._taker, giver), self._arrived)

    def _arrived(self) -> None:
        giver, world = self._giver, self._taker.world
        assert giver is not None
        if not giver.alive or self._state == OVER:
            return
        if giver.behaviour.empty or not giver.claims(self._chunk):
            world.after(world.latency(giver, self._taker), self._refused, False)
        elif giver.uploads >= world.setting.uploads:
            world.after(world.latency(giver, self._taker), self._refused, True)
        else:
            giver.uploads += 1
            self._state = SENDING
            self._transfer = world.transfer(giver, self._taker, self._size, self._came)

    def _refused(self, is_busy: bool) -> None:
        if self._end():
            taker = self._taker
            assert self._view is not None
            if is_busy:
                taker.core.was_busy(self._view, taker.world.now)
            else:
                taker.perform(taker.core.was_absent(taker.task, self._view, self._chunk, taker.world.now))
            taker.pipeline.request_over(self._flight)

    def _stalled(self) -> None:
        if self._end():
            taker = self._taker
            assert self._view is not None
            taker.perform(taker.core.was_stalled(taker.task, self._view, taker.world.now))
            taker.pipeline.request_over(self._flight)

    def _end(self) -> bool:
        """End it, unless it has ended; return whether anybody waits for it."""
        if self._state == OVER:
            return False
        assert self._view is not None
        self._view.standing.under_way -= self._size
        if self._state == SENDING:
            assert self._giver is not None
            self._taker.world.links.stop(self._transfer)
            self._giver.uploads -= 1
        self._state = OVER
        return self._taker.alive

    def _came(self) -> None:
        taker, giver, view, world = self._taker, self._giver, self._view, self._taker.world
        assert giver is not None
        assert view is not None
        if not self._end():
            return
        view.standing.note(self._size, world.now - self._started)
        value = right_value(self._chunk) ^ (1 if giver.behaviour.corrupt else 0)
        if not taker.content.has(self._chunk) and not taker.take(giver, self._chunk, self._size, value):
            taker.perform(taker.core.was_corrupt(taker.task, view))
        taker.pipeline.request_over(self._flight)


class Follow:
    """Follow a unit that another node is fetching: it is sent on when it is there whole, since a unit here is as large as a group."""

    __slots__ = ("_giver", "_run", "_taker")

    def __init__(self, taker: SimNode, run: Run) -> None:
        self._taker = taker
        self._run = run
        self._giver: SimNode | None = taker.world.nodes.get(run.peer)

    def send(self) -> None:
        """Ask."""
        self._taker.world.after(self._latency, self._arrived)

    @property
    def _latency(self) -> float:
        return self._taker.world.latency(self._taker, self._giver) if self._giver is not None else 0.0

    def _ended(self, refused: bool) -> None:
        taker = self._taker
        if taker.alive:
            taker.perform(taker.core.follow_ended(taker.task.task, self._run, taker.world.now, refused=refused))

    def _arrived(self) -> None:
        giver, chunk, world = self._giver, self._run.first, self._taker.world
        if giver is None or not giver.alive:
            world.after(SILENT_S, self._ended, False)
            return
        waiting = giver.followers.get(chunk, [])
        enough = max(FEWEST_FOLLOWERS, FOLLOWERS // max(1, len(giver.task.leases)))
        if giver.content.has(chunk):
            self.begin()
        elif chunk not in giver.task.leases or giver.is_liar or len(waiting) >= enough:
            world.after(self._latency, self._ended, True)
        else:
            giver.followers.setdefault(chunk, []).append(self)
            world.after(LEASE_S, self._late)

    def begin(self) -> None:
        """It is there: it is sent."""
        giver, world = self._giver, self._taker.world
        assert giver is not None
        if giver.alive:
            world.transfer(giver, self._taker, self._run.size, self._came)
        else:
            world.after(SILENT_S, self._ended, False)

    def _came(self) -> None:
        taker, giver, chunk = self._taker, self._giver, self._run.first
        assert giver is not None
        if not taker.alive:
            return
        if not taker.content.has(chunk):
            value = right_value(chunk) ^ (1 if giver.behaviour.corrupt else 0)
            taker.take(giver, chunk, self._run.size, value)
        self._ended(False)

    def _late(self) -> None:
        """It has been given up there."""
        if self._run.first in self._taker.task.followed:
            self._ended(False)
