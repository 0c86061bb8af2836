"""How much of a GPU's memory is left for the KV cache: measured with the model loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from microvllm.adapters.decoder import DecoderModel
from microvllm.runtime.config import DTYPE_BYTES, EngineConfig
from microvllm.runtime.kv_memory import check_pool

# The CUDA graphs' own memory beside their activations, and what allocation in pieces leaves unused.
MARGIN_BYTES = 512 << 20


@torch.inference_mode()
def measure_kv_blocks(config: EngineConfig, model: DecoderModel) -> int:
    """KV blocks that fit into `gpu_memory_utilization` of the GPU beside weights and activations.

    Runs the largest step that there can be, with attention left out, which keeps nothing but its output.
    Raises `ConfigError` when not one request of full length fits.
    """
    spec = config.spec
    width = spec.num_heads * spec.head_dim

    def no_attention(layer: int, qkv: Tensor) -> Tensor:
        return qkv[:, :width].clone()

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.zeros(config.max_num_batched_tokens, dtype=torch.int64, device=config.device)
    hidden = model.forward(ids, no_attention)
    logits = model.logits(hidden[: config.max_num_seqs])
    logits.softmax(-1)
    activations = torch.cuda.max_memory_allocated() - before
    del ids, hidden, logits
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    left = int(total * config.gpu_memory_utilization) - (total - free) - activations - MARGIN_BYTES
    block_bytes = spec.kv_bytes_per_token(DTYPE_BYTES[config.dtype]) * config.block_size
    num_blocks = max(0, left // block_bytes)
    check_pool(num_blocks, config.block_size, config.max_model_len)
    return num_blocks
