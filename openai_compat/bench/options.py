"""Defines the options of `microvllm bench serve`, under the names and defaults of `vllm bench serve` 0.33."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from microvllm.openai_compat.flags.argv import UsageError
from microvllm.openai_compat.flags.command import warn
from microvllm.runtime.options.flag import ANSWERS, MODEL, OPTIONS, SERVER, check_flags, flag, given_flags

BACKENDS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT = ("ttft", "tpot", "e2el")
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
)


def positive(text: str) -> float:
    """Return a number above 0, which may be infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ValueError(f"must be a number above 0, got {text}")
    return value


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """Options of a load: its target, requests, rate and report. Lengths are in tokens, times in seconds.

    Raises `ConfigError` naming the option.
    """

    backend: str = flag(
        "openai", OPTIONS, "openai (or vllm): completions; openai-chat: chats.", choices=tuple(BACKENDS)
    )
    base_url: str | None = flag(None, OPTIONS, "Address of the server, before /v1.")
    host: str = flag("127.0.0.1", SERVER, "Its host, without --base-url.")
    port: int = flag(8000, SERVER, "Its port, without --base-url.", low=1, high=65535)
    endpoint: str | None = flag(None, OPTIONS, "The path that the backend has anyway.")
    model: str | None = flag(None, MODEL, "Its model; the first it lists if not given.")
    served_model_name: str | None = flag(None, ANSWERS, "The model's name in requests, if not --model.")
    dataset_name: str = flag("random", OPTIONS, "random: prompts of random tokens.", choices=("random",))
    num_prompts: int = flag(1000, OPTIONS, "Requests.", low=1)
    random_input_len: int = flag(1024, OPTIONS, "Tokens of a prompt.", low=1)
    random_output_len: int = flag(128, OPTIONS, "Tokens of an answer.", low=1)
    range_ratio: float = flag(
        0.0,
        OPTIONS,
        "Lengths differ by up to this share, uniformly.",
        name="random-range-ratio",
        low=0,
        high=0.999,
    )
    prefix_len: int = flag(0, OPTIONS, "Tokens that all prompts begin with.", name="random-prefix-len", low=0)
    own_input_len: int | None = flag(
        None, OPTIONS, "The same as --random-input-len.", name="input-len", low=1
    )
    own_output_len: int | None = flag(
        None, OPTIONS, "The same as --random-output-len.", name="output-len", low=1
    )
    request_rate: float = flag(
        math.inf, OPTIONS, "Requests a second, or inf: all at once.", metavar="<str>", read=positive
    )
    burstiness: float = flag(
        1.0, OPTIONS, "1: a Poisson process; less: in bursts.", metavar="<str>", read=positive
    )
    max_concurrency: int | None = flag(None, OPTIONS, "Most requests at a time.", low=1)
    num_warmups: int = flag(0, OPTIONS, "Requests before those that are measured.", low=0)
    ready_timeout: float = flag(
        0.0,
        OPTIONS,
        "Seconds to wait for the server; 0: it has to be there.",
        name="ready-check-timeout-sec",
        low=0,
    )
    seed: int = flag(0, MODEL, "Seed of prompts, lengths and arrivals.")
    ignore_eos: bool = flag(
        False, ANSWERS, "Go on after the end token; always so for random prompts.", spelled=("--ignore-eos",)
    )
    temperature: float | None = flag(None, ANSWERS, "Sampling; the server's if not given.")
    top_p: float | None = flag(None, ANSWERS, "Likewise.")
    top_k: int | None = flag(None, ANSWERS, "Likewise.")
    min_p: float | None = flag(None, ANSWERS, "Likewise.")
    frequency_penalty: float | None = flag(None, OPTIONS, "Likewise.")
    presence_penalty: float | None = flag(None, OPTIONS, "Likewise.")
    repetition_penalty: float | None = flag(None, OPTIONS, "Likewise.")
    extra_body: Mapping[str, Any] = flag({}, OPTIONS, "Further fields of each request.")
    percentile_metrics: str = flag("ttft,tpot,itl", OPTIONS, "Metrics to report: ttft, tpot, itl, e2el.")
    metric_percentiles: str = flag("99", OPTIONS, "Their percentiles.")
    goodput_limits: tuple[str, ...] = flag(
        (), OPTIONS, "Limits that a request has to keep to count as good.", name="goodput", metavar="NAME:MS"
    )
    save_result: bool = flag(False, OPTIONS, "Write a JSON file.", spelled=("--save-result",))
    detailed: bool = flag(
        False,
        OPTIONS,
        "In it also each request with its text.",
        name="save-detailed",
        spelled=("--save-detailed",),
    )
    result_dir: str | None = flag(None, OPTIONS, "Its folder; made if it is missing.")
    result_filename: str | None = flag(None, OPTIONS, "Its name.")
    metadata_pairs: tuple[str, ...] = flag((), OPTIONS, "Put into it.", name="metadata", metavar="KEY=VALUE")
    label: str | None = flag(None, OPTIONS, "Begins its name.")
    tokenizer: str | None = flag(None, MODEL, "Not needed: prompts are token ids, and the server counts.")
    disable_tqdm: bool = flag(
        False, OPTIONS, "Not needed: there is no progress bar.", spelled=("--disable-tqdm",)
    )

    def __post_init__(self) -> None:
        check_flags(self)
        if self.endpoint is not None and self.endpoint != BACKENDS[self.backend]:
            raise UsageError(
                f"--endpoint {self.endpoint}: the backend {self.backend} has {BACKENDS[self.backend]}"
            )
        for name in self.metrics:
            if name not in METRICS:
                raise UsageError(f"--percentile-metrics must be of {', '.join(METRICS)}, got {name}")
        if max(self.percentiles) > 100:
            raise UsageError(f"--metric-percentiles must be at most 100, got {self.metric_percentiles}")
        for name in self.goodput:
            if name not in GOODPUT:
                raise UsageError(f"--goodput must be of {', '.join(GOODPUT)}, got {name}")
        _ = self.metadata
        unsaved = ("result_dir", "result_filename", "metadata_pairs", "label")
        if self.result_file is None and (given := given_flags(self, unsaved)):
            warn(f"{', '.join(given)}: no effect without --save-result")
        if math.isinf(self.request_rate) and given_flags(self, ("burstiness",)):
            warn("--burstiness has no effect without --request-rate")
        if self.tokenizer is not None:
            warn("--tokenizer has no effect: prompts are token ids, and the server counts")

    @property
    def url(self) -> str:
        """Address of the server, before /v1."""
        return (self.base_url or f"http://{self.host}:{self.port}").rstrip("/").removesuffix("/v1")

    @property
    def model_name(self) -> str | None:
        """The model's name in requests; None: the first that the server lists."""
        return self.served_model_name or self.model

    @property
    def input_len(self) -> int:
        return self.own_input_len or self.random_input_len

    @property
    def output_len(self) -> int:
        return self.own_output_len or self.random_output_len

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that are put into each request."""
        return {**{name: getattr(self, name) for name in SAMPLING}, **self.extra_body}

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(name for name in self.percentile_metrics.split(",") if name)

    @cached_property
    def percentiles(self) -> tuple[float, ...]:
        return tuple(_number("--metric-percentiles", text) for text in self.metric_percentiles.split(","))

    @cached_property
    def goodput(self) -> dict[str, float]:
        """Metric to the most milliseconds of a good request."""
        limits = _pairs("--goodput", self.goodput_limits, ":")
        return {name: _number("--goodput", text) for name, text in limits.items()}

    @cached_property
    def metadata(self) -> dict[str, str]:
        return _pairs("--metadata", self.metadata_pairs, "=")

    @property
    def result_file(self) -> str | None:
        if not (self.save_result or self.detailed):
            return None
        short = (self.model_name or "model").rstrip("/").rpartition("/")[2]
        name = self.result_filename or f"{self.label or self.backend}-{self.request_rate}qps-{short}.json"
        return name if self.result_dir is None else f"{self.result_dir}/{name}"


def _number(option: str, text: str) -> float:
    try:
        return positive(text)
    except ValueError as error:
        raise UsageError(f"{option} {error}") from None


def _pairs(option: str, words: tuple[str, ...], separator: str) -> dict[str, str]:
    pairs = dict(word.partition(separator)[::2] for word in words)
    if any(separator not in word for word in words):
        raise UsageError(f"{option} must be like NAME{separator}VALUE, got {' '.join(words)}")
    return pairs
