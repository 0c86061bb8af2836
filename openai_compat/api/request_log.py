"""Logs how requests begin and end: one line each, with counts and times and never a text."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from microvllm.runtime.metrics.engine_metrics import COMPLETE

if TYPE_CHECKING:
    from microvllm.openai_compat.api.streams import Stream
    from microvllm.runtime.request import SamplingParams

logger = logging.getLogger("microvllm.server")

MAX_LOGGED = 1000  # characters of a request's parameters
MANY_PREEMPTIONS = 3  # an end after more of them is logged at any level: the KV cache is too small


def log_start(request_id: str, prompts: Sequence[list[int]], params: SamplingParams) -> None:
    """Log what is requested: the parameters that are not defaults, and no prompt."""
    shown = str(msgspec.to_builtins(params))
    logger.info(
        "Received request %s: %d prompts, %d prompt tokens, %s",
        request_id,
        len(prompts),
        sum(map(len, prompts)),
        shown if len(shown) <= MAX_LOGGED else shown[:MAX_LOGGED] + "...",
    )


def log_end(request_id: str, streams: Sequence[Stream], prompt_tokens: int) -> None:
    """Log the end of a request's sequences: a warning if one of them was cut short, else at debug level."""
    preemptions = max(stream.num_preemptions for stream in streams)
    reasons = sorted({stream.end_reason or "abort" for stream in streams})
    normal = COMPLETE.issuperset(reasons) and preemptions <= MANY_PREEMPTIONS
    level = logging.DEBUG if normal else logging.WARNING
    if not logger.isEnabledFor(level):
        return
    arrival = min(stream.timing.arrival for stream in streams)
    scheduled = [stream.timing.scheduled for stream in streams if stream.timing.scheduled is not None]
    first = [stream.timing.first_token for stream in streams if stream.timing.first_token is not None]
    logger.log(
        level,
        "Request %s ended (%s): %d sequences, %d prompt tokens, %d generated, %d preemptions; "
        "begun after %s, first token after %s, end after %.3f s.",
        request_id,
        ", ".join(reasons),
        len(streams),
        prompt_tokens,
        sum(stream.num_generated_tokens for stream in streams),
        sum(stream.num_preemptions for stream in streams),
        _seconds(arrival, scheduled),
        _seconds(arrival, first),
        time.monotonic() - arrival,
    )


def _seconds(start: float, times: Sequence[float]) -> str:
    return f"{min(times) - start:.3f} s" if times else "never"
