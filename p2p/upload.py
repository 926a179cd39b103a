"""What a peer gives to others: chunks that it has verified, and its have-maps, to those who can prove that they know the content table.

Decided here: slots, and what is refused how. Concurrency: handlers run in the tasks of the HTTP server; slots are counted without a
checkpoint. A descriptor is duplicated for each answer, so that a data space may be closed while its last bytes go out.
"""

from __future__ import annotations

import hmac
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import contextmanager
from typing import Final

import trio

from rafsfs.errors import CacheError
from rafsfs.net.http_server import Answer, FileParts, FileRange, Request
from rafsfs.store.data_space import DataSpace

from .entitlement import proof, whole_proof
from .have import Subscriber, all_frame, pending_frame, relayed_frame
from .protocol.groups import group_of, pack_bits

SLOTS: Final = 16
"""Answers with chunks at once: more divide a link into pieces so small that no chunk is whole for long."""
SMALL_SLOTS: Final = 4
"""Of these, kept for requests of up to SMALL chunks: readers that wait."""
SMALL: Final = 2
FOLLOWERS: Final = 16
"""Who follows what is being fetched here, divided by the groups that are: more would get it no sooner than from each other."""
FEWEST_FOLLOWERS: Final = 2
"""Of one group, however many there are."""
_GRACE_S: Final = 0.5
"""How long somebody may follow a group that is not being fetched here: the scheduler may have told him before us."""
KEEP_ALIVE_S: Final = 2.0
_CHUNKS: Final = re.compile(r"\A/v1/([0-9a-f]{64})/([0-9]{1,9})-([0-9]{1,9})/([0-9a-f]{32})\Z")
_HAVE: Final = re.compile(r"\A/v1/([0-9a-f]{64})/have/([0-9a-f]{32})\Z")


class Uploads:
    """Answers requests of peers."""

    def __init__(
        self,
        find_space: Callable[[bytes], DataSpace | None],
        pending: Callable[[bytes], list[int]],
        token: str,
        *,
        seed: bool = False,
    ) -> None:
        self._is_seed = seed
        """Whether all turn here at once: then what is here goes to few who follow it, and from them to the others."""
        self._find_space = find_space
        self._pending = pending
        self._token = token
        self._busy = 0
        self._subscribers: dict[bytes, set[Subscriber]] = {}
        self._relayed: dict[bytes, dict[int, int]] = {}
        """Of task, groups that are followed here, and at what depth."""
        self._shown_pending: dict[bytes, set[int]] = {}
        """Of task, groups that are fetched here, as neighbours have been or will be told."""
        self._followers: defaultdict[tuple[bytes, int], list[trio.Event]] = defaultdict(list)
        """Of task and group: each is set when there may be more to send."""
        self.counters: Counter[str] = Counter()

    async def handle(self, request: Request) -> Answer:
        """Answer one request."""
        if self._token and not hmac.compare_digest(
            request.headers.get("authorization", "").encode(), f"Bearer {self._token}".encode()
        ):
            return Answer(401, b"a token is needed\n")
        match = _CHUNKS.match(request.path)
        if match:
            follow = request.headers.get("rafs-follow") == "1"
            return self._chunks(bytes.fromhex(match[1]), int(match[2]), int(match[3]), match[4], follow=follow)
        match = _HAVE.match(request.path)
        if match:
            return self._have(bytes.fromhex(match[1]), match[2])
        return Answer(404, b"no such thing here\n")

    @property
    def busy(self) -> int:
        """Slots in use."""
        return self._busy

    def landed(self, space_id: bytes, chunk: int, group: int, *, prompt: bool) -> None:
        """Send a chunk that has come to who follows its group, and tell all who listen: `prompt` if they cannot have it elsewhere, unless
        somebody gets it anyway, who passes it on. No checkpoint.
        """
        followers = self._followers.get((space_id, group), ())
        for event in followers:
            event.set()
        listeners = self._subscribers.get(space_id, ())
        prompt = prompt and not followers
        for subscriber in listeners:
            subscriber.add(chunk, prompt=prompt)

    def drop(self, space_id: bytes) -> None:
        """End the have-maps of a data space that is no longer offered. No checkpoint."""
        self._relayed.pop(space_id, None)
        self._shown_pending.pop(space_id, None)
        self.end_have_maps(space_id)

    def end_have_maps(self, space_id: bytes) -> None:
        """End the have-maps of a data space: who listens asks again, and is told the whole map anew. No checkpoint."""
        for subscriber in self._subscribers.get(space_id, ()):
            subscriber.end()

    def set_pending(self, space_id: bytes, groups: list[int]) -> None:
        """Tell all who listen what is being fetched: at once what is new, with other news what is not fetched any more, since whoever asks
        for that gets what is there. No checkpoint.
        """
        prompt = not self._shown_pending.get(space_id, set()).issuperset(groups)
        self._shown_pending[space_id] = set(groups)
        for subscriber in self._subscribers.get(space_id, ()):
            subscriber.set_pending(groups, prompt=prompt)
        self._wake_followers(space_id)

    def set_relayed(self, space_id: bytes, depths: dict[int, int]) -> None:
        """Tell all who listen what is being followed, and may be followed here, likewise. No checkpoint."""
        prompt = not self._relayed.get(space_id, {}).keys() >= depths.keys()
        if depths:
            self._relayed[space_id] = depths
        else:
            self._relayed.pop(space_id, None)
        for subscriber in self._subscribers.get(space_id, ()):
            subscriber.set_relayed(depths, prompt=prompt)
        self._wake_followers(space_id)

    def _wake_followers(self, space_id: bytes) -> None:
        """Let those see that nothing more comes who follow what is not being got any more."""
        for (task, group), followers in self._followers.items():
            if task == space_id and not self._is_coming(space_id, group):
                for event in followers:
                    event.set()

    def _is_coming(self, space_id: bytes, group: int) -> bool:
        return group in self._pending(space_id) or group in self._relayed.get(space_id, ())

    def _chunks(self, space_id: bytes, first: int, last: int, shown: str, *, follow: bool) -> Answer:
        space = self._find_space(space_id)
        if space is None or not _proves(space, first, last, shown):
            return Answer(404, b"no such thing here\n")
        count = 0
        while first + count <= last and space.is_present(first + count):
            count += 1
        if follow and (first + count <= last or self._is_seed):
            return self._pass_on(space, first, last)
        if not count:
            return Answer(409, b"the chunk is not here\n")
        small = last - first < SMALL
        if self._busy >= (SLOTS if small else SLOTS - SMALL_SLOTS):
            self.counters["refused"] += 1
            return Answer(503, b"all slots are busy\n", {"Retry-After": "1"})
        offset = space.table.extent(first)[0]
        end = sum(space.table.extent(first + count - 1))
        try:
            fd = space.duplicate()
        except CacheError:  # evicted just now
            return Answer(404, b"no such thing here\n")
        space.touch()
        self._busy += 1
        self.counters["requests"] += 1
        self.counters["bytes"] += end - offset

        def released() -> None:
            self._busy -= 1
            os.close(fd)

        return Answer(200, FileRange(fd, offset, end - offset, released), {"Rafs-Chunks": str(count)})

    def _pass_on(self, space: DataSpace, first: int, last: int) -> Answer:
        """Answer with chunks that are here and others that are to come, if any are."""
        group = group_of(space.table.extent(first)[0])
        key = (space.space_id, group)
        sent = {of for task, of in self._followers if task == space.space_id and self._is_seed}
        coming = len(sent.union(self._pending(space.space_id), self._relayed.get(space.space_id, ())))
        if group_of(space.table.extent(last)[0]) != group:
            return Answer(409, b"more than a group cannot be followed\n")
        if len(self._followers.get(key, ())) >= max(FEWEST_FOLLOWERS, FOLLOWERS // max(1, coming)):
            return Answer(409, b"enough follow already\n")
        start, end = space.table.extent(first)[0], sum(space.table.extent(last))
        try:
            fd = space.duplicate()
        except CacheError:  # evicted just now
            return Answer(404, b"no such thing here\n")
        space.touch()
        self.counters["followed"] += 1
        event = trio.Event()
        self._followers[key].append(event)
        slot = [event]

        def released() -> None:
            self._followers[key].remove(slot[0])
            if not self._followers[key]:
                del self._followers[key]
            os.close(fd)

        parts = self._as_they_come(space, first, last, key, slot)
        return Answer(200, FileParts(fd, end - start, parts, released), {"Rafs-Chunks": str(last - first + 1)})

    async def _as_they_come(
        self, space: DataSpace, first: int, last: int, key: tuple[bytes, int], slot: list[trio.Event]
    ) -> AsyncGenerator[tuple[int, int]]:
        """Yield ranges of the chunks as they come; end early when they do not come any more. `slot` holds the event that tells of more."""
        position = space.table.extent(first)[0]
        grace = trio.current_time() + _GRACE_S
        while first <= last:
            count = 0
            while first + count <= last and space.is_present(first + count):
                count += 1
            if count:
                end = sum(space.table.extent(first + count - 1))
                self.counters["bytes"] += end - position
                yield position, end - position
                position = end
                first += count
                continue
            if not self._is_coming(*key) and trio.current_time() >= grace:
                return
            with trio.move_on_at(math.inf if self._is_coming(*key) else grace):
                await slot[0].wait()
            following = trio.Event()
            followers = self._followers[key]
            followers[followers.index(slot[0])] = following
            slot[0] = following

    def _have(self, space_id: bytes, shown: str) -> Answer:
        space = self._find_space(space_id)
        if space is None or not hmac.compare_digest(whole_proof(space.table), shown):
            return Answer(404, b"no such thing here\n")
        return Answer(200, self._stream(space))

    async def _stream(self, space: DataSpace) -> AsyncIterator[bytes]:
        with self._subscribed(space.space_id) as subscriber:
            present = [chunk for chunk in range(space.table.count) if space.is_present(chunk)]
            yield all_frame(pack_bits(present, space.table.count)) + pending_frame(self._pending(space.space_id))
            yield relayed_frame(self._relayed.get(space.space_id, {}))
            while not subscriber.ended:
                yield await subscriber.next(KEEP_ALIVE_S)
                self.counters["news"] += 1

    @contextmanager
    def _subscribed(self, space_id: bytes):  # type: ignore[no-untyped-def]
        subscriber = Subscriber()
        listeners = self._subscribers.setdefault(space_id, set())
        listeners.add(subscriber)
        try:
            yield subscriber
        finally:
            listeners.discard(subscriber)
            if not listeners:
                self._subscribers.pop(space_id, None)


def _proves(space: DataSpace, first: int, last: int, shown: str) -> bool:
    try:
        return hmac.compare_digest(proof(space.table, first, last), shown)
    except IndexError:
        return False
