"""Writes the token counts of a response, and its times if the server reports them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from microvllm.runtime.metrics.observer import RequestTiming


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int | None, reasoning_tokens: int | None = None
) -> dict[str, Any]:
    """Return the `usage` object of a whole response; the last two are None without details."""
    details = {"cached_tokens": cached_tokens, "created_cache_tokens": None, "multimodal_tokens": None}
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None if cached_tokens is None else details,
        "completion_tokens_details": None
        if reasoning_tokens is None
        else {"reasoning_tokens": reasoning_tokens},
    }


def stream_usage(
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int | None = None,
    reasoning_tokens: int | None = None,
) -> bytes:
    """Return the `usage` object of a chunk: without the null members of the whole response's."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }
    if cached_tokens is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    if reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return orjson.dumps(counts)


def request_metrics(timing: RequestTiming, tokens: int) -> dict[str, float | None]:
    """Return the `metrics` object of one sequence with `tokens` tokens, in ms; null for what is unknown.

    The time to the first token is counted from the moment the request left the queue, as in vLLM.
    """
    queued, scheduled = timing.arrival, timing.scheduled
    first, last = timing.first_token, timing.last_token
    generation = _ms(first, last)
    total = _ms(scheduled, last)
    return {
        "time_to_first_token_ms": _ms(scheduled, first),
        "generation_time_ms": generation,
        "queue_time_ms": _ms(queued, scheduled),
        "mean_itl_ms": generation / (tokens - 1) if generation is not None and tokens > 1 else None,
        "tokens_per_second": tokens / total * 1000 if total else None,
        "speculative_decoding": None,
    }


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else (end - start) * 1000


def without_nulls(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members that have a value."""
    return {name: value for name, value in members.items() if value is not None}
