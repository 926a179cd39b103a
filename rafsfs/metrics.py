"""Figures for Prometheus: what a series is, a histogram, and the text that is scraped.

Decided here: that every series is declared with its help and labels before it has values, and that a value for an undeclared one is a
fault. Rule: labels take their values from sets that the program bounds (sources, states, classes of errors), never from addresses,
references or paths. The text is made by prometheus-client, which is loaded when the first text is made: 12 MiB that only who is scraped
pays for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bounds of buckets for times of reads: from a chunk of a neighbour in the rack to the deadline."""


@dataclass(frozen=True, slots=True)
class Series:
    """One series. `name` of a counter is given without `_total`, which the text adds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str = ""
    """Name of its label, if it has one: two would multiply."""

    @property
    def shown(self) -> str:
        """The name as it is scraped."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


class Histogram:
    """Counts of observations by bucket. For one thread."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Observations."""
        return sum(self._counts)

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, observations up to it), the last one `+Inf`."""
        found, total = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


Labelled = Mapping[str, float]
"""Values by the value of the one label of the series."""
Values = Mapping[str, float | Histogram | Labelled]
"""Values by name of series."""


def render(series: Iterable[Series], values: Values) -> bytes:
    """Return the text of all series that have values. Raises KeyError for a value of a series that is not declared."""
    from prometheus_client.exposition import generate_latest  # noqa: PLC0415 - see above

    declared = {one.name: one for one in series}
    unknown = values.keys() - declared.keys()
    if unknown:
        raise KeyError(f"series not declared: {', '.join(sorted(unknown))}")
    found = [_family(one, values[name]) for name, one in declared.items() if name in values]
    return generate_latest(_Families(found))


class _Families:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def _family(series: Series, value: float | Histogram | Labelled) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily  # noqa: PLC0415

    if isinstance(value, Histogram):
        return HistogramMetricFamily(series.name, series.help, buckets=value.buckets(), sum_value=value.sum)
    kind = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
    family: CounterMetricFamily | GaugeMetricFamily = kind(
        series.name, series.help, labels=[series.label] if series.label else []
    )
    if isinstance(value, Mapping):
        for label, number in sorted(value.items()):
            family.add_metric([label], number)
    else:
        family.add_metric([], value)
    return family
