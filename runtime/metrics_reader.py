"""Reads metric families as the plain values that `LLM.get_metrics` returns, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family


@dataclass(slots=True)
class Metric:
    """A metric with one set of labels."""

    name: str
    labels: dict[str, str]


@dataclass(slots=True)
class Counter(Metric):
    """A number that only rises."""

    value: float


@dataclass(slots=True)
class Gauge(Metric):
    """A number that rises and falls."""

    value: float


@dataclass(slots=True)
class Histogram(Metric):
    """`buckets` maps each upper bound, "+Inf" the last, to how many values were at or below it."""

    count: int
    sum: float
    buckets: dict[str, int]


def read_metrics(families: Iterable[Family]) -> list[Metric]:
    """One metric for each set of labels of each family."""
    found: list[Metric] = []
    for family in families:
        if family.type == "histogram":
            found += _histograms(family)
            continue
        for sample in family.samples:
            value = int(sample.value) if float(sample.value).is_integer() else sample.value
            kind = Counter if family.type == "counter" else Gauge
            found.append(kind(family.name, dict(sample.labels), value))
    return found


def _histograms(family: Family) -> list[Histogram]:
    by_labels: dict[tuple[tuple[str, str], ...], Histogram] = {}
    for sample in family.samples:
        labels = {name: value for name, value in sample.labels.items() if name != "le"}
        key = tuple(labels.items())
        histogram = by_labels.setdefault(key, Histogram(family.name, labels, 0, 0.0, {}))
        if "le" in sample.labels:
            histogram.buckets[sample.labels["le"]] = int(sample.value)
        elif sample.name.endswith("_count"):
            histogram.count = int(sample.value)
        elif sample.name.endswith("_sum"):
            histogram.sum = sample.value
    return list(by_labels.values())
