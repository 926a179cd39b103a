"""The scheduler's engine under any order of events: one lease per group as the peers see it, nobody pointed at nobody, nothing starved."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.protocol.groups import pack_bits
from p2p.protocol.messages import (
    VERSION,
    Answer,
    Ask,
    Complaint,
    Done,
    Failed,
    Fill,
    Filled,
    Hello,
    Join,
    Kind,
    Neighbours,
    Order,
    Preheat,
    Preheated,
    Progress,
    Report,
    Revoke,
    Ruling,
    Verdict,
)
from scheduler.engine import FEWEST_LEASES, LEASE_S, PEER_LEASES, SILENT_S, Engine, Out

TASK = b"t" * 32
GROUPS = 12


class Cluster:
    """Peers that believe what they are told, around one engine."""

    def __init__(self, seed: int = 0) -> None:
        self.engine = Engine(random.Random(seed))
        self.now = 0.0
        self.leases: dict[str, set[int]] = {}
        self.have: dict[str, set[int]] = {}
        self.met: dict[str, set[str]] = {}
        self.sent: Out = []

    def take(self, out: Out) -> None:
        self.sent += out
        for peer, message in out:
            if peer not in self.leases:
                continue
            if isinstance(message, Answer):
                self.leases[peer] |= {r.group for r in message.rulings if r.verdict is Verdict.LEASE}
                self.met[peer] |= {r.peer.id for r in message.rulings if r.peer}
            elif isinstance(message, Order):
                self.leases[peer].add(message.group)
            elif isinstance(message, Revoke):
                self.leases[peer] -= set(message.groups)
            elif isinstance(message, Neighbours):
                self.met[peer] |= {contact.id for contact in message.peers}

    def join(self, peer: str, kind: Kind = Kind.PEER, have: set[int] | None = None) -> None:
        self.leases[peer], self.met[peer] = set(), set()
        self.have[peer] = set(have or ())
        self.take(self.engine.connect(Hello(VERSION, peer, 1, kind), f"h-{peer}", self.now))
        self.take(self.engine.handle(peer, Join(TASK, GROUPS, "img", pack_bits(self.have[peer], GROUPS)), self.now))

    def ask(self, peer: str, *groups: int, urgent: bool = False) -> list[Ruling]:
        before = len(self.sent)
        self.take(self.engine.handle(peer, Ask(1, TASK, list(groups), urgent), self.now))
        return next(m.rulings for p, m in self.sent[before:] if p == peer and isinstance(m, Answer))

    def done(self, peer: str, *groups: int) -> None:
        self.have[peer] |= set(groups)
        self.leases[peer] -= set(groups)
        self.take(self.engine.handle(peer, Done(TASK, list(groups)), self.now))

    def fail(self, peer: str, *groups: int) -> None:
        self.leases[peer] -= set(groups)
        self.take(self.engine.handle(peer, Failed(TASK, list(groups), "x"), self.now))

    def lose(self, peer: str) -> None:
        for known in (self.leases, self.have, self.met):
            known.pop(peer)
        self.take(self.engine.disconnect(peer, self.now))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.engine.tick(self.now)[0])

    def check(self) -> None:
        held = [group for groups in self.leases.values() for group in groups]
        assert len(held) == len(set(held)), "no group has two live leases"
        state = self.engine.tasks.get(TASK)
        assert set(held) == (set(state.leases) if state else set())
        for peer, have in self.have.items():
            assert state is not None
            assert {g for g in range(GROUPS) if state.members[peer].has(g)} == have
        if state:
            assert list(state.copies) == [sum(g in have for have in self.have.values()) for g in range(GROUPS)]


names = st.sampled_from([f"p{n}" for n in range(6)])
groups = st.integers(0, GROUPS - 1)
events = st.one_of(
    st.tuples(st.just("join"), names, st.booleans(), st.sets(groups, max_size=4)),
    st.tuples(st.just("ask"), names, st.lists(groups, min_size=1, max_size=5, unique=True), st.booleans()),
    st.tuples(st.just("finish"), names, st.just(None), st.just(None)),
    st.tuples(st.just("fail"), names, st.just(None), st.just(None)),
    st.tuples(st.just("lose"), names, st.just(None), st.just(None)),
    st.tuples(st.just("tick"), st.floats(0.1, 2 * LEASE_S), st.just(None), st.just(None)),
    st.tuples(st.just("progress"), names, st.just(None), st.just(None)),
    st.tuples(st.just("report"), names, names, st.sampled_from(Complaint)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(events, max_size=60))
def test_whatever_the_order_of_events(history: list[tuple]) -> None:  # type: ignore[type-arg]
    cluster = Cluster()
    for what, who, first, second in history:
        if what == "join" and who not in cluster.have:
            cluster.join(who, Kind.SEED if first else Kind.PEER, second)
        elif what == "tick":
            cluster.tick(who)
        elif who in cluster.have:
            if what == "ask":
                wanted = [group for group in first if group not in cluster.have[who]]
                for ruling in cluster.ask(who, *wanted, urgent=second):
                    if ruling.verdict in (Verdict.HELD, Verdict.WAIT):
                        assert ruling.peer is not None
                        other = ruling.peer.id
                        assert other != who
                        assert (
                            ruling.group in (cluster.have if ruling.verdict is Verdict.HELD else cluster.leases)[other]
                        )
            elif what == "finish":
                cluster.done(who, *sorted(cluster.leases[who]))
            elif what == "fail":
                cluster.fail(who, *sorted(cluster.leases[who]))
            elif what == "lose":
                cluster.lose(who)
            elif what == "progress":
                cluster.take(cluster.engine.handle(who, Progress(TASK, sorted(cluster.leases[who])), cluster.now))
            elif what == "report" and first != who:
                cluster.take(cluster.engine.handle(who, Report(TASK, first, second), cluster.now))
        cluster.check()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2), st.integers(0, 10**6))
def test_everybody_gets_everything_and_the_registry_is_asked_once(peers: int, seeds: int, seed: int) -> None:
    """Peers that ask until they have it all, finish what they lease, and take from others what is held: it ends, one fetch a group."""
    cluster = Cluster()
    rng = random.Random(seed)  # a fair order: nobody is passed over for ever
    for number in range(seeds):
        cluster.join(f"seed{number}", Kind.SEED)
    for number in range(peers):
        cluster.join(f"p{number}")
    fetched = 0
    for _ in range(2000):
        if all(len(cluster.have[f"p{n}"]) == GROUPS for n in range(peers)):
            break
        peer = rng.choice(list(cluster.have))
        if cluster.leases[peer] and rng.random() < 0.7:
            group = rng.choice(sorted(cluster.leases[peer]))
            fetched += 1
            cluster.done(peer, group)
            continue
        missing = sorted(set(range(GROUPS)) - cluster.have[peer])
        if missing:
            held = [r.group for r in cluster.ask(peer, *missing[:4]) if r.verdict is Verdict.HELD]
            cluster.done(peer, *held)
        cluster.check()
    assert all(len(cluster.have[f"p{n}"]) == GROUPS for n in range(peers))
    assert fetched == GROUPS


def test_leases_are_spread_and_bounded() -> None:
    cluster = Cluster()
    for number in range(8):
        cluster.join(f"p{number}")
    for number in range(8):
        cluster.ask(f"p{number}", *range(GROUPS))
    assert max(len(leases) for leases in cluster.leases.values()) <= PEER_LEASES
    assert sum(len(leases) for leases in cluster.leases.values()) == FEWEST_LEASES
    assert cluster.ask("p7", *range(GROUPS))[-1].verdict is Verdict.LATER


def test_seeds_fetch_first_and_share_the_work() -> None:
    cluster = Cluster()
    for seed in ("s1", "s2"):
        cluster.join(seed, Kind.SEED)
    cluster.join("p")
    rulings = cluster.ask("p", 0, 1, 2, 3)
    assert [ruling.verdict for ruling in rulings] == [Verdict.WAIT] * 4
    assert {len(cluster.leases[seed]) for seed in ("s1", "s2")} == {2}
    cluster.fail("s1", *cluster.leases["s1"].copy())
    assert cluster.ask("p", 0)[0].verdict in (Verdict.WAIT, Verdict.LEASE)
    cluster.lose("s1")
    cluster.lose("s2")
    assert {ruling.verdict for ruling in cluster.ask("p", 0, 1)} == {Verdict.LEASE}


def test_a_lease_without_progress_moves_on() -> None:
    cluster = Cluster()
    cluster.join("a")
    cluster.join("b")
    assert cluster.ask("a", 3)[0].verdict is Verdict.LEASE
    assert cluster.ask("b", 3)[0].verdict is Verdict.WAIT
    cluster.tick(LEASE_S - 1)
    cluster.take(cluster.engine.handle("a", Progress(TASK, [3]), cluster.now))
    cluster.tick(2)
    assert cluster.ask("b", 3)[0].verdict is Verdict.WAIT
    cluster.tick(LEASE_S)
    assert cluster.ask("b", 3)[0].verdict is Verdict.LEASE
    cluster.check()


def test_a_liar_is_handed_to_nobody_after_two_reports() -> None:
    cluster = Cluster()
    cluster.join("liar", have=set(range(GROUPS)))
    for name in ("a", "b", "c"):
        cluster.join(name)
    for name in ("a", "b"):
        assert cluster.ask(name, 0)[0].verdict is Verdict.HELD
        cluster.take(cluster.engine.handle(name, Report(TASK, "liar", Complaint.CORRUPT), cluster.now))
        assert cluster.ask(name, int(name == "b"))[0].verdict is Verdict.LEASE
    assert cluster.ask("c", 5)[0].verdict is Verdict.LEASE


def test_everybody_in_a_crowd_has_neighbours_and_is_reachable() -> None:
    cluster = Cluster()
    for number in range(200):
        cluster.join(f"p{number}")
    reached, frontier = {"p0"}, ["p0"]
    while frontier:
        for other in cluster.met[frontier.pop()] - reached:
            reached.add(other)
            frontier.append(other)
    assert len(reached) == 200
    assert min(len(met) for met in cluster.met.values()) >= 4


def test_preheat_tells_how_far_each_node_is() -> None:
    cluster = Cluster()
    cluster.join("s1", Kind.SEED)
    cluster.join("p1")
    cluster.engine.connect(Hello(VERSION, "tool", 0, Kind.TOOL), "h", 0)
    cluster.take(cluster.engine.handle("tool", Preheat(7, "img", True), 0))
    fills = {peer: message for peer, message in cluster.sent if isinstance(message, Fill) and message.number}
    assert set(fills) == {"s1", "p1"}
    cluster.take(cluster.engine.handle("s1", Filled(fills["s1"].number, 5, 10), 0))
    cluster.lose("p1")
    last = [message for peer, message in cluster.sent if peer == "tool" and isinstance(message, Preheated)][-1]
    assert last.number == 7
    assert {node.peer: (node.done, node.total, bool(node.error)) for node in last.nodes} == {
        "s1": (5, 10, False), "p1": (0, 0, True)
    }  # fmt: skip


def test_silent_peers_are_named() -> None:
    cluster = Cluster()
    cluster.join("a")
    assert cluster.engine.tick(SILENT_S + 1)[1] == ["a"]


@pytest.mark.parametrize(
    "message", [Done(TASK, [GROUPS + 5]), Ask(1, TASK, [GROUPS + 5]), Failed(TASK, [99]), Join(TASK, 3)]
)
def test_groups_that_do_not_exist_are_nothing(message: Done | Ask | Failed | Join) -> None:
    cluster = Cluster()
    cluster.join("a")
    cluster.engine.handle("a", message, 0)
    cluster.check()


def test_many_ids_on_one_host_are_one_accuser() -> None:
    cluster = Cluster()
    cluster.join("honest")
    for name in ("a", "b", "c"):
        cluster.join(name)
        cluster.engine.peers[name].host = "one machine"
        cluster.engine.handle(name, Report(TASK, "honest", Complaint.CORRUPT), cluster.now)
    assert cluster.engine.banned(cluster.now) == set()
