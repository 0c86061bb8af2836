"""Runs steps of padding before the first request, so that their kernels are compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from microvllm.runtime.progress import OnProgress, Stage
from microvllm.runtime.worker.step_inputs import StepArrays

if TYPE_CHECKING:
    from microvllm.runtime.worker.graphs import GpuParts

TOKENS = (2, 5, 20, 64, 250, 1000, 4000)


@torch.inference_mode()
def warm_up(parts: GpuParts, on_progress: OnProgress | None) -> None:
    """Steps of padding, with and without single tokens in front: the first of a kind compiles.

    They write no keys and values: their slots are -1.
    """
    config, model = parts.config, parts.model
    groups = config.num_groups
    block_tables = np.zeros((groups, config.max_num_seqs, config.max_blocks), dtype=np.int64)
    warming = Stage("Warming up", len(TOKENS), on_progress)
    for longest in TOKENS:
        for decodes in (0, 1, 16):
            lengths = np.array([1] * decodes + [min(longest, config.max_model_len)] * 2)
            total = int(lengths.sum())
            # The sampler has room for one row more than there are requests.
            if total > config.max_num_batched_tokens or len(lengths) > config.max_num_seqs + 1:
                continue
            positions = np.concatenate([np.arange(length) for length in lengths])
            nothing = np.zeros(total, dtype=np.int64)
            rows = np.zeros(len(lengths), dtype=np.int64)
            slots = np.full((groups, total), -1)
            arrays = StepArrays(nothing, nothing, positions, slots, rows, lengths, lengths, decodes)
            ids, batch = parts.inputs.make(arrays, block_tables)
            hidden = model.forward(ids, parts.attention.begin_step(batch))
            if config.spec.pooling is None:
                parts.sampler.warm_up(model.logits(hidden[: decodes + 2]))
        warming.advance()
    torch.cuda.synchronize()
    warming.finish(f"Warmed up in {warming.seconds:.1f} s")
