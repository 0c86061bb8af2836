"""Sizes the pool of KV blocks before a model is loaded.

On a GPU that holds only for a requested size; the default is measured beside the loaded model, in
`worker/gpu_memory.py`.
"""

from __future__ import annotations

import logging
import math

from microvllm.runtime.errors import ConfigError
from microvllm.runtime.machine import available_memory
from microvllm.runtime.vllm_environment import whole_number

logger = logging.getLogger("microvllm.config")

KV_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}  # of one number
CPU_KV_BYTES = 256 << 20  # default pool on a CPU, if one full-length sequence fits into it
CPU_KV_SHARE = 0.4  # never more than this share of the memory that is free


def size_pool(
    device: str,
    block_size: int,
    block_bytes: int,
    max_model_len: int,
    *,
    blocks: int | None = None,
    pool_bytes: int | None = None,
    may_shorten: bool = False,
) -> tuple[int, int]:
    """Return the number of KV blocks (0: to be measured), and the context length in tokens that they hold.

    `blocks` or `pool_bytes` are requested; else VLLM_CPU_KVCACHE_SPACE or the free memory decides. A pool too
    small for one request of full length would make that request wait indefinitely (vLLM issue 35541): the
    length is lowered to fit if it `may_shorten`. Raises `ConfigError` for too large a pool, and for too small
    a one.
    """
    requested, option = blocks, "--num-gpu-blocks-override"
    if blocks is None:
        option = "--kv-cache-memory-bytes"
        requested = None if pool_bytes is None else pool_bytes // block_bytes
    if device == "cpu":
        return _cpu_pool(requested, option, block_bytes, block_size, max_model_len, may_shorten)
    if requested is None:
        return 0, max_model_len
    return requested, fit_context(requested, block_size, block_bytes, max_model_len, option, may_shorten)


def _cpu_pool(
    requested: int | None,
    option: str,
    block_bytes: int,
    block_size: int,
    max_model_len: int,
    may_shorten: bool,
) -> tuple[int, int]:
    free = available_memory()
    needed = math.ceil(max_model_len / block_size)
    if requested is not None:
        num_blocks = requested
    elif space := whole_number("VLLM_CPU_KVCACHE_SPACE"):
        num_blocks = (space << 30) // block_bytes
    else:
        num_blocks = min(max(CPU_KV_BYTES, needed * block_bytes), int(free * CPU_KV_SHARE)) // block_bytes
    if num_blocks * block_bytes > free:
        raise ConfigError(
            f"a KV cache of {num_blocks} blocks takes {num_blocks * block_bytes / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB of memory are free",
            remedy="lower --kv-cache-memory-bytes or --num-gpu-blocks-override",
        )
    return num_blocks, fit_context(num_blocks, block_size, block_bytes, max_model_len, option, may_shorten)


def fit_states(device: str, row_bytes: int, max_num_seqs: int, is_requested: bool) -> int:
    """Return how many requests may run at once, lowered with a warning where their states take too much.

    `row_bytes`: of a request's state, which on a CPU takes memory once the request is there. A GPU's memory
    is divided beside the loaded model. Raises `ConfigError` for too many requested ones.
    """
    if device != "cpu" or not row_bytes:
        return max_num_seqs
    free = available_memory()
    share = 1.0 if is_requested else CPU_KV_SHARE / 2
    fitting = int(free * share) // row_bytes
    if fitting >= max_num_seqs:
        return max_num_seqs
    sizes = f"of {row_bytes / 2**20:.1f} MiB each, and {free / 2**30:.1f} GiB of memory are free"
    if is_requested or not fitting:
        raise ConfigError(
            f"--max-num-seqs {max_num_seqs}: each request holds a state {sizes}",
            remedy=f"lower --max-num-seqs to {fitting}" if fitting else None,
        )
    logger.warning("%d requests run at once instead of %d: states are %s", fitting, max_num_seqs, sizes)
    return fitting


def fit_context(
    num_blocks: int,
    block_size: int,
    block_bytes: int,
    max_model_len: int,
    option: str,
    may_shorten: bool,
) -> int:
    """Return the context length in tokens that the pool holds, lowered with a warning if it `may_shorten`.

    Otherwise a request of full length would wait forever: raises `ConfigError`. `option`: the flag that makes
    the pool larger.
    """
    needed = math.ceil(max_model_len / block_size)
    if num_blocks >= needed:
        return max_model_len
    if not may_shorten or num_blocks <= 0:
        raise ConfigError(
            f"the KV cache has room for {num_blocks * block_size} tokens ({num_blocks} blocks, "
            f"{num_blocks * block_bytes / 2**20:.0f} MiB), but one request of {max_model_len} tokens "
            f"needs {needed} blocks ({needed * block_bytes / 2**20:.0f} MiB)",
            remedy=f"lower --max-model-len or raise {option}",
        )
    logger.warning(
        "The context is %d tokens instead of the model's %d: the KV cache has room for no more. "
        "%s makes it larger.",
        num_blocks * block_size,
        max_model_len,
        option,
    )
    return num_blocks * block_size
