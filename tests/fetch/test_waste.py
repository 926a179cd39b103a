"""The account of what is fetched ahead: what nobody reads is bounded by what is read."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.fetch.waste import AheadAccount

events = st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 100)), max_size=200)


@settings(max_examples=200, deadline=None)
@given(events, st.integers(0, 500))
def test_what_is_not_read_never_exceeds_the_floor_and_what_is_read(
    events: list[tuple[bool, int, int]], floor: int
) -> None:
    account = AheadAccount(floor)
    granted: dict[int, int] = {}
    for is_read, chunk, size in events:
        if is_read:
            account.read(chunk, size)
            granted.pop(chunk, None)
        elif account.grant(chunk, size):
            granted.setdefault(chunk, size)
        assert account.unread_bytes == sum(granted.values()), "a chunk is counted once"
        assert account.unread_bytes <= floor + account.read_bytes
        assert account.asked_bytes == account.used_bytes + account.unread_bytes


def test_what_was_granted_stays_granted_so_that_spans_may_meet_inside_a_chunk() -> None:
    account = AheadAccount(10)
    assert account.grant(1, 10)
    assert account.grant(1, 10)
    assert account.asked_bytes == 10


def test_reading_what_was_fetched_ahead_makes_room_for_more() -> None:
    account = AheadAccount(10)
    assert account.grant(1, 10)
    assert not account.grant(2, 10)
    account.read(1, 10)
    assert account.grant(2, 10)
    assert (account.asked_bytes, account.used_bytes, account.unread_bytes) == (20, 10, 10)
