"""Messages, have-maps, selection: round trips and hostile bytes, without a socket."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.entitlement import proof, whole_proof
from p2p.have import HaveReader, all_frame, more_frame, pending_frame
from p2p.link import parse_addresses
from p2p.protocol.groups import GROUP_BYTES, group_count, group_of, pack_bits, unpack_bits
from p2p.protocol.messages import (
    Answer,
    Ask,
    Contact,
    Kind,
    Ruling,
    Verdict,
    decode_from_peer,
    decode_from_scheduler,
    encode,
)
from p2p.selection import RUN_BYTES, Offer, assign
from rafsfs.errors import FormatError, UsageError
from rafsfs.format.space_table import SpaceTable, pack_record


@given(st.sets(st.integers(0, 999)), st.integers(1, 1000))
def test_bitmaps(numbers: set[int], count: int) -> None:
    inside = {number for number in numbers if number < count}
    assert unpack_bits(pack_bits(inside, count), count) == sorted(inside)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_our_error(data: bytes) -> None:
    for decode in (decode_from_peer, decode_from_scheduler):
        with contextlib.suppress(FormatError):
            decode(data)


def test_messages_come_back() -> None:
    ask = Ask(5, b"x" * 32, [1, 2, 3], True)
    assert decode_from_peer(encode(ask)[4:]) == ask
    answer = Answer(5, [Ruling(1, Verdict.WAIT, Contact("a", "10.0.0.1", 80, Kind.SEED)), Ruling(2, Verdict.LEASE)])
    assert decode_from_scheduler(encode(answer)[4:]) == answer
    with pytest.raises(FormatError):
        decode_from_peer(encode(answer)[4:])


@given(st.lists(st.sets(st.integers(0, 99), max_size=20), max_size=6), st.integers(1, 64))
def test_have_maps_grow_as_told_however_the_bytes_are_cut(news: list[set[int]], cut: int) -> None:
    first, *rest = news or [set()]
    stream = all_frame(pack_bits(first, 100)) + pending_frame([3]) + b"".join(more_frame(sorted(part)) for part in rest)
    have = bytearray(100)
    reader = HaveReader(have)
    seen: list[int] = []
    for at in range(0, len(stream), cut):
        seen += reader.feed(stream[at : at + cut])
    assert sorted(seen) == sorted(set().union(*news)) == [n for n in range(100) if have[n]]
    assert reader.pending == {3}


@given(st.binary(max_size=200))
def test_any_have_map_is_taken_or_our_error(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        HaveReader(bytearray(50)).feed(data)


def test_a_have_map_of_what_does_not_exist_is_refused() -> None:
    with pytest.raises(FormatError):
        HaveReader(bytearray(5)).feed(more_frame([5]))
    with pytest.raises(FormatError):
        HaveReader(bytearray(5)).feed(b"\xff\xff\xff\xff")


@given(
    st.sets(st.integers(0, 39), min_size=1),
    st.lists(st.tuples(st.sets(st.integers(0, 39)), st.integers(0, 10**8), st.floats(1, 1e10)), max_size=5),
    st.integers(1, 3 << 20),
)
def test_selection_covers_each_chunk_once_by_somebody_who_has_it(
    wanted: set[int], peers: list[tuple[set[int], int, float]], length: int
) -> None:
    offers = {
        f"p{n}": Offer(bytearray(int(chunk in have) for chunk in range(40)), busy, rate)
        for n, (have, busy, rate) in enumerate(peers)
    }
    runs, left = assign(sorted(wanted), offers, lambda chunk: length, random.Random(1))
    covered = [chunk for run in runs for chunk in range(run.first, run.first + run.count)]
    assert sorted(covered + left) == sorted(wanted)
    for run in runs:
        assert all(offers[run.peer].have[chunk] for chunk in range(run.first, run.first + run.count))
        assert run.count == 1 or run.size <= RUN_BYTES
    assert all(not offer.have[chunk] for chunk in left for offer in offers.values())


def test_groups() -> None:
    assert [group_count(size) for size in (0, 1, GROUP_BYTES, GROUP_BYTES + 1)] == [0, 1, 1, 2]
    assert group_of(GROUP_BYTES) == 1


def table(count: int, mark: int = 0) -> SpaceTable:
    return SpaceTable(b"".join(pack_record(bytes([mark, n]) * 16, n * 4096, 4096) for n in range(count)), count * 4096)


def test_a_proof_needs_the_records() -> None:
    assert proof(table(4), 1, 2) == proof(table(4), 1, 2)
    assert len({proof(table(4), 1, 2), proof(table(4), 1, 3), proof(table(4, 1), 1, 2), whole_proof(table(4))}) == 4
    for first, last in ((0, 4), (2, 1), (-1, 0)):
        with pytest.raises(IndexError):
            proof(table(4), first, last)


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x", "host:0", "host:70000", ","])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_addresses(text)


def test_addresses() -> None:
    assert parse_addresses("a:1, [::1]:22") == [("a", 1), ("::1", 22)]
