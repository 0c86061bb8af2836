"""`EngineMetrics` as Prometheus' metric families, under vLLM's names and, where it has none, our own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from microvllm.runtime.metrics import HISTOGRAMS, EngineMetrics, Histogram
from microvllm.runtime.worker.step_clock import FORWARD_PARTS, PARTS

if TYPE_CHECKING:
    from microvllm.runtime.config import EngineConfig
    from microvllm.runtime.request import EngineStats

ENGINE_LABELS = ("model_name", "engine")
ENGINE = "0"  # there is one; vLLM numbers those of a data-parallel server
Kind = type[CounterMetricFamily] | type[GaugeMetricFamily]


class EngineCollector(Collector):
    """`EngineMetrics` under vLLM's names, and under our own where vLLM has none."""

    def __init__(self, metrics: EngineMetrics, model: str, config: EngineConfig) -> None:
        self._metrics = metrics
        self._model = model
        self._config = config

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        yield from self._gauges()
        yield from self._counters()
        for name, kind in HISTOGRAMS.items():
            histogram = self._metrics.histograms[name]
            yield histogram_family(
                f"vllm:{name}", kind.help, ENGINE_LABELS, [((self._model, ENGINE), histogram)]
            )

    def _gauges(self) -> Iterator[Metric]:
        now = self._metrics.totals
        yield self._number(
            GaugeMetricFamily, "vllm:num_requests_running", "Requests being computed.", now.num_running
        )
        yield self._number(
            GaugeMetricFamily, "vllm:num_requests_waiting", "Requests in the queue.", now.num_waiting
        )
        # Requests queue for rows and KV blocks only; vLLM defers some for an adapter or a grammar, too.
        yield self._numbers(
            GaugeMetricFamily,
            "vllm:num_requests_waiting_by_reason",
            "Requests in the queue by what they wait for.",
            "reason",
            {"capacity": now.num_waiting, "deferred": 0},
        )
        yield self._number(
            GaugeMetricFamily, "vllm:kv_cache_usage_perc", "Used share of the KV blocks.", now.kv_usage
        )
        yield self._number(
            GaugeMetricFamily,
            "microvllm:kv_unused_slots",
            "Token slots of used KV blocks that are empty.",
            now.kv_unused_slots,
        )
        config = self._config
        # Not the configuration's number: on a GPU that is measured by the engine.
        slots = now.kv_blocks_total * config.block_size
        labels = {
            "block_size": config.block_size,
            "num_gpu_blocks": now.kv_blocks_total,
            "cache_dtype": config.dtype,
            "enable_prefix_caching": config.enable_prefix_caching,
            "kv_cache_size_tokens": slots,
            "kv_cache_max_concurrency": slots / config.max_model_len,
            "engine": ENGINE,
        }
        values = tuple(map(str, labels.values()))
        yield numbers_family(
            GaugeMetricFamily, "vllm:cache_config_info", "The KV cache.", tuple(labels), [(values, 1)]
        )

    def _counters(self) -> Iterator[Metric]:
        metrics, total = self._metrics, self._metrics.totals
        for name, text, value in (
            (
                "vllm:prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                total.prefix_queries,
            ),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", total.prefix_hits),
            ("vllm:num_preemptions", "Preemptions.", total.preemptions),
            ("vllm:prompt_tokens", "Prompt tokens, computed and cached.", metrics.prompt_tokens),
            ("vllm:prompt_tokens_cached", "Prompt tokens from the prefix cache.", metrics.cached_tokens),
            ("vllm:generation_tokens", "Generated tokens.", metrics.generation_tokens),
            ("microvllm:engine_steps", "Steps of the engine.", total.steps),
            ("microvllm:graph_replays", "Steps that ran as a captured CUDA graph.", total.graph_replays),
            ("microvllm:padded_tokens", "Tokens computed to fill up a graph.", total.padded_tokens),
            ("microvllm:engine_deaths", "Engine processes that died.", metrics.engine_deaths),
        ):
            yield self._number(CounterMetricFamily, name, text, value)
        sources = {
            "local_compute": metrics.prompt_tokens - metrics.cached_tokens,
            "local_cache_hit": metrics.cached_tokens,
        }
        for name, text, label, values in (
            ("vllm:prompt_tokens_by_source", "Prompt tokens by origin.", "source", sources),
            (
                "vllm:prompt_tokens_cached_by_source",
                "Prompt tokens from the prefix cache by where it keeps them.",
                "source",
                {"device": total.prefix_hits},
            ),
            (
                "vllm:request_success",
                "Ended requests by reason.",
                "finished_reason",
                metrics.finished_requests,
            ),
        ):
            yield self._numbers(CounterMetricFamily, name, text, label, values)
        yield from self._step_times(total)
        rejections = [((self._model, reason), number) for reason, number in metrics.rejections.items()]
        yield numbers_family(
            CounterMetricFamily,
            "vllm:admission_rejections",
            "Requests refused because the queue was full.",
            ("model_name", "reason"),
            rejections,
        )

    def _step_times(self, total: EngineStats) -> Iterator[Metric]:
        yield self._numbers(
            CounterMetricFamily,
            "microvllm:engine_steps_by_kind",
            "Steps by what they compute: one token of each request (decode), or more of some (prefill).",
            "kind",
            {"decode": total.decode_steps, "prefill": total.steps - total.decode_steps},
        )
        # All parts together are the time since the start, as far as the last step told.
        yield self._numbers(
            CounterMetricFamily,
            "microvllm:step_seconds",
            "Time of the engine's thread by part of a step; on a GPU forward and sample only launch, "
            "and wait is for the device.",
            "part",
            {part: getattr(total, f"{part}_seconds") for part in PARTS},
        )
        # These are measured with --log-step-times only.
        inside: dict[str, float] = {part: getattr(total, f"{part}_seconds") for part in FORWARD_PARTS}
        if any(inside.values()):
            yield self._numbers(
                CounterMetricFamily,
                "microvllm:forward_seconds",
                "Time of step_seconds' forward by part of the model; layers is what the others leave.",
                "part",
                {**inside, "layers": total.forward_seconds - sum(inside.values())},
            )
        if total.gpu_busy_seconds:
            yield self._numbers(
                CounterMetricFamily,
                "microvllm:gpu_seconds",
                "Time of the GPU, by its own clock: busy with a step, or idle between two although there was "
                "work.",
                "state",
                {"busy": total.gpu_busy_seconds, "idle": total.gpu_idle_seconds},
            )

    def _number(self, kind: Kind, name: str, text: str, value: float) -> Metric:
        return numbers_family(kind, name, text, ENGINE_LABELS, [((self._model, ENGINE), value)])

    def _numbers(self, kind: Kind, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        labelled = [((self._model, ENGINE, key), value) for key, value in values.items()]
        return numbers_family(kind, name, text, (*ENGINE_LABELS, label), labelled)


def numbers_family(
    kind: Kind,
    name: str,
    text: str,
    labels: Sequence[str],
    values: Iterable[tuple[Sequence[str], float]],
) -> Metric:
    """A family with one number for each tuple of label values."""
    family = kind(name, text, labels=labels)
    for of_labels, value in values:
        family.add_metric(of_labels, value)
    return family


def histogram_family(
    name: str, text: str, labels: Sequence[str], histograms: Iterable[tuple[Sequence[str], Histogram]]
) -> Metric:
    """A family with one histogram for each tuple of label values."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for of_labels, histogram in histograms:
        bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
        family.add_metric(of_labels, list(zip(bounds, histogram.cumulative(), strict=True)), histogram.sum)
    return family
