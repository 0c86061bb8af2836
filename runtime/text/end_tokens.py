"""Finds the tokens that end a model's output. Torch-free."""

from __future__ import annotations

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.text.tokenizer import Tokenizer


def end_tokens(config: EngineConfig, tokenizer: Tokenizer) -> tuple[int | None, list[int]]:
    """Return the end-of-sequence token, and further ends, which report themselves as `stop_reason`.

    The first is the tokenizer's; a model's configuration may list more (Llama 3's 128008 and 128009).
    """
    spec = config.spec
    ends = [*spec.eos_token_ids, *config.generation_defaults.get("eos_token_id", [])]
    eos = tokenizer.eos_token_id
    if eos is not None and eos >= spec.vocab_size:  # the tokenizer of another model: no logit has this id
        eos = None
    if eos is None and ends:
        eos = ends[0]
    return eos, sorted(set(ends) - {eos})
