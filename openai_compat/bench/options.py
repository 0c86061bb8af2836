"""The options of `microvllm bench serve`, under the names and defaults of `vllm bench serve` 0.33."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from microvllm.openai_compat.flags.argv import UsageError
from microvllm.openai_compat.flags.command import warn
from microvllm.openai_compat.flags.option_values import OBJECT, json_object

BACKENDS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """What is sent where, how fast, and what is reported of it. Lengths are in tokens, times in seconds."""

    url: str
    backend: str
    model: str | None
    num_prompts: int
    input_len: int
    output_len: int
    range_ratio: float
    prefix_len: int
    request_rate: float
    burstiness: float
    max_concurrency: int | None
    num_warmups: int
    ready_timeout: float
    seed: int
    fields: Mapping[str, Any]
    """Fields that are put into each request."""
    metrics: tuple[str, ...]
    percentiles: tuple[float, ...]
    goodput: Mapping[str, float] = field(default_factory=dict)
    """Metric to the most milliseconds of a good request."""
    result_file: str | None = None
    detailed: bool = False
    label: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def bench_args(
    *,
    backend: Annotated[
        str, typer.Option(help="openai (or vllm): completions; openai-chat: chats.")
    ] = "openai",
    base_url: Annotated[str | None, typer.Option(help="Address of the server, before /v1.")] = None,
    host: Annotated[str, typer.Option(help="Its host, without --base-url.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port, without --base-url.")] = 8000,
    endpoint: Annotated[str | None, typer.Option(help="The path that the backend has anyway.")] = None,
    model: Annotated[str | None, typer.Option(help="Its model; the first it lists if not given.")] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name in requests, if not --model.")
    ] = None,
    dataset_name: Annotated[str, typer.Option(help="random: prompts of random tokens.")] = "random",
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests.")] = 1000,
    random_input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 1024,
    random_output_len: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(min=0, max=0.999, help="Lengths differ by up to this share, uniformly.")
    ] = 0.0,
    random_prefix_len: Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with.")] = 0,
    input_len: Annotated[int | None, typer.Option(min=1, help="The same as --random-input-len.")] = None,
    output_len: Annotated[int | None, typer.Option(min=1, help="The same as --random-output-len.")] = None,
    request_rate: Annotated[str, typer.Option(help="Requests a second, or inf: all at once.")] = "inf",
    burstiness: Annotated[str, typer.Option(help="1: a Poisson process; less: in bursts.")] = "1.0",
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Most requests at a time.")] = None,
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before those that are measured.")] = 0,
    ready_check_timeout_sec: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for the server; 0: it has to be there.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of prompts, lengths and arrivals.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end token; always so for random prompts.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Sampling; the server's if not given.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    extra_body: Annotated[
        Any, typer.Option(parser=json_object, metavar=OBJECT, help="Further fields of each request.")
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Metrics to report: ttft, tpot, itl, e2el.")
    ] = "ttft,tpot,itl",
    metric_percentiles: Annotated[str, typer.Option(help="Their percentiles.")] = "99",
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="Limits that a request has to keep to count as good."),
    ] = None,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write a JSON file.")] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="In it also each request with its text.")
    ] = False,
    result_dir: Annotated[str | None, typer.Option(help="Its folder; made if it is missing.")] = None,
    result_filename: Annotated[str | None, typer.Option(help="Its name.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Put into it.")] = None,
    label: Annotated[str | None, typer.Option(help="Begins its name.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Not needed: prompts are token ids, and the server counts.")
    ] = None,
    disable_tqdm: Annotated[
        bool, typer.Option("--disable-tqdm", help="Not needed: there is no progress bar.")
    ] = False,
) -> BenchArgs:
    """What the options ask for. Raises `UsageError` naming the option."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend must be one of {', '.join(BACKENDS)}, got {backend}")
    if endpoint is not None and endpoint != BACKENDS[backend]:
        raise UsageError(f"--endpoint {endpoint}: the backend {backend} has {BACKENDS[backend]}")
    if dataset_name != "random":
        raise UsageError(f"--dataset-name must be random, got {dataset_name}")
    metrics = tuple(name for name in percentile_metrics.split(",") if name)
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"--percentile-metrics must be of {', '.join(METRICS)}, got {name}")
    percentiles = tuple(_positive("--metric-percentiles", text) for text in metric_percentiles.split(","))
    if max(percentiles) > 100:
        raise UsageError(f"--metric-percentiles must be at most 100, got {metric_percentiles}")
    limits = _pairs("--goodput", goodput or [], ":")
    for name in limits:
        if name not in GOODPUT:
            raise UsageError(f"--goodput must be of {', '.join(GOODPUT)}, got {name}")
    if tokenizer is not None:
        warn("--tokenizer has no effect: prompts are token ids, and the server counts")
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "repetition_penalty": repetition_penalty,
    }
    rate = _positive("--request-rate", request_rate)
    model_name = served_model_name or model
    result_file = None
    if save_result or save_detailed:
        short = (model_name or "model").rstrip("/").rpartition("/")[2]
        result_file = result_filename or f"{label or backend}-{rate}qps-{short}.json"
        if result_dir is not None:
            result_file = f"{result_dir}/{result_file}"
    return BenchArgs(
        url=(base_url or f"http://{host}:{port}").rstrip("/").removesuffix("/v1"),
        backend=backend,
        model=model_name,
        num_prompts=num_prompts,
        input_len=input_len or random_input_len,
        output_len=output_len or random_output_len,
        range_ratio=random_range_ratio,
        prefix_len=random_prefix_len,
        request_rate=rate,
        burstiness=_positive("--burstiness", burstiness),
        max_concurrency=max_concurrency,
        num_warmups=num_warmups,
        ready_timeout=ready_check_timeout_sec,
        seed=seed,
        fields={**sampling, **(extra_body or {})},
        metrics=metrics,
        percentiles=percentiles,
        goodput={name: _positive("--goodput", text) for name, text in limits.items()},
        result_file=result_file,
        detailed=save_detailed,
        label=label,
        metadata=_pairs("--metadata", metadata or [], "="),
    )


def _positive(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise UsageError(f"{option} must be a number above 0, got {text}")
    return value


def _pairs(option: str, words: list[str], separator: str) -> dict[str, str]:
    pairs = dict(word.partition(separator)[::2] for word in words)
    if any(separator not in word for word in words):
        raise UsageError(f"{option} must be like NAME{separator}VALUE, got {' '.join(words)}")
    return pairs
