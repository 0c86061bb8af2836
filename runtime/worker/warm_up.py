"""Runs steps of padding before the first request, which compiles their kernels and takes their memory.

The largest step there can be comes first, and smaller ones fit into its memory. The other way round each
takes more from the GPU, as torch keeps what the one before has freed, in pieces that are too small: with the
steps of `TOKENS` rising, an engine of Qwen2-7B took 0.58 GiB more than was planned for at the first step of
8,192 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from microvllm.runtime.progress import OnProgress, Stage
from microvllm.runtime.worker.step_inputs import StepArrays

if TYPE_CHECKING:
    from microvllm.runtime.worker.graphs import GpuParts

TOKENS = (4000, 1000, 250, 64, 20, 5, 2)  # of each of two prompts


class WarmUp(NamedTuple):
    """A step of padding: the tokens of each sequence, those with one token that are decodes first.

    logits: rows that tokens are chosen for.
    """

    lengths: Sequence[int]
    decodes: int
    logits: int


def warm_up_steps(max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int) -> list[WarmUp]:
    """The largest step that there can be, then others of all kinds, falling."""
    full, rest = divmod(min(max_num_batched_tokens, max_num_seqs * max_model_len), max_model_len)
    largest = [max_model_len] * full + [rest] * (rest > 1)
    steps = [WarmUp(largest, 0, min(max_num_seqs, sum(largest)))]
    for longest in TOKENS:
        for decodes in (16, 1, 0):
            lengths = [1] * decodes + [min(longest, max_model_len)] * 2
            # The sampler has room for one row more than there are requests.
            if sum(lengths) <= max_num_batched_tokens and len(lengths) <= max_num_seqs + 1:
                steps.append(WarmUp(lengths, decodes, decodes + 2))
    return [step for step in steps if step.lengths]


@torch.inference_mode()
def warm_up(parts: GpuParts, on_progress: OnProgress | None) -> None:
    """Steps of padding, with and without single tokens in front: the first of a kind compiles.

    They write no keys and values: their slots are -1.
    """
    config, model = parts.config, parts.model
    groups = config.num_groups
    block_tables = np.zeros((groups, config.max_num_seqs, config.max_blocks), dtype=np.int64)
    steps = warm_up_steps(config.max_num_batched_tokens, config.max_num_seqs, config.max_model_len)
    warming = Stage("Warming up", len(steps), on_progress)
    for step in steps:
        lengths = np.array(step.lengths)
        total = int(lengths.sum())
        positions = np.concatenate([np.arange(length) for length in lengths])
        nothing = np.zeros(total, dtype=np.int64)
        rows = np.zeros(len(lengths), dtype=np.int64)
        slots = np.full((groups, total), -1)
        arrays = StepArrays(nothing, nothing, positions, slots, rows, lengths, lengths, step.decodes)
        ids, batch = parts.inputs.make(arrays, block_tables)
        hidden = model.forward(ids, parts.attention.begin_step(batch))
        if config.spec.pooling is None:
            parts.sampler.warm_up(model.logits(hidden[: step.logits]))
        warming.advance()
    torch.cuda.synchronize()
    warming.finish(f"Warmed up in {warming.seconds:.1f} s")
