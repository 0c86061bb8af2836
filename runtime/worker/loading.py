"""Loads a model, or one rank's part of it, and makes its attention."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from microvllm.adapters.decoder import DecoderModel
from microvllm.adapters.errors import CutError, ModelFileError
from microvllm.adapters.tensors import WHOLE, Shard
from microvllm.adapters.weights import load_weights
from microvllm.ops.attention import AttentionBackend
from microvllm.ops.backends import make_operators
from microvllm.ops.quantized import QuantizedTensor
from microvllm.ops.sharding import Ranks
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.progress import OnProgress, Stage
from microvllm.runtime.rank_layout import rank_layout


def load_model(
    config: EngineConfig, on_progress: OnProgress | None, ranks: Ranks | None = None
) -> DecoderModel:
    """The model, of operators for its device, or its shard of this rank.

    Raises `ConfigError` that names the file or tensor at fault.
    """
    dtype = getattr(torch, config.dtype)
    shard = WHOLE if ranks is None else Shard(ranks.rank, ranks.size)
    try:
        operators = make_operators(
            config.attention_backend,
            dtype,
            config.cpu_threads,
            config.int8_activations,
            config.batch_invariant,
        )
    except ValueError as error:  # MICROVLLM_GPU_OFF or _ON
        raise ConfigError(str(error)) from error
    try:
        weights = load_weights(
            Path(config.model_path),
            config.spec,
            config.load_format,
            dtype,
            None if on_progress is None else partial(on_progress, "Loading weights"),
            config.device,
            packed=operators.packed if config.packed_weights else (),
            shard=shard,
        )
    except CutError as error:
        problem = f"--tensor-parallel-size {shard.size}: {error}"
        raise ConfigError(problem, remedy="--gguf-weights dequantized can be cut anywhere") from error
    except ModelFileError as error:
        raise ConfigError(str(error), remedy=error.remedy) from error
    if config.int8_activations and not any(isinstance(w, QuantizedTensor) for w in weights.values()):
        raise ConfigError(f"--cpu-activations int8: {config.model} has no quantised matrices")
    if config.device == "cpu" and config.num_groups > 1:  # a GPU's is measured beside the model
        room = rank_layout(config).room(config.num_blocks, config.max_model_len)
        Stage("Dividing memory", 1, on_progress).finish(f"The KV cache has room for {room}")
    return DecoderModel(config.spec.sharded(shard.size), weights, operators, ranks)


def make_attention(config: EngineConfig, model: DecoderModel) -> AttentionBackend:
    """Raises `ConfigError` for attention that the backend cannot compute."""
    sizes = config.num_blocks, config.block_size, config.max_model_len
    try:
        dtype, device = getattr(torch, config.kv_dtype), torch.device(config.device)
        return model.attention(*sizes, dtype, device, config.state_rows)
    except ValueError as error:
        raise ConfigError(str(error)) from error
