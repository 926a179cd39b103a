"""Every swarm with a live source finishes with right bytes, whoever comes, goes, lies or stalls; without these the registry gives once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .content import right_value
from .links import NO_LINK, Links
from .world import Setting, World

SMALL = {"size": 24 * 20e6, "units": 24, "step_s": 0.05, "limit_s": 600.0}


def finished(setting: Setting) -> World:
    world = World(setting)
    world.run()
    assert not world.unfinished, f"at {world.now:.0f} s: {sorted(world.unfinished)}"
    for node in world.nodes.values():
        if node.finished_at is not None:
            assert node.content.values == [right_value(chunk) for chunk in range(setting.units)]
    return world


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 10**6), st.integers(2, 12), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.2]), st.sampled_from([0.0, 0.2]),
    st.sampled_from([0.0, 0.2]), st.sampled_from([0.0, 0.5]), st.integers(0, 2), st.integers(1, 2), st.booleans(),
)  # fmt: skip
def test_a_swarm_with_a_live_source_finishes(
    seed: int, peers: int, churn: float, corrupt: float, empty: float, stuck: float, readers: float, seeds: int, zones: int,
    away: bool,
) -> None:  # fmt: skip
    finished(
        Setting(
            peers, origin=100e6, up=100e6, down=100e6, seed=seed, churn=churn, corrupt=corrupt, empty=empty, stuck=stuck,
            readers=readers, seeds=seeds, zones=zones, origin_away=(1.0, 4.0) if away else (0.0, 0.0), **SMALL,
        )
    )  # fmt: skip


def test_honest_peers_fetch_everything_once() -> None:
    world = finished(Setting(20, origin=100e6, up=200e6, down=200e6, **SMALL))
    assert world.origin_bytes <= 1.05 * 480e6
    assert world.wrong == 0


def test_wrong_units_are_refused_and_their_giver_is_left() -> None:
    world = finished(Setting(12, origin=100e6, up=200e6, down=200e6, corrupt=0.25, **SMALL))
    liars = [node for node in world.nodes.values() if node.behaviour.corrupt]
    assert liars
    assert world.wrong > 0
    for node in world.nodes.values():
        for liar in liars:
            standing = node.core.standings.get(liar.name)
            assert standing is None or standing.banned or not standing.bytes_got


def test_the_same_seed_gives_the_same_run() -> None:
    runs = [finished(Setting(8, origin=100e6, up=100e6, down=100e6, churn=0.3, seed=7, **SMALL)) for _ in range(2)]
    assert runs[0].now == runs[1].now
    assert runs[0].messages == runs[1].messages


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.floats(1, 1e6)), min_size=1, max_size=30))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_links_never_give_more_than_they_have(transfers: list[tuple[int, int, float]]) -> None:
    links = Links()
    capacity = [0.0, *(links_capacity for links_capacity in (100.0, 200.0, 50.0, 400.0))]
    for value in capacity[1:]:
        links.add(value)
    ended: list[int] = []
    for number, (one, other, size) in enumerate(transfers):
        links.start((one, other, NO_LINK, NO_LINK), size, lambda number=number: ended.append(number))  # type: ignore[misc]
    links._take_in()
    rates = links._rates(np.full(len(transfers), np.inf))
    assert (rates > 0).all()
    for link in range(1, 5):
        used = sum(
            rate * ((one == link) + (other == link)) for rate, (one, other, _) in zip(rates, transfers, strict=True)
        )
        assert used <= capacity[link] * (1 + 1e-9)


@pytest.mark.parametrize(("up", "expected"), [(100.0, 10.0), (50.0, 20.0)])
def test_a_lone_transfer_gets_its_narrowest_link(up: float, expected: float) -> None:
    links = Links()
    narrow, wide = links.add(up), links.add(1000.0)
    ended: list[int] = []
    links.start((narrow, wide, NO_LINK, NO_LINK), 1000.0, lambda: ended.append(1))
    seconds = 0.0
    while not ended:
        seconds += 1.0
        for act in links.advance(1.0):
            act()
    assert seconds == expected
