"""Readahead: nothing for the first access, a growing window for a stream."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.fetch.readahead import Readahead


def test_the_first_access_fetches_nothing_extra() -> None:
    ahead = Readahead(1000, 32, 0)
    assert list(ahead.advance(0, 1, range(1000))) == []
    assert list(ahead.advance(500, 502, range(1000))) == []


def test_a_stream_from_the_start_of_its_file_is_fetched_ahead_of_at_once_up_to_the_limit() -> None:
    ahead = Readahead(10_000, 16, 6)
    seen: list[int] = []
    for number in range(100, 140):
        asked = ahead.advance(number, number + 1, range(100, 10_000))
        seen += list(asked)
        assert asked.stop <= number + 1 + min(16, 2 * (number - 99)) or not asked
    assert seen == sorted(set(seen))
    assert seen[0] == 102
    assert max(seen) == 139 + 16


def test_a_stream_from_inside_a_file_waits_until_it_has_come_a_good_way() -> None:
    ahead = Readahead(10_000, 16, 3)
    asked = [list(ahead.advance(number, number + 1, range(10_000))) for number in range(50, 56)]
    assert asked[:3] == [[], [], []]
    assert asked[3][0] == 54


def test_nothing_past_the_file() -> None:
    ahead = Readahead(10_000, 64, 0)
    seen = [index for number in range(8) for index in ahead.advance(number, number + 1, range(10))]
    assert max(seen) == 9


def test_two_interleaved_streams_are_two_streams() -> None:
    ahead = Readahead(10_000, 8, 2)
    low, high = [], []
    for number in range(10):
        low += ahead.advance(number, number + 1, range(10_000))
        high += ahead.advance(5000 + number, 5001 + number, range(5000, 10_000))
    assert low
    assert [index - 5000 for index in high] == low


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 199), st.integers(1, 4)), max_size=60), st.integers(1, 64))
def test_whatever_is_asked_for_lies_ahead_inside_the_file_and_the_limit(
    demands: list[tuple[int, int]], limit: int
) -> None:
    ahead = Readahead(200, limit, 1)
    for first, count in demands:
        stop = min(200, first + count)
        asked = ahead.advance(first, stop, range(first, 190))
        assert all(stop <= index < min(190, stop + limit) for index in asked)


def test_a_small_step_keeps_nearly_all_of_the_window_asked_for() -> None:
    ahead = Readahead(10_000, 64, 0, step=4)
    asked_to = 0
    for number in range(200):
        asked_to = max(asked_to, ahead.advance(number, number + 1, range(10_000)).stop)
        if number > 64:
            assert asked_to >= number + 1 + 60
