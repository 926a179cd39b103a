"""News of a have-map: what matters is told at once, the rest is gathered, nothing is lost."""

from __future__ import annotations

import trio
import trio.testing

from p2p.have import LAZY_S, PROMPT_S, HaveReader, Subscriber, relayed_frame

KEEP_ALIVE_S = 2.0


async def told(subscriber: Subscriber, reader: HaveReader) -> tuple[float, list[int]]:
    """Return how long the next frames took and which chunks they bring."""
    started = trio.current_time()
    frames = await subscriber.next(KEEP_ALIVE_S)
    return trio.current_time() - started, reader.feed(frames)


async def test_news_that_others_have_too_are_gathered(autojump_clock: trio.testing.MockClock) -> None:
    subscriber, reader = Subscriber(), HaveReader(bytearray(100))
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _come() -> None:
            for chunk in range(5):
                subscriber.add(chunk, prompt=False)
                await trio.sleep(LAZY_S / 10)

        seconds, chunks = await told(subscriber, reader)
    assert chunks == [0, 1, 2, 3, 4]
    assert abs(seconds - LAZY_S) < 1e-6


async def test_news_that_all_wait_for_take_the_others_along(autojump_clock: trio.testing.MockClock) -> None:
    subscriber, reader = Subscriber(), HaveReader(bytearray(100))
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _come() -> None:
            subscriber.add(1, prompt=False)
            await trio.sleep(LAZY_S / 2)
            subscriber.add(2, prompt=True)

        seconds, chunks = await told(subscriber, reader)
    assert chunks == [1, 2]
    assert abs(seconds - LAZY_S / 2 - PROMPT_S) < 1e-6


async def test_what_comes_while_nobody_listens_is_told_next(autojump_clock: trio.testing.MockClock) -> None:
    subscriber, reader = Subscriber(), HaveReader(bytearray(100))
    subscriber.add(7, prompt=True)
    await trio.sleep(1)
    seconds, chunks = await told(subscriber, reader)
    assert (seconds, chunks) == (0, [7])


async def test_what_is_followed_is_told_with_its_depth_and_replaces_what_was_told_before() -> None:
    subscriber, reader = Subscriber(), HaveReader(bytearray(100))
    subscriber.set_relayed({3: 1, 9: 2})
    await told(subscriber, reader)
    assert reader.relayed == {3: 1, 9: 2}
    subscriber.set_relayed({9: 1})
    subscriber.add(5, prompt=True)
    assert (await told(subscriber, reader))[1] == [5]
    assert reader.relayed == {9: 1}
    subscriber.set_relayed({})
    await told(subscriber, reader)
    assert reader.relayed == {}


def test_nobody_is_at_the_registry_who_only_follows() -> None:
    reader = HaveReader(bytearray(100))
    reader.feed(relayed_frame({1: 0, 2: -5, 3: 1}) + relayed_frame({4: 1 << 62}))
    assert reader.relayed == {4: 1 << 62}
    reader.feed(relayed_frame({1: 0, 2: -5, 3: 1}))
    assert reader.relayed == {3: 1}


async def test_without_news_there_is_a_sign_of_life(autojump_clock: trio.testing.MockClock) -> None:
    subscriber = Subscriber()
    started = trio.current_time()
    assert await subscriber.next(KEEP_ALIVE_S)
    assert trio.current_time() - started == KEEP_ALIVE_S
