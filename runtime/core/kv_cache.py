"""Paged KV cache bookkeeping: which block of which pool holds which tokens of which sequence.

Method: PagedAttention (Kwon et al., 2023, arXiv:2309.06180) with vLLM's hash-chained prefix reuse.
Imports no torch: blocks are numbers here, the model runner owns the memory behind them.

Layers with a sliding window need the last tokens only, so there is a pool, and for each sequence a table of
blocks, for each window of the model (`ModelSpec.windows`). All tables have the same columns. A block goes
back to its pool once it lies behind the window of every token that is still to be computed.

Invariants of each pool, kept by every method and verified by `check()`:

    free ⊎ cached ⊎ referenced = all blocks
    refcount(block)            = number of block tables that hold it
    a block in two tables      is full and was offered to the prefix cache by both: never written
    len(table)                 = ceil(num_tokens / block_size); the first entries, behind the window, are
                                 NO_BLOCK
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle

from microvllm.runtime.core.checkpoints import StateCheckpoints
from microvllm.runtime.core.pool_audit import audit
from microvllm.runtime.core.prefix_keys import PrefixKeys

NO_BLOCK = -1  # in a table: what stood there lies behind the window


class BlockPool:
    """The blocks of the layers with one window, each of them free, cached or referenced.

    window: tokens that a query sees, its own included; None for all. most_held: blocks that a sequence has at
    a time, at most.
    """

    def __init__(
        self, num_blocks: int, block_size: int, window: int | None = None, most_held: int = sys.maxsize
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.window = window
        self.most_held = most_held
        self.refcount = [0] * num_blocks
        self.key_of: list[bytes | None] = [None] * num_blocks
        self.block_of: dict[bytes, int] = {}
        self.free = list(range(num_blocks - 1, -1, -1))  # hold nothing worth keeping
        self.cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, reusable; oldest first

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free ones, and cached ones that would be evicted."""
        return len(self.free) + len(self.cached)

    @property
    def num_used(self) -> int:
        """Blocks that at least one sequence references."""
        return self.num_blocks - self.num_available

    def take(self) -> int:
        """Hand out a block for new tokens, if need be the one that was unused for longest."""
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.cached.popitem(last=False)
            key = self.key_of[block]
            self.key_of[block] = None
            if key is not None:
                del self.block_of[key]
        self.refcount[block] = 1
        return block

    def share(self, block: int) -> None:
        """Count one more table that holds a block of the prefix cache."""
        if self.refcount[block] == 0:
            del self.cached[block]
        self.refcount[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Count one table less for each; those with a key stay cached until they are needed."""
        for block in blocks:
            self.refcount[block] -= 1
            if self.refcount[block] == 0:
                if self.key_of[block] is None:
                    self.free.append(block)
                else:
                    self.cached[block] = None

    def offer(self, block: int, key: bytes) -> None:
        """Let later sequences find a full block."""
        # Two sequences may compute the same prefix at once; the first to finish is kept.
        if key not in self.block_of:
            self.key_of[block] = key
            self.block_of[key] = block

    def first_seen(self, position: int) -> int:
        """Column of the first block that the token at this position, and so any later one, sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.block_size

    def longest_hit(self, keys: Sequence[bytes]) -> int:
        """Number of leading blocks that need no computing: all that the token after them sees are there."""
        if self.window is None:
            return next((i for i, key in enumerate(keys) if key not in self.block_of), len(keys))
        end = column = len(keys)
        while column > self.first_seen(end * self.block_size):
            column -= 1
            if keys[column] not in self.block_of:
                end = column
        return end

    def hit(self, keys: Sequence[bytes]) -> list[int]:
        """The table of a sequence that begins with these cached blocks."""
        first = self.first_seen(len(keys) * self.block_size)
        return [NO_BLOCK] * first + [self.block_of[key] for key in keys[first:]]

    def forget(self) -> None:
        """Take all keys away from blocks."""
        self.key_of = [None] * self.num_blocks
        self.block_of.clear()
        self.free.extend(self.cached)
        self.cached.clear()


@dataclass(slots=True)
class _Table:
    blocks: list[list[int]]  # of each pool
    num_tokens: int
    num_full: int  # leading blocks whose tokens are known and computed: offered to the prefix cache


class KVCacheManager:
    """Hands out the blocks of all pools, the same number of each; `states`: where sequences may go on.

    A step's methods are O(blocks touched). `check` and `reset_prefix_cache` are O(blocks of the pools),
    `num_unused_slots` is O(sequences).
    """

    def __init__(self, pools: Sequence[BlockPool], enable_prefix_caching: bool = True) -> None:
        self.pools = pools
        self.states = StateCheckpoints(range(0), pools[0].block_size)
        self.block_size = pools[0].block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._root = os.urandom(32)
        self._tables: dict[int, _Table] = {}
        self._no_prefix: list[list[int]] = [[] for _ in pools]

    # ---- what there is -------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """Blocks of every pool that can be handed out now."""
        return min(pool.num_available for pool in self.pools)

    @property
    def num_used(self) -> int:
        """Blocks of all pools that at least one sequence references."""
        return sum(pool.num_used for pool in self.pools)

    @property
    def window_usage(self) -> float:
        """The share of referenced blocks, 0 to 1, in the fullest of all pools but the first."""
        return max((pool.num_used / pool.num_blocks for pool in self.pools[1:]), default=0.0)

    @property
    def num_unused_slots(self) -> int:
        """Token slots in the last block of each sequence that hold no token (internal fragmentation)."""
        return sum(len(t.blocks[0]) * self.block_size - t.num_tokens for t in self._tables.values())

    def blocks_from(self, seq_id: int, column: int) -> tuple[int, ...]:
        """A sequence's blocks from a column on, those of each pool in turn.

        Token i is in column i // block_size.
        """
        tables = self._tables[seq_id].blocks
        if column == len(tables[0]):  # as in most steps of most sequences
            return ()
        return tuple(chain.from_iterable(blocks[column:] for blocks in tables))

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

    def match_prefix(self, keys: PrefixKeys, num_tokens: int) -> list[list[int]]:
        """Cached blocks, of each pool, of the longest prefix of the sequence's first `num_tokens` tokens.

        At least one token is always left to compute, since its logits are what is wanted.
        """
        found = keys.upto((num_tokens - 1) // self.block_size) if self.enable_prefix_caching else []
        kinds: list[BlockPool | StateCheckpoints] = [*self.pools, self.states]
        agreed = 0
        for kind in cycle(kinds):
            length = kind.longest_hit(found)
            agreed = agreed + 1 if length == len(found) else 1
            found = found[:length]
            if agreed >= len(kinds):
                break
        return [pool.hit(found) for pool in self.pools]

    def cache_blocks(self, seq_id: int, keys: PrefixKeys, num_computed: int) -> None:
        """Offer the blocks that `num_computed` known and computed tokens fill to later sequences.

        Then give back those that lie behind a window. Only called with tokens that are known: hashing a
        placeholder would poison the cache, and the next token to compute would not be known.
        """
        table = self._tables[seq_id]
        full = num_computed // self.block_size
        if full <= table.num_full:
            return
        for pool, blocks in zip(self.pools, table.blocks, strict=True):
            if self.enable_prefix_caching:
                for column, key in enumerate(keys.upto(full)[table.num_full :], table.num_full):
                    pool.offer(blocks[column], key)
            column = pool.first_seen(full * self.block_size)
            while column and blocks[column - 1] != NO_BLOCK:
                column -= 1
                pool.release(blocks[column : column + 1])
                blocks[column] = NO_BLOCK
        table.num_full = full

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running sequences keep their blocks."""
        for pool in self.pools:
            pool.forget()
        self.states.forget()

    # ---- alloc, append, free -------------------------------------------------------------------

    def can_hold(self, num_tokens: int, prefix: Sequence[Sequence[int]] = ()) -> bool:
        """Whether a new sequence of `num_tokens` that starts with the `prefix` blocks fits now."""
        for pool, blocks in zip(self.pools, prefix or self._no_prefix, strict=True):
            held = [block for block in blocks if block != NO_BLOCK]
            most_held = min(self._blocks_for(num_tokens) - len(blocks) + len(held), pool.most_held)
            idle = sum(1 for block in held if pool.refcount[block] == 0)
            if most_held - len(held) > pool.num_available - idle:
                return False
        return True

    def alloc(self, seq_id: int, num_tokens: int, prefix: Sequence[Sequence[int]] = ()) -> bool:
        """Give a new sequence room for `num_tokens` tokens, the first in the shared `prefix` blocks.

        False, and nothing changes, when a pool has too few blocks.
        """
        if not self.can_hold(num_tokens, prefix):
            return False
        blocks = [list(blocks) for blocks in prefix or self._no_prefix]
        for pool, shared in zip(self.pools, blocks, strict=True):
            for block in shared:
                if block != NO_BLOCK:
                    pool.share(block)
        num_full = len(blocks[0])
        self._tables[seq_id] = table = _Table(blocks, num_full * self.block_size, num_full)
        return self.append(seq_id, num_tokens - table.num_tokens)

    def append(self, seq_id: int, num_tokens: int = 1) -> bool:
        """Give a sequence room for `num_tokens` more tokens; False, and no change, if there is none."""
        table = self._tables[seq_id]
        num_tokens += table.num_tokens
        held = len(table.blocks[0])
        if num_tokens > held * self.block_size:
            missing = self._blocks_for(num_tokens) - held
            if missing > self.num_available:
                return False
            for pool, blocks in zip(self.pools, table.blocks, strict=True):
                blocks += [pool.take() for _ in range(missing)]
        table.num_tokens = num_tokens
        return True

    def shrink(self, seq_id: int, num_tokens: int) -> None:
        """Take room for the last `num_tokens` back, none of which was offered to the prefix cache."""
        table = self._tables[seq_id]
        table.num_tokens -= num_tokens
        kept = self._blocks_for(table.num_tokens)
        for pool, blocks in zip(self.pools, table.blocks, strict=True):
            pool.release(blocks[kept:])
            del blocks[kept:]

    def free(self, seq_id: int) -> None:
        """Take a sequence's blocks back; those with a key stay cached until they are needed."""
        # Last block first: the tail of a prefix is then evicted before its head, without which the
        # tail could never be found.
        for pool, blocks in zip(self.pools, self._tables.pop(seq_id).blocks, strict=True):
            pool.release(block for block in reversed(blocks) if block != NO_BLOCK)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def check(self) -> None:
        """Raise `BrokenPoolError` unless every invariant of the module's head holds. O(blocks)."""
        for index, pool in enumerate(self.pools):
            tables = [(t.blocks[index], t.num_tokens, t.num_full) for t in self._tables.values()]
            audit(pool, tables, shares=self.enable_prefix_caching)
        self.states.check()
