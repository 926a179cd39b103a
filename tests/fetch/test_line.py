"""The estimate of a line: what it says of steady lines, and that it never says nonsense."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rafsfs.fetch.line import ENOUGH_S, GROWTH, HALF_LIFE_S, LineEstimate

MIB = 1 << 20


def steady(bandwidth: float, latency: float, *, reads: int = 64, size: int = 8 * MIB) -> LineEstimate:
    """Return what is known of a line after so many reads, one after the other."""
    line, now = LineEstimate(), 0.0
    for _ in range(reads):
        line.began(now)
        line.answered(latency)
        now += size / bandwidth
        line.ended(now, size)
        now += 100.0  # nothing is on its way: no time that counts
    return line


@given(st.floats(1e5, 1e10), st.floats(1e-4, 1.0))
def test_a_steady_line_is_known_as_what_it_is(bandwidth: float, latency: float) -> None:
    line = steady(bandwidth, latency)
    assert abs(line.latency_s - latency) < 1e-9
    # A read counts when it has ended: of the last half-life, what a read brings may be counted late.
    slack = 1 + 8 * MIB / bandwidth / HALF_LIFE_S
    if line.bandwidth:
        assert bandwidth / slack / 1.01 <= line.bandwidth <= bandwidth * slack * 1.01


def test_the_window_grows_with_latency_times_bandwidth_and_stays_in_its_bounds() -> None:
    least, step = 32 * MIB, 8 * MIB
    assert LineEstimate().window(least, step) == least
    assert steady(1e9, 0.001).window(least, step) == least
    grown = steady(1e9, 0.03).window(least, step)
    assert least < 70e6 < grown < 85e6
    assert steady(1e10, 0.5).window(least, step) == GROWTH * least
    assert steady(1e9, 0.03).window(0, 0) == 0


def test_reads_side_by_side_are_one_line() -> None:
    line = LineEstimate()
    for _ in range(4):
        line.began(0.0)
    for _ in range(4):
        line.ended(0.1, MIB)
    assert abs(line.bandwidth - 40 * MIB) < 1


def test_little_says_nothing_and_old_times_are_forgotten() -> None:
    line = LineEstimate()
    line.began(0.0)
    line.ended(ENOUGH_S / 2, 8 * MIB)
    assert line.bandwidth == 0.0
    for number in range(40):
        line.began(float(number))
        line.ended(number + 1.0, MIB)
    assert line.bandwidth < 1.2 * MIB


@given(st.lists(st.tuples(st.sampled_from("bea"), st.floats(0, 10), st.integers(0, 1 << 30))))
def test_whatever_comes_the_window_is_bounded(events: list[tuple[str, float, int]]) -> None:
    line, now, reads = LineEstimate(), 0.0, 0
    for kind, passed, size in events:
        now += passed
        if kind == "b":
            line.began(now)
            reads += 1
        elif kind == "a":
            line.answered(passed)
        elif reads:
            line.ended(now, size)
            reads -= 1
        assert 32 * MIB <= line.window(32 * MIB, 8 * MIB) <= GROWTH * 32 * MIB
