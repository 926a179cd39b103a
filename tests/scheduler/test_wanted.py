"""What was asked for while enough leases were out is given in order when one of them ends."""

from __future__ import annotations

import pytest

from p2p.protocol.messages import Kind, Order, Verdict
from scheduler.engine import FEWEST_LEASES, LEASE_S, PEER_LEASES
from scheduler.wanted import ASKERS, MOST, Wanted

from .test_engine import GROUPS, Cluster

PEERS = 8


def crowded() -> Cluster:
    """Peers that hold all leases that may be out; more has been asked for, the highest group first."""
    cluster = Cluster()
    for number in range(PEERS):
        cluster.join(f"p{number}")
    for number in range(FEWEST_LEASES // PEER_LEASES):
        cluster.ask(f"p{number}", *range(number * PEER_LEASES, (number + 1) * PEER_LEASES))
    assert sum(map(len, cluster.leases.values())) == FEWEST_LEASES
    for group in range(GROUPS - 1, FEWEST_LEASES - 1, -1):
        assert [r.verdict for r in cluster.ask("p7", group)] == [Verdict.LATER]
    return cluster


def orders(cluster: Cluster, since: int) -> list[tuple[str, int]]:
    return [(peer, message.group) for peer, message in cluster.sent[since:] if isinstance(message, Order)]


def test_a_lease_that_ends_gives_what_was_asked_for_first_to_who_asked() -> None:
    cluster = crowded()
    before = len(cluster.sent)
    cluster.done("p0", 0)
    assert orders(cluster, before) == [("p7", GROUPS - 1)]
    cluster.check()


@pytest.mark.parametrize("ends", ["fails", "leaves", "is late"])
def test_however_a_lease_ends_what_waits_is_given(ends: str) -> None:
    cluster = crowded()
    before = len(cluster.sent)
    if ends == "fails":
        cluster.fail("p0", 0)
    elif ends == "leaves":
        cluster.lose("p0")
    else:
        cluster.tick(LEASE_S + 1)
    given = orders(cluster, before)
    assert ("p7", GROUPS - 1) in given
    assert len({group for _, group in given}) == len(given)
    cluster.check()


def test_who_has_leases_enough_is_passed_over_for_another_who_asked() -> None:
    cluster = crowded()
    cluster.ask("p6", GROUPS - 2)
    cluster.ask("p1", GROUPS - 1)
    cluster.lose("p7")
    before = len(cluster.sent)
    cluster.done("p0", 0)
    assert orders(cluster, before) == [("p6", GROUPS - 2)], "p1 has its two leases, p7 has gone"


def test_a_seed_that_comes_is_given_what_others_wait_for() -> None:
    cluster = crowded()
    cluster.join("s", Kind.SEED)
    before = len(cluster.sent)
    cluster.done("p0", 0)
    assert orders(cluster, before) == [("s", GROUPS - 1)]


def test_what_somebody_has_meanwhile_is_not_leased() -> None:
    cluster = crowded()
    cluster.done("p5", GROUPS - 1)
    before = len(cluster.sent)
    cluster.done("p0", 0)
    assert orders(cluster, before) == [("p7", GROUPS - 2)]


def test_what_is_remembered_is_bounded() -> None:
    wanted = Wanted()
    for group in range(MOST + 5):
        for number in range(ASKERS + 3):
            wanted.add(group, f"p{number}")
    assert len(wanted) == MOST
    assert list(wanted.oldest(1)) == [(0, [f"p{number}" for number in range(ASKERS + 2, 2, -1)])]
