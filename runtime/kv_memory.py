"""Sizes the pools of KV blocks, one for each window of the model's layers.

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
from microvllm.runtime.vllm_environment import whole_number

logger = logging.getLogger("microvllm.config")

KV_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}  # of one number
CPU_KV_BYTES = 256 << 20  # default size on a CPU, if one full-length sequence fits into it
MIN_CHECKPOINTS = 16  # of states, for the prefix cache
CPU_KV_SHARE = 0.4  # never more than this share of the memory that is free


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What the sizes of the pools follow from.

    windows: one of each pool, see `ModelSpec.windows`; block_bytes: of a block of each pool, over its layers.
    step_tokens: computed by the steps that are in flight together, at most.
    """

    windows: Sequence[int | None]
    block_bytes: Sequence[int]
    block_size: int
    step_tokens: int
    max_num_seqs: int

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        kv_dtype: str,
        block_size: int,
        step_tokens: int,
        max_num_seqs: int,
        copies: int = 1,
    ) -> CacheLayout:
        """Return the layout for a model, of which there are `copies` in the same memory."""
        sizes = [
            max(1, number * block_size * copies) for number in spec.kv_bytes_per_token(KV_BYTES[kv_dtype])
        ]
        return cls(spec.windows, sizes, block_size, step_tokens, max_num_seqs)

    def most_held(self, pool: int, length: int) -> int:
        """Blocks of a pool that a sequence of `length` tokens holds at a time, at most.

        With a window these are the blocks that the first token of the oldest step in flight sees, those of
        the steps, and one that is about to be given back.
        """
        blocks, window = -(-length // self.block_size), self.windows[pool]
        if window is None:
            return blocks
        return min(blocks, self._blocks(window - 1) + self._blocks(self.step_tokens) + 1)

    def shapes(self, blocks: Sequence[int], length: int) -> list[tuple[int, int, int | None, int]]:
        """Return what each `BlockPool` is made of, for sequences of up to `length` tokens."""
        return [
            (number, self.block_size, window, self.most_held(pool, length))
            for pool, (number, window) in enumerate(zip(blocks, self.windows, strict=True))
        ]

    def bytes_for(self, length: int) -> int:
        """Bytes that a sequence of `length` tokens holds at a time, at most."""
        return sum(self.most_held(i, length) * size for i, size in enumerate(self.block_bytes))

    def longest(self, num_bytes: int, length: int) -> int:
        """Tokens of the longest sequence that there is room for, in whole blocks, up to those of `length`."""
        lengths = range(self.block_size, length + self.block_size, self.block_size)
        return self.block_size * bisect_right(lengths, num_bytes, key=self.bytes_for)

    def divide(self, num_bytes: int, length: int) -> tuple[int, ...]:
        """Blocks of each pool, of sequences of up to `length` tokens.

        Each pool gets what one of them holds. Of the rest, n being the tokens that it has room for if windows
        are ignored, each window's pool gets n / (w + f) tokens, and the first pool what is left: w is the
        windows' share of the bytes of a short sequence, and f the first pool's share of those of a sequence
        of `length`. Whatever their lengths are, at least 1 / (w + f) as many sequences then find room as in
        pools that were divided for these lengths, and no other division guarantees more. A window's pool
        gets no more than it can use, though: see `_useful`.
        """
        rest = max(0, num_bytes - self.bytes_for(length))
        kept = [
            min(window or length, length) * size
            for window, size in zip(self.windows, self.block_bytes, strict=True)
        ]
        first = sum(self.block_bytes) * kept[0] / sum(kept)
        even = int(rest / (sum(self.block_bytes[1:]) + first))
        others = [
            min(self._useful(pool, length), self.most_held(pool, length) + even)
            for pool in range(1, len(self.windows))
        ]
        taken = sum(blocks * size for blocks, size in zip(others, self.block_bytes[1:], strict=True))
        return max(0, num_bytes - taken) // self.block_bytes[0], *others

    def beside(self, blocks: int, length: int) -> tuple[int, ...]:
        """`blocks` of the first pool, and of the others as many as can be used beside them."""
        return blocks, *(min(blocks, self._useful(pool, length)) for pool in range(1, len(self.windows)))

    def size(self, blocks: Sequence[int]) -> int:
        """Bytes of so many blocks of each pool."""
        return sum(number * size for number, size in zip(blocks, self.block_bytes, strict=True))

    def room(self, blocks: Sequence[int]) -> str:
        """Describe for how many tokens so many blocks of each pool have room."""
        parts = (
            f"{number * self.block_size:,} tokens" + (f" in windows of {window:,}" if window else "")
            for number, window in zip(blocks, self.windows, strict=True)
        )
        return " and ".join(parts)

    def _useful(self, pool: int, length: int) -> int:
        """Twice what `max_num_seqs` sequences hold: as much again for prefixes that are kept."""
        window = self.windows[pool] or length
        each = min(self._blocks(length), self._blocks(window - 1) + 2)
        return 2 * (self.max_num_seqs * each + self._blocks(self.step_tokens))

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def size_pools(
    device: str,
    layout: CacheLayout,
    max_model_len: int,
    *,
    blocks: int | None = None,
    pool_bytes: int | None = None,
    may_shorten: bool = False,
) -> tuple[tuple[int, ...], int]:
    """Return the blocks of each pool (0: to be measured), and the context length in tokens that they hold.

    `blocks`, of the first pool, or `pool_bytes`, of all, are requested; else VLLM_CPU_KVCACHE_SPACE or the
    free memory decides. Pools too small for one request of full length would make that request wait
    indefinitely (vLLM issue 35541): the length is lowered to fit if it `may_shorten`. Raises `ConfigError`
    for too large pools, and for too small ones.
    """
    option = "--kv-cache-memory-bytes" if blocks is None else "--num-gpu-blocks-override"
    if device != "cpu" and blocks is None and pool_bytes is None:
        return (0,) * len(layout.windows), max_model_len
    free = available_memory() if device == "cpu" else 0
    if pool_bytes is None:
        if space := whole_number("VLLM_CPU_KVCACHE_SPACE"):
            pool_bytes = space << 30
        else:
            pool_bytes = min(max(CPU_KV_BYTES, layout.bytes_for(max_model_len)), int(free * CPU_KV_SHARE))
    pools, length = fit_pools(layout, pool_bytes, max_model_len, option, may_shorten, blocks=blocks)
    taken = layout.size(pools)
    if device == "cpu" and taken > free:
        raise ConfigError(
            f"a KV cache of {pools[0]} blocks takes {taken / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB of memory are free",
            remedy="lower --kv-cache-memory-bytes or --num-gpu-blocks-override",
        )
    return pools, length


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


def fit_pools(
    layout: CacheLayout,
    num_bytes: int,
    max_model_len: int,
    option: str,
    may_shorten: bool,
    *,
    blocks: int | None = None,
) -> tuple[tuple[int, ...], int]:
    """Return the blocks of each pool, and the context length in tokens that they hold.

    `num_bytes` are divided, unless the first pool's `blocks` are given. A length for which there is no room
    is lowered with a warning if it `may_shorten`; otherwise a request of full length would wait forever:
    raises `ConfigError`. `option`: the flag that makes the pools larger.
    """

    def pools_for(length: int) -> tuple[int, ...]:
        return layout.divide(num_bytes, length) if blocks is None else layout.beside(blocks, length)

    pools, needed = pools_for(max_model_len), layout.most_held(0, max_model_len)
    if pools[0] >= needed:
        return pools, max_model_len
    size = layout.block_size
    length = layout.longest(num_bytes, max_model_len) if blocks is None else blocks * size
    if not may_shorten or length <= 0:
        raise ConfigError(
            f"the KV cache has room for {length} tokens ({length // size} blocks, "
            f"{layout.bytes_for(length) / 2**20:.0f} MiB), but one request of {max_model_len} tokens "
            f"needs {needed} blocks ({layout.bytes_for(max_model_len) / 2**20:.0f} MiB)",
            remedy=f"lower --max-model-len or raise {option}",
        )
    logger.warning(
        "The context is %d tokens instead of the model's %d: the KV cache has room for no more. "
        "%s makes it larger.",
        length,
        max_model_len,
        option,
    )
    return pools_for(length), length
