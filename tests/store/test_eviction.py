"""What leaves the cache, in which order, and that nobody who opens a data space meets one that is leaving."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.errors import CacheError, UsageError
from rafsfs.store.cache import Cache
from rafsfs.store.eviction import Held, Quota, parse_quota, plan_eviction

from .test_data_space import LENGTH, chunk, make_table

SPACES = st.lists(
    st.builds(
        Held,
        st.binary(min_size=32, max_size=32),
        st.integers(0, 1000),
        st.integers(0, 5).map(float),
        in_use=st.booleans(),
        pinned=st.booleans(),
    ),
    unique_by=lambda space: space.space_id,
    max_size=12,
)


@given(SPACES, st.integers(0, 6000))
def test_nothing_in_use_or_pinned_goes_and_nothing_goes_in_vain(spaces: list[Held], target: int) -> None:
    gone = plan_eviction(spaces, target)
    assert all(space.may_go for space in gone)
    assert len(set(gone)) == len(gone)
    held = sum(space.held_bytes for space in spaces)
    freed = sum(space.held_bytes for space in gone)
    if gone:
        assert held - freed + gone[-1].held_bytes > target, "the last one was needed"
    if held - freed > target:
        assert not [space for space in spaces if space.may_go and space not in gone]


@given(SPACES, st.integers(0, 6000))
def test_what_was_used_last_goes_last(spaces: list[Held], target: int) -> None:
    gone = plan_eviction(spaces, target)
    times = [space.last_used for space in gone]
    assert times == sorted(times)
    stays = [space.last_used for space in spaces if space.may_go and space not in gone]
    assert not stays or not times or times[-1] <= min(stays)


@given(SPACES, st.integers(0, 6000), st.randoms(use_true_random=False))
def test_the_order_of_the_directory_decides_nothing(spaces: list[Held], target: int, random: object) -> None:
    shuffled = list(spaces)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan_eviction(shuffled, target) == plan_eviction(spaces, target)


@given(SPACES, st.integers(0, 6000), st.integers(0, 6000))
def test_a_lower_target_evicts_the_same_and_more(spaces: list[Held], one: int, other: int) -> None:
    less, more = plan_eviction(spaces, max(one, other)), plan_eviction(spaces, min(one, other))
    assert more[: len(less)] == less


def test_a_quota_is_a_size_a_share_or_none() -> None:
    assert parse_quota("none", 1000) is parse_quota("", 1000) is None
    assert parse_quota("10GiB", 1000) == Quota(10 << 30)
    assert parse_quota("80%", 1000) == Quota(800)
    assert 0 < Quota(1000).low < Quota(1000).high < 1000
    for bad in ("0", "0%", "101%", "-5%", "5.5%", "%", "much", "٣%", "1e3"):
        with pytest.raises(UsageError):
            parse_quota(bad, 1000)


def test_what_is_used_is_not_removed(tmp_path: Path) -> None:
    cache, table = Cache.open(str(tmp_path / "cache")), make_table(3)
    cache.acquire([table.space_id])
    cache.open_space(table).store(0, chunk(0))
    assert not cache.doom(table.space_id)
    assert [(held.in_use, held.held_bytes) for held in cache.held()] == [(True, LENGTH)]
    cache.release([table.space_id])
    assert cache.remove_space(table.space_id) == LENGTH
    assert cache.held() == []
    cache.close()


def test_an_opener_between_the_two_steps_of_removal_gets_a_new_data_space(tmp_path: Path) -> None:
    cache, table = Cache.open(str(tmp_path / "cache")), make_table(3)
    old = cache.open_space(table)
    old.store(0, chunk(0))
    assert cache.doom(table.space_id)
    assert cache.opened_space(table.space_id) is None
    cache.acquire([table.space_id])
    new = cache.open_space(table)
    assert new is not old
    assert new.missing(range(3)) == [0, 1, 2]
    new.store(1, chunk(1))
    cache.remove_doomed(table.space_id)
    assert cache.opened_space(table.space_id) is new
    assert new.read(1) == chunk(1)
    for act in (lambda: old.store(2, chunk(2)), lambda: old.read(0), old.duplicate):
        with pytest.raises(CacheError, match="removed"):
            act()  # type: ignore[no-untyped-call]
    assert not old.is_present(0)
    assert new.missing(range(3)) == [0, 2]
    cache.close()


def test_a_descriptor_given_out_outlives_the_data_space(tmp_path: Path) -> None:
    cache, table = Cache.open(str(tmp_path / "cache")), make_table(2)
    space = cache.open_space(table)
    space.store(1, chunk(1))
    fd = space.duplicate()
    cache.remove_space(table.space_id)
    assert os.pread(fd, LENGTH, table.extent(1)[0]) == chunk(1)
    os.close(fd)
    cache.close()


def test_a_death_at_any_point_of_a_removal_leaves_all_or_nothing(tmp_path: Path) -> None:
    path, table = str(tmp_path / "cache"), make_table(3)
    cache = Cache.open(path)
    cache.open_space(table).store(0, chunk(0))
    cache.close()
    cache = Cache.open(path)
    cache.opened_space(table.space_id)
    directory = cache.space_directory(table.space_id)
    os.rename(directory, f"{directory}.new-removed-abc")  # died after the rename,
    os.unlink(f"{directory}.new-removed-abc/chunks")  # in the middle of deleting
    cache.close(clean=False)
    cache = Cache.open(path)
    assert os.listdir(tmp_path / "cache" / "spaces") == []
    assert cache.index.find(table.digest(0)) in {None, (table.space_id, 0)}, "a hint at most"
    assert cache.open_space(table).missing(range(3)) == [0, 1, 2]
    cache.close()


def test_writers_and_an_eviction_at_once_never_write_into_another_file(tmp_path: Path) -> None:
    """The number of a closed descriptor is given to the next file that is opened: a late writer must not meet it."""
    cache, table = Cache.open(str(tmp_path / "cache")), make_table(6)
    others: list[int] = []
    for _ in range(30):
        space = cache.open_space(table)
        start = threading.Barrier(3)

        def write(space=space, start=start) -> None:  # type: ignore[no-untyped-def]
            start.wait()
            for number in range(6):
                try:
                    space.store(number, chunk(number))
                except CacheError:
                    return

        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait()
        cache.remove_space(table.space_id)
        others += [os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT) for _ in range(3)]
        for thread in threads:
            thread.join()
    assert (tmp_path / "other").stat().st_size == 0
    for fd in others:
        os.close(fd)
    cache.close()


def test_when_it_was_used_survives_a_restart_and_opening_is_no_use(tmp_path: Path) -> None:
    path, table = str(tmp_path / "cache"), make_table(2)
    cache = Cache.open(path)
    cache.open_space(table).last_used = 1000.0
    cache.note_use()
    cache.close()
    for _ in range(2):
        cache = Cache.open(path)
        assert [held.last_used for held in cache.held()] == [1000.0]
        cache.open_space(table)
        assert [held.last_used for held in cache.held()] == [1000.0]
        cache.close()
    cache = Cache.open(path)
    cache.acquire([table.space_id])
    space = cache.open_space(table)
    cache.note_use()
    assert space.last_used > 1000.0
    cache.close(clean=False)
