"""What is given to how many at once, without a socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p.entitlement import proof
from p2p.upload import FOLLOWERS, SLOTS, SMALL_SLOTS, Uploads
from rafsfs.format.codec import chunk_digest
from rafsfs.format.space_table import SpaceTable, pack_record
from rafsfs.net.http_server import Answer, FileParts, FileRange, Request
from rafsfs.store.data_space import DataSpace, create, open_space_directory

CHUNK = 64 << 10
COUNT = 4


@pytest.fixture
def space(tmp_path: Path) -> DataSpace:
    data = [bytes([number]) * CHUNK for number in range(COUNT)]
    records = (pack_record(chunk_digest(chunk), number * CHUNK, CHUNK) for number, chunk in enumerate(data))
    table = SpaceTable(b"".join(records), COUNT * CHUNK)
    where = tmp_path / table.space_id.hex()
    create(str(where), table)
    found, _ = open_space_directory(str(where))
    for number, chunk in enumerate(data):
        found.store(number, memoryview(chunk))
    return found


async def ask(uploads: Uploads, space: DataSpace) -> Answer:
    path = f"/v1/{space.space_id.hex()}/0-{COUNT - 1}/{proof(space.table, 0, COUNT - 1)}"
    return await uploads.handle(Request(path, {"rafs-follow": "1"}, "127.0.0.1"))


async def answers(uploads: Uploads, space: DataSpace, count: int) -> list[Answer]:
    return [await ask(uploads, space) for _ in range(count)]


def let_go(given: list[Answer]) -> None:
    for answer in given:
        if isinstance(answer.body, FileParts | FileRange):
            answer.body.released()


async def test_what_a_seed_has_goes_to_few_who_follow_it_and_takes_no_slot(space: DataSpace) -> None:
    uploads = Uploads(lambda task: space, lambda task: [], "", seed=True)
    given = await answers(uploads, space, FOLLOWERS + 1)
    assert [answer.status for answer in given] == [200] * FOLLOWERS + [409]
    assert uploads.busy == 0
    body = given[0].body
    assert isinstance(body, FileParts)
    assert [part async for part in body.parts] == [(0, COUNT * CHUNK)]
    let_go(given)
    assert (await ask(uploads, space)).status == 200


async def test_what_another_node_has_is_an_ordinary_request_with_a_slot(space: DataSpace) -> None:
    uploads = Uploads(lambda task: space, lambda task: [], "")
    given = await answers(uploads, space, SLOTS)
    assert [answer.status for answer in given] == [200] * (SLOTS - SMALL_SLOTS) + [503] * SMALL_SLOTS
    let_go(given)
    assert uploads.busy == 0


async def test_a_seed_that_gets_much_passes_each_part_of_it_to_fewer(space: DataSpace) -> None:
    uploads = Uploads(lambda task: space, lambda task: list(range(1, FOLLOWERS // 4)), "", seed=True)
    given = await answers(uploads, space, FOLLOWERS)
    assert sum(answer.status == 200 for answer in given) == 4
    let_go(given)
