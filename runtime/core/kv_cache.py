"""Paged KV cache bookkeeping: which block of the pool holds which tokens of which sequence.

Method: PagedAttention (Kwon et al., 2023, arXiv:2309.06180) with vLLM's hash-chained prefix reuse.
Imports no torch: blocks are numbers here, the model runner owns the memory behind them.

Invariants, kept by every method and verified by `check()`:

    free ⊎ cached ⊎ referenced = all blocks
    refcount(block)            = number of block tables that hold it
    a block in two tables      is full and was offered to the prefix cache by both: never written
    len(table)                 = ceil(num_tokens / block_size)
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from microvllm.runtime.core.prefix_keys import PrefixKeys


class BrokenPoolError(RuntimeError):
    """An invariant of the block pool does not hold: the engine must not go on."""


@dataclass(slots=True)
class _Table:
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_cached_blocks: int = 0  # leading blocks already offered to the prefix cache


class KVCacheManager:
    """Hands out the blocks of the KV pool.

    A step's methods are O(blocks touched). `check` and `reset_prefix_cache` are O(blocks of the pool),
    `num_unused_slots` is O(sequences).
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._root = os.urandom(32)
        self._tables: dict[int, _Table] = {}
        self._refcount = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # hold nothing worth keeping
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, reusable; oldest first

    # ---- what there is -------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free ones, and cached ones that would be evicted."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that at least one sequence references."""
        return self.num_blocks - self.num_available

    @property
    def num_unused_slots(self) -> int:
        """Token slots in referenced blocks that hold no token (internal fragmentation)."""
        return sum(len(t.blocks) * self.block_size - t.num_tokens for t in self._tables.values())

    def block_table(self, seq_id: int) -> list[int]:
        """Blocks of a sequence in token order; token i is in block i // block_size."""
        return self._tables[seq_id].blocks

    # ---- prefix reuse --------------------------------------------------------------------------

    def prefix_keys(self, token_ids: list[int], salt: str = "") -> PrefixKeys:
        """Keys for a token list that may grow; pass them to `match_prefix` and `cache_blocks`."""
        # A lone surrogate is a possible salt too: a JSON parser lets it pass, strict UTF-8 does not.
        root = hashlib.sha256(self._root + salt.encode("utf-8", "surrogatepass")).digest()
        return PrefixKeys(token_ids, self.block_size, root)

    def last_key(self, keys: PrefixKeys, num_tokens: int) -> bytes | None:
        """The key of the last block that `match_prefix` could find; None if there can be none."""
        num_blocks = (num_tokens - 1) // self.block_size
        return keys.upto(num_blocks)[-1] if self.enable_prefix_caching and num_blocks else None

    def match_prefix(self, keys: PrefixKeys, num_tokens: int) -> list[int]:
        """Cached blocks that hold the longest prefix of the sequence's first `num_tokens` tokens.

        At least one token is always left to compute, since its logits are what is wanted.
        """
        if not self.enable_prefix_caching:
            return []
        blocks: list[int] = []
        for key in keys.upto((num_tokens - 1) // self.block_size):
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def cache_blocks(self, seq_id: int, keys: PrefixKeys, num_computed: int) -> None:
        """Offer the blocks that `num_computed` known and computed tokens fill to later sequences.

        Only called with tokens that are known: hashing a placeholder would poison the cache.
        """
        table = self._tables[seq_id]
        full = num_computed // self.block_size
        if not self.enable_prefix_caching or full <= table.num_cached_blocks:
            return
        for i, key in enumerate(keys.upto(full)[table.num_cached_blocks :], table.num_cached_blocks):
            # Two sequences may compute the same prefix at once; the first to finish is kept.
            if key not in self._block_of:
                block = table.blocks[i]
                self._key_of[block] = key
                self._block_of[key] = block
        table.num_cached_blocks = full

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running sequences keep their blocks."""
        self._key_of = [None] * self.num_blocks
        self._block_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    # ---- alloc, append, free -------------------------------------------------------------------

    def can_hold(self, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        """Whether a new sequence of `num_tokens` that starts with the `prefix` blocks fits now."""
        idle_prefix = sum(1 for block in prefix if self._refcount[block] == 0)
        return self._blocks_for(num_tokens) - len(prefix) <= self.num_available - idle_prefix

    def alloc(self, seq_id: int, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        """Give a new sequence room for `num_tokens` tokens, the first in the shared `prefix` blocks.

        False, and nothing changes, when the pool has too few blocks.
        """
        if not self.can_hold(num_tokens, prefix):
            return False
        for block in prefix:
            if self._refcount[block] == 0:
                del self._cached[block]
            self._refcount[block] += 1
        table = _Table(list(prefix), len(prefix) * self.block_size, len(prefix))
        self._tables[seq_id] = table
        return self.append(seq_id, num_tokens - table.num_tokens)

    def append(self, seq_id: int, num_tokens: int = 1) -> bool:
        """Give a sequence room for `num_tokens` more tokens; False, and no change, if there is none."""
        table = self._tables[seq_id]
        missing = self._blocks_for(table.num_tokens + num_tokens) - len(table.blocks)
        if missing > 0:
            if missing > self.num_available:
                return False
            table.blocks += [self._take() for _ in range(missing)]
        table.num_tokens += num_tokens
        return True

    def shrink(self, seq_id: int, num_tokens: int) -> None:
        """Take room for the last `num_tokens` back, none of which was offered to the prefix cache."""
        table = self._tables[seq_id]
        table.num_tokens -= num_tokens
        while len(table.blocks) > self._blocks_for(table.num_tokens):
            block = table.blocks.pop()
            self._refcount[block] = 0
            self._free.append(block)

    def free(self, seq_id: int) -> None:
        """Take a sequence's blocks back; those with a key stay cached until they are needed."""
        # Last block first: the tail of a prefix is then evicted before its head, without which the
        # tail could never be found.
        for block in reversed(self._tables.pop(seq_id).blocks):
            self._refcount[block] -= 1
            if self._refcount[block] == 0:
                if self._key_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key = self._key_of[block]
            self._key_of[block] = None
            if key is not None:
                del self._block_of[key]
        self._refcount[block] = 1
        return block

    # ---- audit ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `BrokenPoolError` unless every invariant of the module's head holds. O(blocks)."""
        held = Counter(block for table in self._tables.values() for block in table.blocks)
        _require(all(self._refcount[b] == held[b] for b in range(self.num_blocks)), "a refcount is wrong")
        parts = [*self._free, *self._cached, *held]
        _require(
            sorted(parts) == list(range(self.num_blocks)), "free, cached and referenced do not partition"
        )
        for seq_id, table in self._tables.items():
            open_blocks = (
                table.blocks[table.num_cached_blocks :] if self.enable_prefix_caching else table.blocks
            )
            _require(
                all(held[b] == 1 for b in open_blocks), f"a block that sequence {seq_id} writes is shared"
            )
            _require(len(set(table.blocks)) == len(table.blocks), f"sequence {seq_id} holds a block twice")
            _require(
                len(table.blocks) == self._blocks_for(table.num_tokens),
                f"the table of sequence {seq_id} is off",
            )
        _require(
            all(self._key_of[b] == key for key, b in self._block_of.items()), "a key names a wrong block"
        )
        _require(all(self._key_of[b] is not None for b in self._cached), "a cached block has no key")
        _require(all(self._key_of[b] is None for b in self._free), "a free block has a key")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise BrokenPoolError(problem)
