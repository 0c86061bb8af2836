"""Logs at the start what is otherwise than the options or the model's files ask for. Imports no torch."""

from __future__ import annotations

import logging

from microvllm.adapters.spec import ModelSpec

logger = logging.getLogger("microvllm.config")

VARIANT_STATES = "--batch-invariant (VLLM_BATCH_INVARIANT=1): a GPU computes states in chunks of prompts"


def warn_of_gpu_options(device: str) -> None:
    """Log that two options were given for nothing, on a CPU."""
    if device == "cpu":
        logger.warning(
            "--gpu-memory-utilization and --enforce-eager have no effect on a CPU; "
            "--kv-cache-memory-bytes sets the size of the KV cache there"
        )


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
