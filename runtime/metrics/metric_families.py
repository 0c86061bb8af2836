"""Converts `EngineMetrics` into Prometheus' metric families, and those into the values of `LLM.get_metrics`.

Importing prometheus_client takes a while: a server does so at the first scrape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from microvllm.runtime.metrics import engine_metrics as metrics
from microvllm.runtime.metrics.engine_metrics import FAMILIES, EngineMetrics

if TYPE_CHECKING:
    from microvllm.runtime.config import EngineConfig

NUMBERS = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class EngineCollector(Collector):
    """The families of `metrics.tsv`, labelled with the model's name, and the KV cache's configuration.

    `metrics` has those of each engine, whose label is its number.
    """

    def __init__(self, metrics: Sequence[EngineMetrics], model: str, config: EngineConfig) -> None:
        self._metrics = metrics
        self._model = model
        self._config = config

    def collect(self) -> Iterator[Family]:
        """Called by the registry at every scrape."""
        yield self._cache_config()
        for name, kind, label, value, text in FAMILIES:
            labels = ["model_name", "engine"]
            parts = [([self._model, str(number)], each) for number, each in enumerate(self._metrics)]
            if name == "vllm:admission_rejections":  # counted where no engine is chosen yet, by the first
                labels, parts = labels[:1], [([self._model], self._metrics[0])]
            if kind == "histogram":
                key = name.removeprefix("vllm:")
                histograms = [(shared, each.histograms[key]) for shared, each in parts]
                yield histogram_family(name, text, labels, histograms)
                continue
            values: list[tuple[list[str], float]] = []
            for shared, each in parts:
                found = attrgetter(value)(each)
                by_label = {(key,): number for key, number in found.items()} if label else {(): found}
                values += [([*shared, *key], number) for key, number in by_label.items()]
            if values:
                yield number_family(kind, name, text, [*labels, label] if label else labels, values)

    def _cache_config(self) -> Family:
        config = self._config
        values = []
        for number, each in enumerate(self._metrics):
            # Not the configuration's numbers: on a GPU they are measured by the engine.
            tokens = each.totals.kv_tokens_total
            labels = {
                "block_size": config.block_size,
                "num_gpu_blocks": each.totals.kv_blocks_total,
                "cache_dtype": config.kv_dtype,
                "enable_prefix_caching": config.enable_prefix_caching,
                "kv_cache_size_tokens": tokens,
                "kv_cache_max_concurrency": tokens / config.max_model_len,
                "engine": number,
            }
            values.append((list(map(str, labels.values())), 1))
        return number_family("gauge", "vllm:cache_config_info", "The KV cache.", list(labels), values)


def number_family(
    kind: str, name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> Family:
    """Return a counter or gauge with one number for each list of label values."""
    family: CounterMetricFamily | GaugeMetricFamily = NUMBERS[kind](name, text, labels=labels)
    for of_labels, value in values:
        family.add_metric(of_labels, value)
    return family


def histogram_family(
    name: str,
    text: str,
    labels: Sequence[str],
    histograms: Iterable[tuple[Sequence[str], metrics.Histogram]],
) -> Family:
    """Return a family with one histogram for each list of label values."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for of_labels, histogram in histograms:
        bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
        family.add_metric(of_labels, list(zip(bounds, histogram.cumulative(), strict=True)), histogram.sum)
    return family


# ---- the values of `LLM.get_metrics`, under vLLM's names -------------------------------------------


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
    """Return one metric for each set of labels of each family; a histogram has one set."""
    found: list[Metric] = []
    for family in families:
        if family.type == "histogram":
            buckets = {s.labels["le"]: int(s.value) for s in family.samples if "le" in s.labels}
            total, labels = family.samples[-1].value, dict(family.samples[-1].labels)
            found.append(Histogram(family.name, labels, buckets["+Inf"], total, buckets))
            continue
        for sample in family.samples:
            value = int(sample.value) if float(sample.value).is_integer() else sample.value
            kind = Counter if family.type == "counter" else Gauge
            found.append(kind(family.name, dict(sample.labels), value))
    return found
