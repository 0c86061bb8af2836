"""Figures of a measurement, under the names and in the units of `vllm bench serve --save-result`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import fmean, median, pstdev
from typing import Any

from microvllm.openai_compat.bench.client import Measured, RequestResult
from microvllm.openai_compat.bench.workloads import Case

PERCENTILES = (50, 90, 99)
METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between chunks",
    "e2el": "whole request",
}


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile of a non-empty list, with linear interpolation (as numpy does it)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def samples(requests: Sequence[RequestResult]) -> dict[str, list[float]]:
    """Return the times in milliseconds by metric, over the requests without error."""
    good = [request for request in requests if not request.error]
    return {
        "ttft": [1e3 * request.ttft for request in good],
        "tpot": [1e3 * request.tpot for request in good if request.tpot is not None],
        "itl": [1e3 * gap for request in good for gap in request.itls],
        "e2el": [1e3 * request.latency for request in good],
    }


def peaks(requests: Sequence[RequestResult]) -> tuple[float, int]:
    """(most output tokens, most requests that ran) in any second after the start of the first request.

    The tokens of a request are spread evenly over its chunks with text.
    """
    good = [request for request in requests if not request.error]
    if not good:
        return 0.0, 0
    begin = min(request.started for request in good)
    seconds = 1 + int(max(request.started + request.latency for request in good) - begin)
    tokens, running = [0.0] * (seconds + 1), [0] * (seconds + 1)
    for request in good:
        offset = request.started - begin
        moment = offset + request.ttft
        share = request.completion_tokens / (1 + len(request.itls))
        tokens[int(moment)] += share
        for gap in request.itls:
            moment += gap
            tokens[min(int(moment), seconds)] += share
        for second in range(int(offset), int(offset + request.latency) + 1):
            running[second] += 1
    return max(tokens), max(running)


def as_vllm(
    measured: Measured,
    case: Case,
    *,
    model: str | None,
    label: str | None = None,
    detailed: bool = False,
    percentiles: Sequence[float] = PERCENTILES,
) -> dict[str, Any]:
    """Return the result under vLLM's names, and a few more at the end.

    `detailed` keeps what vLLM keeps with `--save-detailed`: texts, errors and times of every request.
    """
    requests, good = measured.requests, measured.good
    tokens_in = sum(request.prompt_tokens for request in good)
    tokens_out = sum(request.completion_tokens for request in good)
    most_tokens, most_running = peaks(requests)
    backend = "openai-chat" if case.turns else "openai"
    result: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": label,
        "model_id": model,
        "tokenizer_id": None,  # the server counts, see `tokens_counted_by`
        "num_prompts": len(requests),
        "request_rate": "inf" if math.isinf(case.request_rate) else case.request_rate,
        "burstiness": case.burstiness,
        "max_concurrency": case.concurrency,
        "duration": measured.duration,
        "completed": len(good),
        "failed": len(requests) - len(good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / measured.duration,
        "request_goodput": None,
        "output_throughput": tokens_out / measured.duration,
        "total_token_throughput": (tokens_in + tokens_out) / measured.duration,
        "latencies": [request.latency for request in requests],
        "queue_times": [request.queued for request in requests],
        "max_output_tokens_per_s": most_tokens,
        "max_concurrent_requests": most_running,
        "rtfx": 0.0,  # vLLM's share of audio
    }
    if detailed:
        result |= {
            "input_lens": [request.prompt_tokens for request in requests],
            "output_lens": [request.completion_tokens for request in requests],
            "ttfts": [request.ttft for request in requests],
            "itls": [request.itls for request in requests],
            "start_times": [request.started for request in requests],
            "generated_texts": [request.text for request in requests],
            "errors": [request.error for request in requests],
        }
    values = samples(requests)
    if case.concurrency is not None:
        values["client_queue_time"] = [1e3 * request.queued for request in good]
    for name, times in values.items():
        times = times or [0.0]
        result[f"mean_{name}_ms"] = fmean(times)
        result[f"median_{name}_ms"] = median(times)
        result[f"std_{name}_ms"] = pstdev(times)
        result |= {f"p{percent:g}_{name}_ms": percentile(times, percent) for percent in percentiles}
    cached = [request.cached_tokens for request in good if request.cached_tokens is not None]
    return result | {
        "workload": case.workload,
        "load": case.load,
        "error_messages": measured.errors,
        "tokens_counted_by": sorted({request.counted_by for request in good}),
        "total_cached_tokens": sum(cached) if cached else None,
        "client_cpu_s": measured.client_cpu_s,
    }
