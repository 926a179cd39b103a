"""Reads that come right after one that failed: the kernel's own, other readers of the page, and readers that come anew."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.flat.chances import PAUSE_S, SHORT_S, Chances

WHOLE_S = 5.0
CHUNKS = range(3, 5)
KERNEL = 0.001
"""Seconds after which the kernel asks again."""


def failed(chances: Chances, reader: int, now: float) -> float:
    """Let a reader wait in vain; return when that is over."""
    grant = chances.grant(0, CHUNKS, reader, now)
    chances.note(0, CHUNKS, {reader}, grant, now + grant.deadline_s)
    return now + grant.deadline_s


def test_a_reader_waits_one_deadline_though_the_kernel_asks_twice() -> None:
    chances = Chances(WHOLE_S)
    now = failed(chances, 7, 100.0)
    assert chances.grant(0, range(3, 4), 7, now + KERNEL).deadline_s == SHORT_S


def test_another_reader_right_after_it_has_the_whole_deadline() -> None:
    chances = Chances(WHOLE_S)
    now = failed(chances, 7, failed(chances, 7, 100.0) + KERNEL)
    assert chances.grant(0, CHUNKS, 8, now + KERNEL).deadline_s == pytest.approx(WHOLE_S)


def test_a_reader_who_tries_again_of_his_own_has_the_whole_deadline() -> None:
    chances = Chances(WHOLE_S)
    now = failed(chances, 7, failed(chances, 7, 100.0) + KERNEL)
    assert chances.grant(0, CHUNKS, 7, now + KERNEL).deadline_s == pytest.approx(WHOLE_S)
    assert chances.grant(0, CHUNKS, 7, now + 2 * PAUSE_S).deadline_s == WHOLE_S


def test_what_was_not_part_of_the_failure_has_the_whole_deadline() -> None:
    chances = Chances(WHOLE_S)
    now = failed(chances, 7, 100.0)
    for space, chunks in ((1, CHUNKS), (0, range(5, 6)), (0, range(3, 6))):
        assert chances.grant(space, chunks, 7, now + KERNEL).deadline_s == WHOLE_S


@given(st.integers(1, 30), st.sampled_from([0.2, 1.0, 5.0, 60.0]))
def test_readers_of_one_page_share_one_more_deadline(readers: int, whole_s: float) -> None:
    """The kernel lets them ask one after the other, each of them once more for itself."""
    chances = Chances(whole_s)
    now = 100.0
    for reader in range(readers):
        now = failed(chances, reader, now) + KERNEL
        now = failed(chances, reader, now) + KERNEL
    assert now - 100.0 <= 2 * whole_s + 2 * readers * (SHORT_S + KERNEL)
