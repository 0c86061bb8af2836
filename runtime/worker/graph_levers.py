"""Which optimizations of CUDA graphs an engine uses: those of its device that its configuration allows."""

from __future__ import annotations

from dataclasses import replace

import torch

from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.spec import Attention
from microvllm.ops.gpu.levers import Levers
from microvllm.runtime.config import EngineConfig


def graph_levers(config: EngineConfig) -> Levers:
    """`Levers.of` the device, less what was not measured with the rest of the configuration.

    rules: not with `--enforce-eager`, as the memory of the tables is counted with that of the graphs; nor
    with `--batch-invariant`, where a token has the bits of an eager step, and tables round penalties in
    another order; nor on several GPUs, where rank 0 chooses the tokens of requests with rules, and graphs of
    the tables never ran. long_prompts: in dense models of attention alone, on one GPU. The grid of latent
    attention grows with the size that a step is padded to; a mixture reads the weights of all experts, where
    `num_products` has those of one token; the states and sums of ranks of so many tokens ran in no graph.
    """
    levers = Levers.of(torch.device(config.device))
    captures = not (config.enforce_eager or config.batch_invariant or config.tensor_parallel_size > 1)
    measured = (
        captures
        and config.attention_backend == "triton"
        and all(isinstance(layer.mixer, Attention) for layer in config.spec.layers)
        and all(isinstance(layer.mlp, MLP) for layer in config.spec.layers)
    )
    return replace(levers, rules=levers.rules and captures, long_prompts=levers.long_prompts and measured)
