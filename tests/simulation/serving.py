"""Units from one simulated node to another: a request with its slot, refusal and stall, as p2p/upload.py and p2p/neighbour.py do it, and
following what another node is getting, which passes it on as it comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2p.core.errand import FOLLOW_S
from p2p.core.task import NeighbourView
from p2p.neighbour import STALL_S
from p2p.selection import Run

from .content import right_value
from .links import NOBODY

if TYPE_CHECKING:
    from .node import SimNode
    from .pipeline import Flight

SILENT_S = 6.0
STALL_FACTOR = 4.0
GRACE_S = 0.5
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
        self._taker.exchanges.add(self)
        patience = STALL_FACTOR * (standing.under_way + self._size) / standing.rate
        world.after(max(STALL_S, patience), self._stalled)
        world.after(world.latency(self._taker, giver), self._arrived)

    def _arrived(self) -> None:
        giver, world = self._giver, self._taker.world
        assert giver is not None
        if self._state == OVER:
            return
        if not giver.alive:
            world.after(STALL_S, self._stalled)
        elif giver.behaviour.empty or not giver.claims(self._chunk):
            world.after(world.latency(giver, self._taker), self._refused, False)
        elif giver.uploads >= world.setting.uploads:
            world.after(world.latency(giver, self._taker), self._refused, True)
        else:
            giver.uploads += 1
            self._state = SENDING
            giver.serving.add(self)
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

    def taker_died(self) -> None:
        """Nobody takes it any more."""
        self._end()

    def giver_died(self, *, politely: bool) -> None:
        """Nothing more comes: a connection that is closed is seen at once, one that is silent after STALL_S: a unit is many chunks, and
        each is waited for by itself.
        """
        self._taker.world.after(0.01 if politely else STALL_S, self._stalled)

    def _end(self) -> bool:
        """End it, unless it has ended; return whether anybody waits for it."""
        if self._state == OVER:
            return False
        assert self._view is not None
        self._view.standing.under_way -= self._size
        self._taker.exchanges.discard(self)
        if self._state == SENDING:
            assert self._giver is not None
            self._taker.world.links.stop(self._transfer)
            self._giver.uploads -= 1
            self._giver.serving.discard(self)
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
    """Follow a unit that another node is getting: what has come of it there is sent on, as its chunks are in the daemon."""

    __slots__ = ("_giver", "_moved_at", "_remaining", "_run", "_state", "_taker", "_takes_slot", "_transfer", "view")

    def __init__(self, taker: SimNode, run: Run) -> None:
        self._taker = taker
        self._run = run
        self._giver: SimNode | None = taker.world.nodes.get(run.peer)
        self._state = ASKED
        self._takes_slot = False
        self._transfer = 0
        self._remaining = float(run.size)
        self._moved_at = taker.world.now
        self.view = taker.task.neighbours.get(run.peer)

    def send(self) -> None:
        """Ask."""
        taker, giver = self._taker, self._giver
        taker.exchanges.add(self)
        if giver is None or self.view is None:
            taker.world.after(0, self._ended, True)
        else:
            taker.world.after(taker.world.latency(taker, giver), self._arrived)

    def _arrived(self) -> None:
        giver, chunk, world = self._giver, self._run.first, self._taker.world
        assert giver is not None
        if self._state == OVER:
            return
        back = world.latency(self._taker, giver)
        if not giver.alive:
            world.after(SILENT_S, self._ended, False)
        elif giver.content.has(chunk) and not giver.is_liar:  # an ordinary request
            if giver.uploads >= world.setting.uploads:
                world.after(back, self._ended, True)
            else:
                giver.uploads += 1
                self._takes_slot = True
                self._begin(NOBODY)
        elif giver.is_liar or len(giver.followers.get(chunk, ())) >= giver.most_followers:
            world.after(back, self._ended, True)
        else:
            giver.followers.setdefault(chunk, []).append(self)
            world.after(back, self._began)
            if chunk in giver.incoming:
                self._begin(giver.incoming[chunk])
            elif not giver.is_coming(chunk):
                world.after(GRACE_S, self._after_grace)

    def _after_grace(self) -> None:
        assert self._giver is not None
        if not self._giver.is_coming(self._run.first):
            self.given_up()

    def _began(self) -> None:
        taker = self._taker
        if taker.alive and self._state != OVER:
            taker.perform(taker.core.follow_began(taker.task.task, self._run))

    def supplied(self, transfer: int) -> None:
        """The giver gets it by a transfer (NOBODY: has it): it is passed on."""
        if self._state == ASKED:
            self._begin(transfer)
        elif self._state == SENDING:
            self._taker.world.links.put_behind(self._transfer, transfer)

    def _begin(self, behind: int) -> None:
        taker, giver = self._taker, self._giver
        assert giver is not None
        self._state = SENDING
        self._transfer = taker.world.transfer(giver, taker, self._run.size, self._came, behind)
        taker.supply(self._run.first, self._transfer)

    @property
    def chunk(self) -> int:
        """What is followed."""
        return self._run.first

    def look(self) -> bool:
        """Tell whether more has come since the last look; if nothing has for too long, give up."""
        now, links = self._taker.world.now, self._taker.world.links
        before = self._remaining
        if self._state == SENDING:
            self._remaining = min(before, links.remaining(self._transfer))
        if self._remaining < before:
            self._moved_at = now
            return True
        if now > self._moved_at + FOLLOW_S:
            self.given_up()
        return False

    def given_up(self) -> None:
        """It does not come any more there, or that node is gone."""
        self._ended(False)

    def taker_died(self) -> None:
        """Nobody takes it any more."""
        self._close()

    def _close(self) -> bool:
        """End it, unless it has ended; return whether it had not."""
        if self._state == OVER:
            return False
        taker, giver, chunk = self._taker, self._giver, self._run.first
        if giver is not None:
            waiting = giver.followers.get(chunk)
            if waiting and self in waiting:
                waiting.remove(self)
            giver.uploads -= self._takes_slot
        if self._state == SENDING:
            taker.world.links.stop(self._transfer)
            if taker.incoming.get(chunk) == self._transfer:
                del taker.incoming[chunk]
        self._state = OVER
        taker.exchanges.discard(self)
        return True

    def _ended(self, refused: bool) -> None:
        if self._close() and self._taker.alive:
            taker = self._taker
            taker.perform(taker.core.follow_ended(taker.task.task, self._run, taker.world.now, refused=refused))

    def _came(self) -> None:
        taker, giver, chunk = self._taker, self._giver, self._run.first
        assert giver is not None
        if not self._close() or not taker.alive:
            return
        if not taker.content.has(chunk):
            assert self.view is not None
            self.view.standing.bytes_got += self._run.size
            taker.take(giver, chunk, self._run.size, right_value(chunk))
        taker.perform(taker.core.follow_ended(taker.task.task, self._run, taker.world.now, refused=False))
