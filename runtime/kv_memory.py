"""Sizes the KV cache: how many blocks there are, and how long a text may be to find room in them.

On a CPU that is done before the model is loaded. On a GPU it is for a requested size; the default is measured
beside the loaded model, in `worker/gpu_memory.py`.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from microvllm.adapters.spec import ModelSpec
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.machine import available_memory
from microvllm.runtime.options.vllm_environment import whole_number

logger = logging.getLogger("microvllm.config")

KV_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}  # of one number
CPU_KV_BYTES = 256 << 20  # default size on a CPU, if one full-length sequence fits into it
MIN_CHECKPOINTS = 16  # of states, for the prefix cache
CPU_KV_SHARE = 0.4  # never more than this share of the memory that is free


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What the size of the KV cache follows from.

    windows: of each group of layers, see `CachePlan`; page_bytes: of a block of any of them. step_tokens:
    computed by the steps that are in flight together, at most.
    """

    windows: Sequence[int | None]
    page_bytes: int
    block_size: int
    step_tokens: int

    @classmethod
    def of(
        cls, spec: ModelSpec, kv_dtype: str, block_size: int, step_tokens: int, copies: int = 1
    ) -> CacheLayout:
        """Return the layout for a model, of which there are `copies` in the same memory."""
        plan = spec.cache_plan
        size = max(1, plan.page_size * KV_BYTES[kv_dtype] * block_size * copies)
        return cls(plan.windows, size, block_size, step_tokens)

    def groups(self, length: int) -> list[tuple[int | None, int]]:
        """Return the window of each group, and the blocks that a sequence of `length` tokens holds at most.

        With a window these are the blocks that the first token of the oldest step in flight sees, those of
        the steps, and one that is about to be given back.
        """
        step = self._blocks(self.step_tokens)
        return [(window, self._held(window, length, step)) for window in self.windows]

    def blocks_for(self, length: int) -> int:
        """Blocks that a sequence of `length` tokens holds at a time, at most."""
        return sum(most_held for _, most_held in self.groups(length))

    def longest(self, num_blocks: int, length: int) -> int:
        """Tokens of the longest sequence with room, in whole columns, up to those of `length`."""
        lengths = range(self.block_size, length + self.block_size, self.block_size)
        return self.block_size * bisect_right(lengths, num_blocks, key=self.blocks_for)

    def tokens(self, num_blocks: int, length: int) -> int:
        """Tokens for which so many blocks have room in sequences of `length` tokens, once these are computed.

        With windows, sequences hold the fewer blocks for each of their tokens the longer they are.
        """
        columns = self._blocks(length)
        return num_blocks * columns * self.block_size // sum(self._held(w, length, 0) for w in self.windows)

    def room(self, num_blocks: int, length: int) -> str:
        """Describe for how many tokens so many blocks have room, in texts of up to `length` tokens."""
        windows = [window for window in self.windows if window and window < length]
        if not windows:
            return f"{self.tokens(num_blocks, length):,} tokens"
        texts = (f"{self.tokens(num_blocks, n):,} tokens in texts of {n:,}" for n in (min(windows), length))
        return " and ".join(texts)

    def _held(self, window: int | None, length: int, step: int) -> int:
        """Blocks of a sequence of `length` tokens, of which steps in flight compute `step` blocks."""
        blocks = self._blocks(length)
        return blocks if window is None else min(blocks, self._blocks(window - 1) + step + 1)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def size_cache(
    device: str,
    layout: CacheLayout,
    max_model_len: int,
    *,
    blocks: int | None = None,
    cache_bytes: int | None = None,
    may_shorten: bool = False,
) -> tuple[int, int]:
    """Return the number of blocks (0: to be measured), and the context length in tokens that they hold.

    `blocks` or `cache_bytes` are requested; else VLLM_CPU_KVCACHE_SPACE or the free memory decides. A cache
    too small for one request of full length would make that request wait indefinitely (vLLM issue 35541):
    the length is lowered to fit if it `may_shorten`. Raises `ConfigError` for too large a cache, and for too
    small a one.
    """
    option = "--kv-cache-memory-bytes" if blocks is None else "--num-gpu-blocks-override"
    if device != "cpu" and blocks is None and cache_bytes is None:
        return 0, max_model_len
    free = available_memory() if device == "cpu" else 0
    if cache_bytes is None:
        if space := whole_number("VLLM_CPU_KVCACHE_SPACE"):
            cache_bytes = space << 30
        else:
            needed = layout.blocks_for(max_model_len) * layout.page_bytes
            cache_bytes = min(max(CPU_KV_BYTES, needed), int(free * CPU_KV_SHARE))
    blocks = cache_bytes // layout.page_bytes if blocks is None else blocks
    length = fit_length(layout, blocks, max_model_len, option, may_shorten)
    taken = blocks * layout.page_bytes
    if device == "cpu" and taken > free:
        raise ConfigError(
            f"a KV cache of {blocks} blocks takes {taken / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB of memory are free",
            remedy="lower --kv-cache-memory-bytes or --num-gpu-blocks-override",
        )
    return blocks, length


def num_checkpoints(max_num_seqs: int) -> int:
    """How many states are kept for the prefix cache, for so many requests that run at once."""
    return max(MIN_CHECKPOINTS, max_num_seqs // 4)


def state_rows(spec: ModelSpec, max_num_seqs: int, *, caches: bool) -> int:
    """Rows that layers with a state keep: of requests, one of padding, and, if it `caches`, checkpoints."""
    has_checkpoints = caches and spec.state_bytes(1) > 0
    return max_num_seqs + 1 + (num_checkpoints(max_num_seqs) if has_checkpoints else 0)


def fit_states(device: str, row_bytes: int, max_num_seqs: int, caches: bool, is_requested: bool) -> int:
    """Return how many requests may run at once, lowered with a warning where their states take too much.

    `row_bytes`: of a request's state, which on a CPU takes memory once the request is there. A GPU's memory
    is divided beside the loaded model. Raises `ConfigError` for too many requested ones.
    """
    if device != "cpu" or not row_bytes:
        return max_num_seqs
    free = available_memory()
    rows = int(free * (1.0 if is_requested else CPU_KV_SHARE / 2)) // row_bytes

    def needed(number: int) -> int:
        return number + caches * num_checkpoints(number)

    fitting = bisect_right(range(1, min(max_num_seqs, rows) + 1), rows, key=needed)
    if fitting == max_num_seqs:
        return max_num_seqs
    sizes = f"of {row_bytes / 2**20:.1f} MiB each, and {free / 2**30:.1f} GiB of memory are free"
    if is_requested or not fitting:
        kept = " and so does its share of checkpoints for the prefix cache" if caches else ""
        raise ConfigError(
            f"--max-num-seqs {max_num_seqs}: each request holds a state{kept}, {sizes}",
            remedy=f"lower --max-num-seqs to {fitting}" if fitting else "set --no-enable-prefix-caching",
        )
    logger.warning("%d requests run at once instead of %d: states are %s", fitting, max_num_seqs, sizes)
    return fitting


def fit_length(layout: CacheLayout, blocks: int, max_model_len: int, option: str, may_shorten: bool) -> int:
    """Return the context length in tokens that so many blocks hold.

    A length for which there is no room is lowered with a warning if it `may_shorten`; otherwise a request of
    full length would wait forever: raises `ConfigError`. `option`: the flag that makes the cache larger.
    """
    needed, size = layout.blocks_for(max_model_len), layout.page_bytes / 2**20
    if blocks >= needed:
        return max_model_len
    length = layout.longest(blocks, max_model_len)
    if not may_shorten or length <= 0:
        raise ConfigError(
            f"the KV cache has room for {length} tokens ({blocks} blocks, {blocks * size:.0f} MiB), "
            f"but one request of {max_model_len} tokens needs {needed} blocks ({needed * size:.0f} MiB)",
            remedy=f"lower --max-model-len or raise {option}",
        )
    logger.warning(
        "The context is %d tokens instead of the model's %d: the KV cache has room for no more. "
        "%s makes it larger.",
        length,
        max_model_len,
        option,
    )
    return length
