"""The table of pins under any order of events: first come is what holds, one live lease per section, nobody waits for nothing."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.protocol.messages import VERSION, Hello, Kind, PinAlive, PinAnswer, PinAsk, PinFailed, PinPut, PinVerdict
from rafsfs.files.plan import SECTION_BYTES
from scheduler.engine import Engine
from scheduler.pins import GRACE_S, LEASE_S, PEER_LEASES, REST_S, Out, PinTable

FILE = b"f" * 32
SECTIONS = 4
LENGTH = SECTIONS * SECTION_BYTES


def digests(mark: int) -> bytes:
    return bytes([mark]) * 32 * 16


class Nodes:
    """Nodes that believe what they are told, around one table."""

    def __init__(self) -> None:
        self.table = PinTable()
        self.now = 0.0
        self.leases: dict[str, set[int]] = {}
        self.pinned: dict[int, bytes] = {}
        self.told: dict[tuple[str, int], bytes] = {}
        self.waits: set[tuple[str, int]] = set()

    def take(self, out: Out) -> None:
        for peer, message in out:
            assert isinstance(message, PinAnswer)
            for pin in message.pins:
                if pin.verdict is PinVerdict.PINNED:
                    assert self.told.setdefault((peer, pin.section), pin.digests) == pin.digests
                    self.waits.discard((peer, pin.section))
                elif pin.verdict is PinVerdict.LEASE:
                    self.leases.setdefault(peer, set()).add(pin.section)
                    self.waits.discard((peer, pin.section))
                elif message.number:
                    self.waits.add((peer, pin.section))

    def live(self) -> list[int]:
        return [section for section, lease in self.table.files[FILE].leases.items() if lease.is_live(self.now)]

    def check(self) -> None:
        file = self.table.files.get(FILE)
        if file is None:
            return
        assert file.pinned == self.pinned
        assert not file.leases.keys() & file.pinned.keys()
        assert all(section not in self.pinned for _, section in self.waits), "who waits hears of it"


peers = st.sampled_from(["a", "b", "c"])
sections = st.integers(0, SECTIONS)
events = st.one_of(
    st.tuples(st.just("ask"), peers, st.lists(sections, max_size=5), st.integers(0, 6)),
    st.tuples(st.just("put"), peers, sections, st.integers(1, 3)),
    st.tuples(st.just("fail"), peers, sections, st.none()),
    st.tuples(st.just("alive"), peers, sections, st.none()),
    st.tuples(st.just("gone"), peers, st.none(), st.none()),
    st.tuples(st.just("tick"), st.floats(0.1, 2 * LEASE_S), st.none(), st.none()),
)


@settings(max_examples=300)
@given(st.lists(events, max_size=40))
def test_any_order_of_events(order: list[tuple[str, object, object, object]]) -> None:
    nodes = Nodes()
    for what, one, two, three in order:
        if what == "tick":
            nodes.now += one  # type: ignore[operator]
            nodes.take(nodes.table.tick(nodes.now))
            assert all(
                lease.is_live(nodes.now) for file in nodes.table.files.values() for lease in file.leases.values()
            )
            continue
        peer = str(one)
        if what == "ask":
            held = (
                {s: lease.peer for s, lease in nodes.table.files[FILE].leases.items()}
                if FILE in nodes.table.files
                else {}
            )
            live = set(nodes.live()) if held else set()
            before = dict(nodes.leases)
            out = nodes.table.ask(peer, PinAsk(1, FILE, LENGTH, two, three), nodes.now)  # type: ignore[arg-type]
            nodes.take(out)
            for pin in out[0][1].pins:  # type: ignore[union-attr]
                if pin.verdict is PinVerdict.LEASE:
                    assert pin.section not in live or held[pin.section] == peer, "one live lease"
            assert before is not None
            mine = [s for s in nodes.live() if nodes.table.files[FILE].leases[s].peer == peer]
            assert len(mine) <= PEER_LEASES
        elif what == "put":
            data = digests(three)  # type: ignore[arg-type]
            if two < SECTIONS:  # type: ignore[operator]
                nodes.pinned.setdefault(two, data)  # type: ignore[arg-type]
            nodes.take(nodes.table.put(peer, PinPut(1, FILE, LENGTH, two, data), nodes.now))  # type: ignore[arg-type]
        elif what == "fail":
            nodes.take(nodes.table.failed(peer, PinFailed(FILE, [two]), nodes.now))  # type: ignore[list-item]
        elif what == "alive":
            nodes.take(nodes.table.alive(peer, PinAlive(FILE, [two]), nodes.now))  # type: ignore[list-item]
        else:
            nodes.take(nodes.table.gone(peer, nodes.now))
            nodes.waits = {wait for wait in nodes.waits if wait[0] != peer}
        nodes.check()


def test_signs_of_life_do_not_keep_a_section_for_ever() -> None:
    table = PinTable()
    table.ask("slow", PinAsk(1, FILE, LENGTH, [0], 1), 0.0)
    table.ask("waits", PinAsk(1, FILE, LENGTH, [0], 1), 1.0)
    now = 0.0
    while now < GRACE_S + SECTION_BYTES / (256 << 10):
        table.alive("slow", PinAlive(FILE, [0]), now)
        assert table.tick(now) == []
        now += LEASE_S / 2
    assert [peer for peer, _ in table.tick(now)] == ["waits"]
    pins = table.ask("slow", PinAsk(1, FILE, LENGTH, [0], 1), now)[0][1].pins  # type: ignore[union-attr]
    assert pins[0].verdict is PinVerdict.WAIT, "it rests while others wait"
    pins = table.ask("waits", PinAsk(1, FILE, LENGTH, [0], 1), now + REST_S / 2)[0][1].pins  # type: ignore[union-attr]
    assert pins[0].verdict is PinVerdict.LEASE


def test_another_length_or_too_many_digests_are_not_taken() -> None:
    table = PinTable()
    table.put("a", PinPut(1, FILE, LENGTH, 0, digests(1)), 0.0)
    for length, section, data in (
        (LENGTH + 1, 1, digests(1)),
        (LENGTH, 1, digests(1)[32:]),
        (LENGTH, 9, digests(1)),
        (0, 0, b""),
    ):
        out = table.put("b", PinPut(1, FILE, length, section, data), 0.0)
        assert out[0][1].pins == []  # type: ignore[union-attr]
    assert table.files[FILE].pinned == {0: digests(1)}


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    table = PinTable(max_bytes=3 * len(digests(1)), max_files=5)
    for number in range(20):
        table.put("a", PinPut(0, bytes([number]) * 32, LENGTH, 0, digests(1)), float(number))
        table.ask("a", PinAsk(1, b"\0" * 32, LENGTH, [0], 0), float(number))
    assert sum(file.bytes_held for file in table.files.values()) <= 3 * len(digests(1))
    assert b"\0" * 32 in table.files, "what is asked for stays"
    assert len(table.files) <= 5


def test_a_node_that_goes_frees_what_it_was_to_fetch() -> None:
    engine = Engine(random.Random(1))
    for name in ("a", "b"):
        engine.connect(Hello(VERSION, name, 1, Kind.PEER), "h", 0.0)
    engine.handle("a", PinAsk(1, FILE, LENGTH, [0], 1), 0.0)
    engine.handle("b", PinAsk(1, FILE, LENGTH, [0], 1), 0.0)
    assert [peer for peer, _ in engine.disconnect("a", 1.0)] == ["b"]
    answer = engine.handle("b", PinAsk(2, FILE, LENGTH, [0], 1), 1.0)[0][1]
    assert isinstance(answer, PinAnswer)
    assert answer.pins[0].verdict is PinVerdict.LEASE
