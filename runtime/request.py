"""The types that travel: sampling parameters, requests to the engine, outputs of a step.

All are msgspec structs, so the process channel encodes them directly (no pickle), and decoding one
runs its validation again on the receiving side. Nothing here imports torch.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import msgspec

from microvllm.runtime.errors import InvalidRequestError

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
MAX_STOP_STRINGS = 4
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_N = 128
GREEDY_EPS = 1e-5  # temperatures below are greedy, as in vLLM
MIN_TEMPERATURE = 1e-2  # positive temperatures below are raised to it, as in vLLM


class FinishReason(enum.IntEnum):
    """Why a request ended; `str()` gives the word of the wire."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens and when to stop; names and defaults as in vLLM's `SamplingParams`.

    Raises `InvalidRequestError` naming the field for any value out of range. `max_tokens=None` means
    "until the context is full". A temperature below 1e-5 is greedy. One stop string may be given bare.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _integer(self.n, "n", 1, MAX_N)
        _number(self.temperature, "temperature", 0.0, 2.0)
        _number(self.top_p, "top_p", 0.0, 1.0, open_low=True)
        _integer(self.top_k, "top_k", -1, INT64_MAX)
        _number(self.min_p, "min_p", 0.0, 1.0)
        if self.seed is not None:
            _integer(self.seed, "seed", INT64_MIN, INT64_MAX)
        if self.max_tokens is not None:
            _integer(self.max_tokens, "max_tokens", 1, INT64_MAX)
        _integer(self.min_tokens, "min_tokens", 0, INT64_MAX)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, "
                f"got {self.min_tokens}.",
                "min_tokens",
            )
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])
        for name in ("stop", "stop_token_ids"):
            if not isinstance(getattr(self, name), list):
                raise InvalidRequestError(f"{name} must be a list, got {getattr(self, name)!r}.", name)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop cannot contain more than {MAX_STOP_STRINGS} strings.", "stop")
        for text in self.stop:
            if type(text) is not str or not text or len(text) > MAX_STOP_STRING_CHARS:
                raise InvalidRequestError(
                    f"stop strings must have 1 to {MAX_STOP_STRING_CHARS} characters.", "stop"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                f"stop_token_ids cannot contain more than {MAX_STOP_TOKEN_IDS} ids.", "stop_token_ids"
            )
        for token in self.stop_token_ids:
            _integer(token, "stop_token_ids", 0, INT64_MAX)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if type(getattr(self, name)) is not bool:
                raise InvalidRequestError(f"{name} must be true or false, got {getattr(self, name)!r}.", name)
        if self.n > 1 and self.greedy:
            raise InvalidRequestError(f"n must be 1 when using greedy sampling, got {self.n}.", "n")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPS


def _integer(value: Any, name: str, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        bound = f"at least {low}" if high == INT64_MAX else f"in [{low}, {high}]"
        raise InvalidRequestError(f"{name} must be an integer {bound}, got {value!r}.", name)


def _number(value: Any, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    fine = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    if not fine or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise InvalidRequestError(f"{name} must be in {bracket}{low:g}, {high:g}], got {value!r}.", name)


class EngineRequest(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to generate, as the engine sees it: token ids only, every default resolved.

    `params.n` is 1 (the front end fans out), `params.max_tokens` is set. `eos_token_id` is None when
    the end-of-sequence token must not stop the request; `stop_token_ids` already holds the model's
    further end tokens. `cache_salt` separates prefix-cache entries between tenants.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_id: int | None = None
    stop_token_ids: list[int] = []
    priority: int = 0
    cache_salt: str = ""


class StepOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced for one request.

    `stop_reason` is the stop token id, or None for the primary end-of-sequence token and for length.
    `num_cached_tokens` (prompt tokens taken from the prefix cache) is meaningful in the first output.
    `error` is a one-line message when `finish_reason` is ERROR.
    """

    request_id: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Counters (since start) and gauges (now) of one engine, sent with every step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    requests: int = 0  # that have arrived, also those that were refused
