"""Readahead: nothing for a first access, the tensor that was touched, a growing window for a stream, the next steps of a stride."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.fetch.readahead import LEAD, MARGIN_BYTES, QUIET_BYTES, Readahead, Span

MIB = 1 << 20
GIB = 1 << 30
LIMIT = 32 * MIB
WHOLE: Span = (0, GIB)


def read(
    ahead: Readahead, first: int, stop: int, own: Span = WHOLE, tensor: Span | None = None, following: int = 0
) -> list[Span]:
    return ahead.advance(first, stop, own, limit=LIMIT, step=MIB, tensor=tensor, following=following)


def stream(ahead: Readahead, start: int, count: int, own: Span = WHOLE) -> list[Span]:
    return [span for n in range(count) for span in read(ahead, start + n * MIB, start + (n + 1) * MIB, own)]


def test_the_first_access_of_a_file_that_is_not_understood_fetches_nothing_extra() -> None:
    ahead = Readahead(GIB)
    assert read(ahead, 0, MIB) == []
    assert read(ahead, 500 * MIB, 502 * MIB) == []


def test_a_stream_from_the_start_of_its_file_is_fetched_ahead_of_at_once_up_to_the_limit() -> None:
    ahead = Readahead(GIB)
    asked = stream(ahead, 0, 100)
    assert asked[0] == (2 * MIB, 6 * MIB)
    assert all(before[1] == after[0] for before, after in pairwise(asked))
    assert asked[-1][1] == 100 * MIB + LIMIT


def test_a_stream_from_inside_a_file_waits_until_it_has_come_a_good_way() -> None:
    ahead = Readahead(GIB)
    quiet = QUIET_BYTES // MIB
    assert stream(ahead, 50 * MIB, quiet) == []
    assert read(ahead, (50 + quiet) * MIB, (51 + quiet) * MIB)[0][0] == (51 + quiet) * MIB


def test_a_reader_gets_the_rest_of_the_tensor_that_it_touches_and_nothing_of_the_next() -> None:
    ahead = Readahead(GIB)
    tensor = (100 * MIB, 109 * MIB)
    assert read(ahead, 100 * MIB, 101 * MIB, tensor=tensor) == [(101 * MIB, 109 * MIB)]
    assert read(ahead, 109 * MIB, 110 * MIB, tensor=(109 * MIB, 120 * MIB)) == [], (
        "the kernel reads ahead as far as that"
    )
    assert read(ahead, 500 * MIB, 501 * MIB, tensor=(499 * MIB, 503 * MIB)) == [(501 * MIB, 503 * MIB)]


def test_a_tensor_longer_than_the_window_is_fetched_by_the_window() -> None:
    ahead = Readahead(GIB)
    tensor = (100 * MIB, 900 * MIB)
    assert read(ahead, 100 * MIB, 101 * MIB, tensor=tensor) == [(101 * MIB, 101 * MIB + LIMIT)]


def test_a_stream_that_has_come_far_behind_its_tensor_is_fetched_ahead_of_across_tensors() -> None:
    ahead = Readahead(GIB)
    first, far = (100 * MIB, 110 * MIB), 110 * MIB + MARGIN_BYTES
    read(ahead, 100 * MIB, 110 * MIB, tensor=first)
    read(ahead, 110 * MIB, far, tensor=(110 * MIB, far))
    assert read(ahead, far, far + MIB, tensor=(far, far + 2 * MIB)) == [(far + MIB, far + MIB + 30 * MIB)]


def test_who_touches_the_end_of_each_tensor_before_its_middle_is_one_stream() -> None:
    """So memcpy copies, and so do loaders that map a file."""
    ahead = Readahead(GIB)
    tensors = [(n * 4 * MIB, (n + 1) * 4 * MIB) for n in range(8)]
    spans = []
    for low, high in tensors:
        for first in (low, high - MIB, low + MIB, low + 2 * MIB):
            spans += read(ahead, first, first + MIB, tensor=(low, high))
    assert len(ahead._streams) == 1
    assert spans[-1][1] > 32 * MIB + LIMIT // 2
    assert sum(high - low for low, high in spans) <= spans[-1][1]


def test_what_was_refused_is_asked_for_again() -> None:
    ahead = Readahead(GIB)
    stream(ahead, 0, 2)
    ahead.retreat(3 * MIB)
    assert read(ahead, 2 * MIB, 3 * MIB)[0][0] == 3 * MIB


def test_one_tensor_at_the_end_of_a_file_does_not_lead_into_the_next_one() -> None:
    ahead = Readahead(GIB)
    files = (0, 100 * MIB), (100 * MIB, 200 * MIB)
    read(ahead, 98 * MIB, 100 * MIB, files[0], tensor=(98 * MIB, 100 * MIB), following=200 * MIB)
    header = (100 * MIB, 100 * MIB + 4096)
    assert read(ahead, 100 * MIB, 101 * MIB, files[1], tensor=header, following=300 * MIB) == []


def test_little_past_the_file_until_a_stream_has_gone_on_into_the_next() -> None:
    ahead = Readahead(GIB)
    files = [(0, 10 * MIB), (10 * MIB, 20 * MIB), (20 * MIB, 30 * MIB)]
    seen = [span for n in range(10) for span in read(ahead, n * MIB, (n + 1) * MIB, files[0], following=20 * MIB)]
    assert 10 * MIB < max(stop for _, stop in seen) <= 10 * MIB + 10 * MIB // LEAD
    seen = [span for n in range(10, 20) for span in read(ahead, n * MIB, (n + 1) * MIB, files[1], following=30 * MIB)]
    assert max(stop for _, stop in seen) == 30 * MIB


def test_nothing_past_the_file_for_who_has_not_read_it_from_its_start() -> None:
    ahead = Readahead(GIB)
    files = (10 * MIB, 60 * MIB), (60 * MIB, 90 * MIB)
    seen = [span for n in range(12, 60) for span in read(ahead, n * MIB, (n + 1) * MIB, files[0], following=90 * MIB)]
    assert max(stop for _, stop in seen) == 60 * MIB


def test_two_interleaved_streams_are_two_streams() -> None:
    ahead = Readahead(GIB)
    low, high = [], []
    half = GIB // 2
    for n in range(10):
        low += read(ahead, n * MIB, (n + 1) * MIB, (0, half))
        high += read(ahead, half + n * MIB, half + (n + 1) * MIB, (half, GIB))
    assert low
    assert [(first - half, stop - half) for first, stop in high] == low


def test_the_third_step_of_one_distance_brings_the_next_ones() -> None:
    ahead = Readahead(GIB)
    assert read(ahead, 100 * MIB, 101 * MIB) == []
    assert read(ahead, 150 * MIB, 151 * MIB) == []
    assert read(ahead, 200 * MIB, 201 * MIB)[:2] == [(250 * MIB, 251 * MIB), (300 * MIB, 301 * MIB)]


def test_steps_of_a_stride_stay_in_their_file_and_their_window() -> None:
    ahead = Readahead(GIB)
    own = (100 * MIB, 260 * MIB)
    for start in (100, 150, 200):
        spans = read(ahead, start * MIB, (start + 1) * MIB, own)
    assert spans == [(250 * MIB, 251 * MIB)]


places = st.integers(0, 199)
demands = st.lists(st.tuples(places, st.integers(1, 4), st.booleans()), max_size=60)


@settings(max_examples=200, deadline=None)
@given(demands, st.integers(1, 64), st.integers(1, 64))
def test_whatever_is_asked_for_lies_in_the_file_and_no_further_ahead_than_the_limit(
    demands: list[tuple[int, int, bool]], limit: int, step: int
) -> None:
    """Files of 50 and tensors of 7 MiB; a stride may look further, but at no more than the limit."""
    ahead = Readahead(200 * MIB)
    for first, count, understood in demands:
        own = (first // 50 * 50, first // 50 * 50 + 50)
        stop = min(own[1], first + count)
        tensor = (max(own[0], first // 7 * 7) * MIB, min(own[1], first // 7 * 7 + 7) * MIB) if understood else None
        spans = ahead.advance(
            first * MIB,
            stop * MIB,
            (own[0] * MIB, own[1] * MIB),
            limit=limit * MIB,
            step=step * MIB,
            tensor=tensor,
            following=min(200, own[1] + 50) * MIB,
        )
        assert all(0 <= low < high <= min(200, own[1] + 50) * MIB for low, high in spans)
        assert all(low >= stop * MIB or high <= first * MIB for low, high in spans)
        assert sum(high - low for low, high in spans) <= 2 * limit * MIB


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 100), st.integers(1, 90))
def test_a_stream_is_asked_ahead_of_once_and_never_further_than_twice_its_length(start: int, count: int) -> None:
    ahead = Readahead(GIB)
    asked: list[Span] = []
    for n in range(count):
        at = (start + n) * MIB
        spans = read(ahead, at, at + MIB, own=(start * MIB, GIB))
        assert all(stop <= at + MIB + 2 * (n + 1) * MIB for _, stop in spans)
        asked += spans
    assert all(before[1] <= after[0] for before, after in pairwise(asked))


def through(ahead: Readahead, start: int, stop: int, tensors: list[Span]) -> int:
    """Read [start, stop) as a reader does, a MiB at a time, and return how far was asked for ahead of him, beyond `stop`."""
    furthest = stop
    for first in range(start, stop, MIB):
        tensor = next(span for span in tensors if span[0] <= first < span[1])
        for _, end in read(ahead, first, min(first + MIB, stop), tensor=tensor):
            furthest = max(furthest, end)
    return furthest - stop


def test_the_small_tensor_that_a_large_one_begins_behind_is_not_what_the_reader_came_for() -> None:
    small, large, following = (100 * MIB - 20_000, 100 * MIB), (100 * MIB, 128 * MIB), (128 * MIB, 400 * MIB)
    ahead = Readahead(GIB)
    # The page in which the large one begins, and the chunk, begin with the small one.
    beyond = through(ahead, 100 * MIB - 20_000, 128 * MIB, [small, large, following])
    assert beyond <= 2 * MIB, "of the next tensor a sixteenth of what he has come"


def test_a_tensor_that_the_first_demand_reaches_into_may_be_what_the_reader_came_for() -> None:
    before, wanted, following = (90 * MIB, 100 * MIB), (100 * MIB, 128 * MIB), (128 * MIB, 400 * MIB)
    ahead = Readahead(GIB)
    beyond = through(ahead, 100 * MIB - MIB // 2, 128 * MIB, [before, wanted, following])
    assert beyond <= 2 * MIB


def test_who_goes_through_many_small_tensors_is_a_stream() -> None:
    size = 200 << 10
    tensors = [(0, 1000)] + [(1000 + n * size, 1000 + (n + 1) * size) for n in range(1000)]
    ahead = Readahead(GIB)
    assert through(ahead, 1000, 1000 + 12 * MIB, tensors) >= 16 * MIB
