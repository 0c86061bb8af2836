"""Logs at the start what is otherwise than the options or the model's files ask for. Imports no torch."""

from __future__ import annotations

import logging
from typing import Any

from microvllm.adapters.spec import ModelSpec
from microvllm.runtime.options.flag import given_flags

logger = logging.getLogger("microvllm.config")

TEXT_OPTIONS = ("generation_config", "override_generation_config", "max_logprobs", "logprobs_mode")

VARIANT_STATES = "--batch-invariant (VLLM_BATCH_INVARIANT=1): a GPU computes states in chunks of prompts"


def warn_of_options(args: Any, device: str, *, pools: bool) -> None:
    """Log which options were given for nothing; `args` are `EngineArgs`, `pools`: the model makes vectors."""
    sizes = given_flags(args, ("kv_cache_memory_bytes", "num_gpu_blocks_override"))
    if device == "cpu" and (given := given_flags(args, ("gpu_memory_utilization", "enforce_eager"))):
        _warn(given, "on a CPU; --kv-cache-memory-bytes sets the size of the KV cache there")
    elif device != "cpu" and sizes and (given := given_flags(args, ("gpu_memory_utilization",))):
        _warn(given, f"beside {sizes[-1]}")
    if pools and (given := given_flags(args, TEXT_OPTIONS)):
        _warn(given, "on a model that makes vectors")


def _warn(flags: list[str], where: str) -> None:
    logger.warning("%s: no effect %s", ", ".join(flags), where)


def warn_of_length(too_long: str | bool) -> None:
    """Log that the context is longer than the model's, if it is, as the sentence says."""
    if too_long:
        logger.warning("%s: answers beyond it may make no sense", too_long)


def warn_of_rotation(spec: ModelSpec, max_model_len: int) -> None:
    """Log that short texts are rotated as long ones are, where the length decides."""
    for rope in spec.ropes:
        if rope.depends_on_length and max_model_len > rope.original_max_position:
            logger.warning(
                "Rotary scaling %s: short texts are rotated as texts of %d tokens are. "
                "--max-model-len %d, the length that the model was first trained on, keeps them as they "
                "were.",
                *(rope.scaling, max_model_len, rope.original_max_position),
            )


def caches_prefixes(requested: bool, spec: ModelSpec) -> bool:
    """Return whether equal beginnings of prompts are computed once; log why not, where that was asked for."""
    if not requested or (spec.pooling and spec.pooling.needs_all):
        return False
    if spec.state_bytes(1):
        logger.info(
            "Prefixes are reused only up to where states are kept: the ends of prompts and turns, and where "
            "prompts part"
        )
    return True
