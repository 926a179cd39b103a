"""What is scraped: every series declared once, documented, and in a text that Prometheus reads."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from rafsfs.daemon.metrics import NODE
from rafsfs.metrics import SECONDS, Histogram, Series, render
from scheduler.metrics import SCHEDULER

from .architecture.source_tree import ROOT


def test_every_series_is_in_the_table_of_the_operator_and_no_other() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    shown = {
        name: (kind, label.strip("`-"))
        for name, kind, label in re.findall(r"^\| `(rafs_\w+)` \| (\w+) \| (\S*) \|", page, re.MULTILINE)
    }
    assert shown == {series.shown: (series.kind, series.label) for series in (*NODE, *SCHEDULER)}


def test_every_series_is_declared_once_and_says_what_it_is() -> None:
    names = [series.name for series in (*NODE, *SCHEDULER)]
    assert len(set(names)) == len(names)
    assert all(series.help.endswith(".") and not series.name.endswith("_total") for series in (*NODE, *SCHEDULER))


def test_the_text_holds_what_was_given() -> None:
    waits = Histogram()
    for seconds in (0.0005, 0.3, 100.0):
        waits.observe(seconds)
    series = (
        Series("rafs_a", "counter", "A."),
        Series("rafs_b", "gauge", "B.", "state"),
        Series("rafs_c_seconds", "histogram", "C."),
        Series("rafs_d", "gauge", "Not known now."),
    )
    text = render(series, {"rafs_a": 3, "rafs_b": {'odd "state"': 1, "up": 2}, "rafs_c_seconds": waits}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families.keys() == {"rafs_a", "rafs_b", "rafs_c_seconds"}
    assert [(s.name, s.value) for s in families["rafs_a"].samples] == [("rafs_a_total", 3)]
    assert {s.labels["state"]: s.value for s in families["rafs_b"].samples} == {'odd "state"': 1, "up": 2}
    counts = {s.labels.get("le", s.name): s.value for s in families["rafs_c_seconds"].samples}
    assert (counts["0.001"], counts["0.5"], counts["60.0"], counts["+Inf"]) == (1, 2, 2, 3)
    assert counts["rafs_c_seconds_sum"] == pytest.approx(100.3005)


def test_a_value_of_no_declared_series_is_a_fault() -> None:
    with pytest.raises(KeyError, match="rafs_x"):
        render(NODE, {"rafs_x": 1})


@given(st.lists(st.floats(0, 1e6)))
def test_buckets_only_grow_and_the_last_counts_all(values: list[float]) -> None:
    waits = Histogram()
    for value in values:
        waits.observe(value)
    counts = [count for _, count in waits.buckets()]
    assert counts == sorted(counts)
    assert counts[-1] == waits.count == len(values)
    for bound, count in zip(SECONDS, counts, strict=False):
        assert count == sum(value <= bound for value in values)
