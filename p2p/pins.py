"""Asking schedulers what files of web servers are. Implements `rafsfs.interfaces.Pins`; docs/protocol/get.md.

Decided here: how long an answer is waited for, and that what does not fit a question is dropped. The scheduler of a file is the one
that rendezvous hashing names for its key.

Concurrency: one trio run; the table of open questions changes between checkpoints. A cancelled question is forgotten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import trio

from rafsfs.interfaces import SectionRuling

from .link import ASK_S, Links
from .protocol.messages import FromPeer, Pin, PinAlive, PinAnswer, PinAsk, PinFailed, PinPut, PinVerdict


class PinDesk:
    """All questions of a node. `links` returns the schedulers, None while none has been named."""

    def __init__(self, links: Callable[[], Links | None]) -> None:
        self._links = links
        self._numbers = itertools.count(1)
        self._asked: dict[int, trio.Event] = {}
        self._answers: dict[int, PinAnswer] = {}
        self.news: Callable[[bytes, SectionRuling], None] = lambda file, ruling: None
        self.connected: Callable[[], None] = lambda: None

    async def ask(self, file: bytes, length: int, sections: list[int], room: int) -> list[SectionRuling] | None:
        """Return what is known of sections, None if no scheduler answers."""
        answer = await self._question(file, lambda number: PinAsk(number, file, length, sections, room))
        return None if answer is None else [_ruling(pin) for pin in answer.pins if pin.section in sections]

    async def publish(self, file: bytes, length: int, section: int, digests: bytes) -> bytes | None:
        """Say what a section is; return what holds, None if no scheduler answers."""
        answer = await self._question(file, lambda number: PinPut(number, file, length, section, digests))
        pins = answer.pins if answer is not None else []
        return next((pin.digests for pin in pins if pin.section == section), None)

    def republish(self, file: bytes, length: int, section: int, digests: bytes) -> None:
        """Say it again. No checkpoint."""
        self._send(file, PinPut(0, file, length, section, digests))

    def alive(self, file: bytes, sections: list[int]) -> None:
        """Say that sections are coming. No checkpoint."""
        self._send(file, PinAlive(file, sections))

    def give_back(self, file: bytes, sections: list[int], cause: str) -> None:
        """Say that sections do not come. No checkpoint."""
        self._send(file, PinFailed(file, sections, cause[:400]))

    def received(self, message: PinAnswer) -> None:
        """Take what a scheduler says. No checkpoint."""
        event = self._asked.get(message.number)
        if message.number == 0:
            for pin in message.pins:
                self.news(message.file, _ruling(pin))
        elif event is not None:
            self._answers[message.number] = message
            event.set()

    async def _question(self, file: bytes, make: Callable[[int], FromPeer]) -> PinAnswer | None:
        number = next(self._numbers)
        event = self._asked[number] = trio.Event()
        try:
            if not self._send(file, make(number)):
                return None
            with trio.move_on_after(ASK_S):
                await event.wait()
            answer = self._answers.get(number)
            return answer if answer is not None and answer.file == file else None
        finally:
            self._asked.pop(number, None)
            self._answers.pop(number, None)

    def _send(self, file: bytes, message: FromPeer) -> bool:
        links = self._links()
        return links is not None and links.send(links.home(file), message)


def _ruling(pin: Pin) -> SectionRuling:
    digests = pin.digests if pin.verdict is PinVerdict.PINNED else None
    return SectionRuling(pin.section, digests, pin.verdict is PinVerdict.LEASE)
