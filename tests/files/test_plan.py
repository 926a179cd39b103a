"""How a file is cut: alike on all nodes, without gaps, within bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.files.plan import (
    CHUNK_BYTES,
    MAX_CHUNKS,
    MAX_LENGTH,
    MAX_SECTIONS,
    SECTION_BYTES,
    FilePlan,
    digests_of,
    plan_file,
)
from rafsfs.files.record import FileRecord
from rafsfs.files.transfer import DisagreementError, WebFile, chunk_map_of
from rafsfs.interfaces import SectionRuling


@given(st.one_of(st.integers(1, 1 << 30), st.integers(1, MAX_LENGTH)))
def test_sections_and_chunks_cover_a_file_once(length: int) -> None:
    plan = plan_file(length)
    assert 1 <= plan.sections <= MAX_SECTIONS
    position = 0
    for section in range(plan.sections):
        offset, size = plan.extent(section)
        assert (offset, size > 0) == (position, True)
        position += size
        assert 1 <= plan.chunks(section) <= MAX_CHUNKS
        assert (plan.chunks(section) - 1) * plan.chunk_bytes < size <= plan.chunks(section) * plan.chunk_bytes
    assert position == length


@given(st.integers(1, 40 << 20), st.integers(0, 2), st.randoms())
def test_a_table_says_what_its_digests_say(length: int, section: int, rng: object) -> None:
    plan = plan_file(length)
    section %= plan.sections
    digests = bytes(range(256)) * 2
    digests = (digests * 32)[: 32 * plan.chunks(section)]
    table = plan.table(section, digests)
    table.validate()
    assert digests_of(table) == digests
    assert sum(table.extent(chunk)[1] for chunk in range(table.count)) == plan.extent(section)[1]
    assert not plan.fits(section, digests + digests[:32])
    assert not plan.fits(plan.sections, digests)
    file = WebFile(FileRecord(b"k" * 32, "u", length, shared=True), plan, {section: table})
    chunk_map = chunk_map_of(file, section)
    chunk_map.validate()
    assert chunk_map.table(0).space_id == table.space_id
    first, last = chunk_map.stored(0, 0), chunk_map.stored(0, table.count - 1)
    assert first.offset == plan.extent(section)[0]
    assert last.offset + last.stored_size == sum(plan.extent(section))


@pytest.mark.parametrize("length", [0, -1, MAX_LENGTH + 1])
def test_what_cannot_be_cut_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        plan_file(length)


def test_the_cut_of_a_model_is_what_the_document_says() -> None:
    assert plan_file(130 << 30) == FilePlan(130 << 30, 1 << 30, CHUNK_BYTES)
    assert plan_file(MAX_SECTIONS * SECTION_BYTES).section_bytes == SECTION_BYTES
    assert plan_file(MAX_SECTIONS * SECTION_BYTES + 1).section_bytes == 2 * SECTION_BYTES


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([b"a" * 32, b"b" * 32, b"short", b""])), max_size=12))
def test_what_a_section_is_never_changes_and_contradictions_are_seen(told: list[tuple[int, bytes]]) -> None:
    plan = FilePlan(4, 1, 1)
    file = WebFile(FileRecord(b"k" * 32, "u", 4, shared=True), plan)
    first: dict[int, bytes] = {}
    for section, digests in told:
        known = first.get(section)
        if plan.fits(section, digests) and known in {None, digests}:
            file.learn(section, digests)
            first[section] = digests
        else:
            with pytest.raises(DisagreementError):
                file.learn(section, digests)
        file.take_news(SectionRuling(section, digests))
        if known is None and plan.fits(section, digests):
            first[section] = digests
    assert {section: digests_of(table) for section, table in file.tables.items()} == first
