"""Divides a GPU's memory: weights, activations and CUDA graphs take theirs, the KV cache gets the rest.

The graphs hold the cache's address, so it has to exist before they are captured. What they take is measured
on the largest of each kind, captured over a cache of `TRIAL_BLOCKS` and dropped again: all of them share one
pool, whose size the largest decides. Only what this process takes is counted, as others may start meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from microvllm.adapters.decoder import DecoderModel
from microvllm.adapters.layers.stateful import StatefulMixer
from microvllm.ops.sharding import Ranks
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.kv_memory import KV_BYTES, fit_length
from microvllm.runtime.progress import OnProgress, Stage
from microvllm.runtime.rank_layout import rank_layout
from microvllm.runtime.worker.loading import load_model, make_attention

if TYPE_CHECKING:
    from microvllm.runtime.worker.graphs import DecodeGraphs, GpuParts, PromptGraphs

TRIAL_BLOCKS = 16  # divisible by 16, as the real number mostly is: the kernels of both are the same
# More than the driver keeps of the graphs of a size, and than CUDA's context takes: what the GPU reports of
# these cannot be told from what other processes do meanwhile.
DRIVER_BYTES = 4 << 20
CONTEXT_BYTES = 1 << 30
# What allocation in pieces leaves unused, and what the first penalties and long log probabilities take.
RESERVE_BYTES = 256 << 20
NO_ROOM_REMEDY = (
    "end other processes on the GPU, raise --gpu-memory-utilization, or lower --max-model-len, "
    "--max-num-seqs or --max-num-batched-tokens"
)


def memory_in_use(device: str) -> int:
    """Bytes in use on a GPU, by all processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


@contextlib.contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Raise `ConfigError` where the GPU has too little memory for `what`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("CUDA.*out of memory", text):
            raise
        free, total = torch.cuda.mem_get_info()
        tried = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        wanted = f": {tried[1]} more were wanted, and" if tried else ":"
        raise ConfigError(
            f"the GPU has too little memory for {what}{wanted} {free / 2**30:.2f} of its "
            f"{total / 2**30:.2f} GiB are free",
            remedy=NO_ROOM_REMEDY,
        ) from None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of a GPU by their use.

    states: those of all rows, of models that keep one; rest: CUDA itself, and the reserve; budget: what may
    be used of `total`, all that there is.
    """

    weights: int
    activations: int
    graphs: int
    states: int
    cache: int
    rest: int
    budget: int
    total: int

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "activations": self.activations,
            "graphs": self.graphs,
            **({"states": self.states} if self.states else {}),
            "KV cache": self.cache,
            "CUDA and reserve": self.rest,
        }
        summed = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return (
            f"{summed} = {sum(parts.values()) / 2**30:.2f} GiB of {self.total / 2**30:.2f}, "
            f"{self.budget / 2**30:.2f} allowed"
        )


def load_beside_cache(
    config: EngineConfig, on_progress: OnProgress | None, ranks: Ranks | None = None
) -> tuple[DecoderModel, EngineConfig]:
    """Load the model, and size the KV cache that fits beside it and all that it needs; on a CPU it is sized.

    Returns the configuration with the number of KV blocks, and a context that they hold. The blocks fill
    `gpu_memory_utilization` of the GPU, as far as it is free, unless their number was requested. Raises
    `ConfigError` when not one request of full length fits and the context may not be lowered, and for too
    large a request.
    """
    if config.device == "cpu":
        return load_model(config, on_progress, ranks), config
    with memory_for("the weights"):
        model = load_model(config, on_progress, ranks)
    measuring = Stage("Measuring memory", 1, on_progress)
    weights = torch.cuda.memory_allocated()
    with memory_for("a step of --max-num-batched-tokens and the CUDA graphs"):
        activations = _activation_bytes(config, model)
        graphs = 0 if config.enforce_eager else _graph_bytes(config, model)
    free, total = torch.cuda.mem_get_info()
    ours = torch.cuda.memory_reserved() + CONTEXT_BYTES
    budget = int(total * config.gpu_memory_utilization)
    layout, blocks, length = rank_layout(config), config.num_blocks, config.max_model_len
    room = free if config.num_blocks else min(budget - ours, free)
    states = _states_bytes(config)
    room -= activations + graphs + states + RESERVE_BYTES
    if ranks is not None:
        room = ranks.smallest(room)
    if not config.num_blocks and room >= layout.page_bytes:
        blocks = room // layout.page_bytes
        length = fit_length(layout, blocks, length, "--gpu-memory-utilization", config.may_shorten)
    cache, rest = blocks * layout.page_bytes, ours - weights + RESERVE_BYTES
    plan = MemoryPlan(weights, activations, graphs, states, cache, rest, budget, total)
    if not blocks or cache > room:
        raise ConfigError(f"the GPU has no room for the KV cache: {plan}", remedy=NO_ROOM_REMEDY)
    config = msgspec.structs.replace(config, num_blocks=blocks, max_model_len=length)
    measuring.finish(f"{plan}: the KV cache of {config.kv_dtype} has room for {layout.room(blocks, length)}")
    return model, config


def capture_graphs(parts: GpuParts, on_progress: OnProgress | None) -> tuple[PromptGraphs, DecodeGraphs]:
    """Capture all graphs, and report how long that took and what they take."""
    # Here, because a machine without a GPU need not have Triton.
    from microvllm.runtime.worker.graphs import make_graphs

    prompts, decodes = make_graphs(parts)
    device, number = parts.config.device, len(prompts.sizes) + len(decodes.sizes)
    before = memory_in_use(device)
    capturing = Stage("Capturing CUDA graphs", number, on_progress)
    for graphs in (prompts, decodes):
        graphs.capture(capturing, number)
    torch.cuda.empty_cache()  # what the steps took that were run to compile their kernels
    taken = memory_in_use(device) - before
    capturing.finish(f"Captured {number} graphs in {capturing.seconds:.1f} s, {taken / 1e9:.1f} GB")
    return prompts, decodes


def _states_bytes(config: EngineConfig) -> int:
    """Of the states of all rows, on one rank."""
    shard = config.spec.sharded(config.tensor_parallel_size)
    return shard.state_bytes(KV_BYTES[config.dtype]) * config.state_rows


@torch.inference_mode()
def _activation_bytes(config: EngineConfig, model: DecoderModel) -> int:
    """Run the largest step that there can be, with attention left out, which keeps nothing but its output.

    What states are computed with is taken as well.
    """

    def no_attention(layer: int, qkv: Tensor) -> Tensor:
        mixer = model.spec.layers[layer].mixer
        out = qkv[:, : mixer.out_size].clone()
        if isinstance(mixer, StatefulMixer):
            qkv.new_empty(len(qkv), mixer.scratch_size)
        return out

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.zeros(config.max_num_batched_tokens, dtype=torch.int64, device=config.device)
    hidden = model.forward(ids, no_attention)
    logits = model.logits(hidden[: config.max_num_seqs])
    logits.softmax(-1)
    taken = torch.cuda.max_memory_allocated() - before
    del ids, hidden, logits
    torch.cuda.empty_cache()
    return taken


def _graph_bytes(config: EngineConfig, model: DecoderModel) -> int:
    """Capture the largest graphs, and drop them -> bytes that all of them will take."""
    # Here, because a machine without a GPU need not have Triton.
    from microvllm.runtime.worker.graphs import GpuParts, make_graphs

    small = msgspec.structs.replace(config, num_blocks=TRIAL_BLOCKS)
    before = torch.cuda.memory_reserved()
    made = make_graphs(GpuParts.make(small, model, make_attention(small, model)))
    silent, number = Stage("", 1, None), 0
    for graphs in made:
        graphs.capture(silent, 1)
        number += len(graphs.sizes)
    torch.cuda.empty_cache()  # what the steps took that were run to compile their kernels
    taken = torch.cuda.memory_reserved() - before
    del made, graphs
    gc.collect()
    torch.cuda.empty_cache()
    return taken - _states_bytes(config) + number * DRIVER_BYTES
