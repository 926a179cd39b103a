"""The peer's decisions without sockets: what is prefetched next, what is asked, who rests how long."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import p2p.core.peer as peer_module
from p2p.core.effects import FillGroup, Follow, Requeue, Send, ShowRelayed
from p2p.core.errand import FOLLOW_S, WAIT_S, Inquire, Perform, Reply, Take
from p2p.core.peer import FAULTS, PeerCore
from p2p.core.prefetch import BLIND, DIRECTED_S
from p2p.core.task import NeighbourView, PeerTask
from p2p.protocol.groups import pack_bits
from p2p.protocol.messages import Complaint, Contact, Join, Leave, Order, Report, Ruling, Verdict
from tests.simulation.content import SimContent, right_value

TASK = b"t" * 32
CHUNKS = 12


def core(*haves: set[int]) -> tuple[PeerCore, PeerTask, list[NeighbourView]]:
    """A peer with neighbours that have these chunks."""
    peer = PeerCore("me", random.Random(1))
    task = peer.enter(TASK, SimContent(CHUNKS, CHUNKS * 1e6), "image")
    views = []
    for number, have in enumerate(haves):
        peer.meet(task, Contact(f"n{number}", "h", 1))
        view = task.neighbours[f"n{number}"]
        view.listening = True
        for chunk in have:
            view.have[chunk] = 1
        peer.heard(task, sorted(have))
        views.append(view)
    return peer, task, views


def test_of_what_a_neighbour_has_the_rarest_comes_first() -> None:
    peer, task, _ = core({0, 1, 2}, {0, 1}, {0})
    plan = peer.prefetch(task, [[chunk] for chunk in range(3)])
    task.neighbours["n1"].standing.under_way = task.neighbours["n2"].standing.under_way = 10**9
    assert [plan.choose(0.0) for _ in range(3)] == [[2], [1], [0]]


@given(st.lists(st.sets(st.integers(0, CHUNKS - 1)), max_size=4))
def test_a_plan_chooses_what_can_be_had_and_little_else(haves: list[set[int]]) -> None:
    peer, task, _ = core(*haves)
    plan = peer.prefetch(task, [[chunk] for chunk in range(CHUNKS)])
    near = set().union(*haves)
    chosen: list[int] = []
    while (choice := plan.choose(0.0)) is not None:
        chosen += choice
    assert len(chosen) == len(set(chosen))
    assert near <= set(chosen)
    assert len(set(chosen) - near) == min(BLIND, CHUNKS - len(near))
    for chunk in sorted(set(chosen) - near):
        plan.landed(chunk)
    assert plan.left == 0 or plan.choose(0.0) is not None


def test_what_a_silent_neighbour_had_is_prefetched_from_elsewhere() -> None:
    peer, task, views = core(set(range(CHUNKS)))
    views[0].listening = False
    plan = peer.prefetch(task, [[chunk] for chunk in range(CHUNKS)])
    assert plan.choose(0.0) == [0]
    peer.tells_anew(task, views[0])
    assert set(task.copies) == {0}
    assert plan.choose(0.0) is not None


def test_what_only_liars_claim_is_prefetched_from_elsewhere() -> None:
    peer, task, views = core(set(range(CHUNKS)), set(range(CHUNKS)))
    plan = peer.prefetch(task, [[chunk] for chunk in range(CHUNKS)])
    for view in views:
        peer.was_corrupt(task, view)
    chosen = plan.choose(0.0)
    assert chosen is not None
    assert peer.errand(task, chosen, urgent=False).steps(0.0).send(None) == Inquire(chosen)


def test_a_lease_counts_when_its_answer_comes_and_a_revocation_behind_it_is_heeded() -> None:
    peer, task, _ = core()
    steps = peer.errand(task, [3], urgent=False).steps(0.0)
    assert isinstance(next(steps), Inquire)
    ruling = [Ruling(3, Verdict.LEASE)]
    peer.answered(TASK, ruling, 0.1)
    assert 3 in task.leases
    del task.leases[3]  # revoked before whoever asked goes on
    with pytest.raises(StopIteration) as end:
        steps.send(Reply(0.1, ruling))
    assert end.value.value.ours == []
    assert end.value.value.waiting == [3]


def test_two_neighbours_that_never_deliver_do_not_keep_the_scheduler_from_being_asked() -> None:
    peer, task, views = core({0}, {0})
    now = 0.0
    asked = reported = 0
    for _ in range(12):
        steps = peer.errand(task, [0], urgent=False).steps(now)
        try:
            step = next(steps)
            while True:
                if isinstance(step, Take):
                    now += 3.0
                    view = task.neighbours[step.runs[0].peer]
                    effects = peer.was_stalled(task, view, now)
                    reported += sum(isinstance(e, Send) and isinstance(e.message, Report) for e in effects)
                elif isinstance(step, Inquire):
                    asked += 1
                step = steps.send(Reply(now, [Ruling(0, Verdict.LATER)]))
        except StopIteration:
            now = max(now, min(task.waiting.values(), default=now))
            peer.tick(now + 0.1)
            now += 0.1
    assert asked >= 2
    assert reported >= 1
    assert all(view.standing.faults >= FAULTS for view in views)
    assert WAIT_S > 0


def test_who_lied_in_one_task_is_not_waited_for_in_another() -> None:
    peer, task, (liar,) = core({0})
    other = peer.enter(b"o" * 32, SimContent(CHUNKS, CHUNKS * 1e6), "image")
    peer.was_corrupt(task, liar)
    effects = peer.meet(other, liar.standing.contact)
    assert [e.message for e in effects if isinstance(e, Send)] == [Report(other.task, liar.id, Complaint.CORRUPT)]
    assert liar.id not in other.neighbours


def follow_of(peer: PeerCore, task: PeerTask, chunk: int, now: float = 0.0) -> list[Follow]:
    """What an errand for a chunk follows; it asks nobody and takes nothing."""
    steps = peer.errand(task, [chunk], urgent=False).steps(now)
    follows: list[Follow] = []
    waiting: list[int] = []
    try:
        step = next(steps)
        while True:
            assert isinstance(step, Perform), step
            follows += [effect for effect in step.effects if isinstance(effect, Follow)]
            step = steps.send(Reply(now))
    except StopIteration as end:
        waiting = end.value.waiting
    assert waiting == [chunk]
    return follows


def test_what_a_neighbour_is_fetching_is_followed_and_news_of_it_change_nothing() -> None:
    peer, task, (near, other) = core(set(), set())
    peer.is_getting(task, near, {3}, {}, 0.0)
    assert [(f.run.peer, f.run.first, f.run.count) for f in follow_of(peer, task, 3)] == [(near.id, 3, 1)]
    other.have[3] = 1
    assert peer.heard(task, [3]) == [], "it is on its way: it is not asked for twice"
    peer.silent(task)
    assert peer.tick(1.0) == []
    assert peer.tick(FOLLOW_S + 0.1) == [Requeue(TASK, 3)], "but not for ever"


def test_what_was_not_passed_on_is_had_otherwise_and_not_followed_there_again() -> None:
    peer, task, (near, _) = core(set(), set())
    peer.is_getting(task, near, {3, 4}, {}, 0.0)
    (broken,) = follow_of(peer, task, 3)
    assert peer.follow_ended(TASK, broken.run, 1.0, refused=False) == [Requeue(TASK, 3)]
    assert follow_of(peer, task, 3, 1.0) == []
    (refused,) = follow_of(peer, task, 4, 1.0)
    assert peer.follow_ended(TASK, refused.run, 1.0, refused=True) == []
    assert 4 in task.waiting, "its news are waited for"
    near.have[4] = 1
    assert peer.heard(task, [4]) == [Requeue(TASK, 4)]
    peer.is_getting(task, near, {5}, {}, 0.0)
    assert near.unfollowed == set()


def test_who_follows_is_followed_in_turn_and_whoever_fetches_comes_first() -> None:
    peer, task, (near, far, other) = core(set(), set(), set())
    peer.is_getting(task, far, set(), {3: 1, 4: 2}, 0.0)
    peer.is_getting(task, near, {3}, {}, 0.0)
    peer.is_getting(task, other, set(), {4: 1}, 0.0)
    (direct,) = follow_of(peer, task, 3)
    assert direct.run.peer == near.id
    assert peer.follow_began(TASK, direct.run) == [ShowRelayed(TASK, {3: 1})]
    (relayed,) = follow_of(peer, task, 4)
    assert relayed.run.peer == other.id
    assert peer.follow_began(TASK, relayed.run) == [ShowRelayed(TASK, {3: 1, 4: 2})]
    assert peer.follow_ended(TASK, direct.run, 1.0, refused=False) == [ShowRelayed(TASK, {4: 2}), Requeue(TASK, 3)]
    assert follow_of(peer, task, 3, 1.0) == [], "who was behind the fetcher does not go behind somebody who follows"


def test_what_is_leased_is_not_waited_for_from_whom_it_was_followed() -> None:
    peer, task, (near,) = core(set())
    peer.is_getting(task, near, set(), {3: 1}, 0.0)
    (follow,) = follow_of(peer, task, 3)
    peer.follow_began(TASK, follow.run)
    effects = peer.answered(TASK, [Ruling(3, Verdict.LEASE)], 1.0)
    assert Requeue(TASK, 3) in effects
    assert ShowRelayed(TASK, {}) in effects
    assert not task.followed
    assert 3 not in task.waiting


@given(st.sets(st.integers(0, CHUNKS - 1)), st.sets(st.integers(0, CHUNKS - 1)))
def test_the_scheduler_is_told_anew_when_chunks_turn_out_wrong(here: set[int], wrong: set[int]) -> None:
    peer, task, _ = core()
    assert isinstance(task.content, SimContent)
    peer.join(task, "scheduler")
    for chunk in here:
        task.content.store(chunk, right_value(chunk))
        peer.landed(TASK, chunk, 0.0)
    for chunk in here & wrong:
        task.content.values[chunk] = None
    effects = peer.lost_chunks(TASK, wrong)
    said = [effect.message for effect in effects if isinstance(effect, Send)]
    if here & wrong:
        assert said[-2:] == [Leave(TASK), Join(TASK, CHUNKS, "image", pack_bits(here - wrong, CHUNKS))]
    else:
        assert not said
    for chunk in here & wrong:  # it comes again, and is announced again
        task.content.store(chunk, right_value(chunk))
        peer.landed(TASK, chunk, 1.0)
    assert task.finished == here


def test_what_is_remembered_of_other_nodes_is_bounded_and_liars_are_remembered_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_module, "MOST_STANDINGS", 16)
    peer, task, views = core({0}, {1}, {2})
    peer.was_corrupt(task, views[2])
    peer.part(task, views[2], unreachable=False)
    for number in range(100):
        peer.meet(task, Contact(f"later{number}", "h", 1))
        peer.part(task, task.neighbours[f"later{number}"], unreachable=False)
    assert len(peer.standings) <= 16
    assert {"n0", "n1", "n2", "later99"} <= peer.standings.keys()
    peer.meet(task, Contact("n2", "h", 1))
    assert "n2" not in task.neighbours


def test_who_ends_a_lease_asks_about_what_waits_for_nobody_and_not_about_what_is_coming() -> None:
    peer, task, (near,) = core({5})
    task.leases[0] = 0.0
    peer.is_getting(task, near, {1}, {2: 1}, 0.0)
    task.waiting.update(dict.fromkeys((1, 2, 3, 4, 5, 6), 3.0))
    task.followed.add(3)
    assert isinstance(task.content, SimContent)
    task.content.store(0, right_value(0))
    effects = peer.landed(TASK, 0, 1.0)
    assert sorted(effect.chunk for effect in effects if isinstance(effect, Requeue)) == [4, 6]
    assert min(task.waiting[4], task.waiting[6]) > 1000, "they are marked as having waited, so the scheduler is asked"
    assert task.waiting[5] == 3.0


def test_of_the_neighbours_of_one_whose_lease_ends_about_one_asks() -> None:
    asked = 0
    for seed in range(200):
        peer, task, views = core(*(set() for _ in range(4)))
        peer.rng.seed(seed)
        peer.is_getting(task, views[0], {1}, {}, 0.0)
        task.waiting[3] = 3.0
        asked += bool(peer.is_getting(task, views[0], set(), {}, 0.0))
    assert 20 < asked < 80
    peer.is_getting(task, views[0], {1}, {}, 0.0)
    task.leases |= {8: 0.0, 9: 0.0}
    assert not any(peer.is_getting(task, views[0], set(), {}, 0.0) for _ in range(20)), "it has its leases"


def test_what_few_have_is_followed_and_what_many_have_is_taken() -> None:
    peer, task, views = core({3}, {3, 4}, {4}, {4}, set())
    assert [(follow.run.peer, follow.run.first) for follow in follow_of(peer, task, 3)] == [("n0", 3)]
    assert task.relays.limit(3) == 1, "who has it all is as near as who fetches it"
    assert isinstance(next(peer.errand(task, [4], urgent=False).steps(0.0)), Take)
    assert views[0].standing.rests_until == 0.0


def test_a_reader_takes_what_few_have_at_once() -> None:
    peer, task, _ = core({3}, set(), set())
    assert isinstance(next(peer.errand(task, [3], urgent=True).steps(0.0)), Take)


def test_who_is_refused_what_few_have_follows_another_holder_or_whoever_shows_it() -> None:
    peer, task, views = core({3}, set(), set())
    (follow,) = follow_of(peer, task, 3)
    assert peer.follow_ended(TASK, follow.run, 0.0, refused=True) == []
    assert task.waiting[3] < WAIT_S
    assert 3 in views[0].too_busy
    effects = peer.is_getting(task, views[1], set(), {3: 1}, 0.05)
    assert [effect.chunk for effect in effects if isinstance(effect, Requeue)] == [3]
    assert [again.run.peer for again in follow_of(peer, task, 3, 0.05)] == ["n1"]


def test_who_is_refused_and_finds_nobody_takes_it_from_the_holder() -> None:
    peer, task, _ = core({3}, set(), set())
    (follow,) = follow_of(peer, task, 3)
    peer.follow_ended(TASK, follow.run, 0.0, refused=True)
    effects = peer.tick(1.0)
    assert [effect.chunk for effect in effects if isinstance(effect, Requeue)] == [3]
    assert isinstance(next(peer.errand(task, [3], urgent=False).steps(1.0)), Take)


def test_a_reader_hurries_what_waits_for_nobody_with_all_of_its_group_and_not_what_is_followed() -> None:
    peer, task, views = core(set())
    task.waiting.update({3: 50.0, 5: 50.0})
    peer.is_getting(task, views[0], {4}, {}, 0.0)
    follow_of(peer, task, 4)
    effects = peer.hurry(TASK, [3, 4, 6], 1.0)
    assert [effect.chunk for effect in effects if isinstance(effect, Requeue)] == [3]
    assert task.waiting[5] == 50.0
    assert next(peer.errand(task, [3], urgent=True).steps(1.0)) == Inquire([3])
    assert peer.hurry(b"o" * 32, [3], 1.0) == []


def test_an_order_ends_what_was_followed_and_keeps_a_seed_from_guessing() -> None:
    peer, task, views = core(set())
    peer.is_getting(task, views[0], {3}, {}, 0.0)
    follow_of(peer, task, 3)
    plan = peer.prefetch(task, [[chunk] for chunk in range(CHUNKS)])
    effects = peer.received(Order(TASK, 3, "image"), 10.0)
    assert FillGroup(TASK, [3]) in effects
    assert 3 not in task.waiting
    assert not task.relays.follows(3)
    assert plan.choose(10.0 + DIRECTED_S / 2) is None
    assert plan.choose(10.0 + DIRECTED_S) is not None


def test_who_is_ordered_what_he_asked_for_goes_on_guessing() -> None:
    peer, task, _ = core()
    steps = peer.errand(task, [3], urgent=False).steps(0.0)
    assert isinstance(next(steps), Inquire)
    plan = peer.prefetch(task, [[chunk] for chunk in range(CHUNKS)])
    peer.received(Order(TASK, 3, "image"), 10.0)
    assert plan.choose(10.0) is not None
