"""What a process that serves a kernel tells the daemon of reads that it could serve at once."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from typing import Any, cast

import pytest

from rafsfs.flat.loop import SMALL_HIT, Loop, Served
from rafsfs.format.space_table import SpaceTable, pack_record
from rafsfs.store.space_view import HINT_EVERY, SpaceView

CHUNK = 1 << 20
COUNT = 512


class View:
    """A data space of which the last chunk is missing."""

    space_id = bytes(32)

    def __init__(self) -> None:
        records = (pack_record(bytes([number % 256]) * 32, number * CHUNK, CHUNK) for number in range(COUNT))
        self.table = SpaceTable(b"".join(records), COUNT * CHUNK)

    def touch(self, first: int, stop: int) -> bool:
        return False

    def lacks_ahead(self, offset: int, stop: int) -> bool:
        return True


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Loop, list[int]]]:
    """A loop, and the chunks that the daemon was told of."""
    told: list[int] = []
    reading, writing = os.pipe()
    loop = Loop(
        kernel_fd=reading,
        serve=lambda: Served.OVER,
        views=[cast("SpaceView", View())],
        cache_dir="/nowhere",
        mount="/mnt",
        generation=1,
        argv=(),
        deadline_s=1.0,
    )

    def tell(method: str, params: dict[str, Any]) -> None:
        assert method == "ensure"
        told.append(params["first"])

    monkeypatch.setattr(loop.link, "tell", tell)
    yield loop, told
    os.close(reading)
    os.close(writing)


def test_a_reader_that_goes_on_leads_the_daemon_every_few_chunks(told: tuple[Loop, list[int]]) -> None:
    loop, chunks = told
    for number in range(64):
        loop.hit(0, range(number, number + 1), CHUNK)
    assert chunks[0] == 1, "the second read shows that it goes on"
    assert {later - sooner for sooner, later in itertools.pairwise(chunks)} == {HINT_EVERY // CHUNK}


def test_readers_that_take_turns_are_each_one_that_goes_on(told: tuple[Loop, list[int]]) -> None:
    loop, chunks = told
    for step in range(8):
        for start in (0, 100, 200, 300):
            loop.hit(0, range(start + step, start + step + 1), CHUNK)
    assert {chunk // 100 for chunk in chunks} == {0, 1, 2, 3}


def test_small_reads_within_a_chunk_go_on_too(told: tuple[Loop, list[int]]) -> None:
    loop, chunks = told
    for _ in range(3):
        loop.hit(0, range(7, 8), 4096)
    assert chunks == [7]


def test_random_pages_do_not_wake_the_daemon(told: tuple[Loop, list[int]]) -> None:
    loop, chunks = told
    for number in random.Random(1).sample(range(COUNT), 200):
        loop.hit(0, range(number, number + 1), 4096)
    assert len(chunks) < 20, "a neighbour now and then"
    assert loop.cache_bytes == 200 * 4096


def test_after_a_small_hit_the_next_one_is_looked_for_without_sleeping(
    told: tuple[Loop, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, _ = told
    monkeypatch.setattr(loop, "_may_look", True)
    turns = iter([SMALL_HIT, 4096, SMALL_HIT + 1, 4096])

    def serve() -> Served:
        loop.hit(0, range(0), next(turns))
        return Served.ONE

    monkeypatch.setattr(loop, "_serve", serve)
    assert loop._attend() is Served.ONE
    assert list(turns) == [4096], "a long one ends it"


def test_whoever_has_one_processor_does_not_look(told: tuple[Loop, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = told
    monkeypatch.setattr(loop, "_may_look", False)
    calls = 0

    def serve() -> Served:
        nonlocal calls
        calls += 1
        loop.hit(0, range(0), 4096)
        return Served.ONE

    monkeypatch.setattr(loop, "_serve", serve)
    loop._attend()
    assert calls == 1


def test_requests_without_end_do_not_keep_the_timers_waiting(
    told: tuple[Loop, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, _ = told
    monkeypatch.setattr(loop, "_may_look", True)

    def serve() -> Served:
        loop.hit(0, range(0), 4096)
        return Served.ONE

    monkeypatch.setattr(loop, "_serve", serve)
    assert loop._attend() is Served.ONE, "it comes back by itself"


def test_the_end_is_seen_while_looking(told: tuple[Loop, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = told
    monkeypatch.setattr(loop, "_may_look", True)
    answers = iter([Served.ONE, Served.NOTHING, Served.OVER])
    loop.hit(0, range(0), 4096)
    monkeypatch.setattr(loop, "_serve", lambda: next(answers))
    assert loop._attend() is Served.OVER
