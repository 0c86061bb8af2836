"""Paged KV cache bookkeeping: which block holds which tokens of which sequence, for which layers.

Method: PagedAttention (Kwon et al., 2023, arXiv:2309.06180) with vLLM's hash-chained prefix reuse.
Imports no torch: blocks are numbers here, the model runner owns the memory behind them.

Layers with a sliding window need the last tokens only, so a sequence has a table of blocks for each group of
layers (`ModelSpec.cache_plan`). All tables have the same columns, and their blocks come from one pool: each
may be of any group, and goes back once it lies behind the window of every token that is still to be computed.

Invariants, kept by every method and verified by `check()`:

    free ⊎ cached ⊎ referenced = all blocks
    refcount(block)            = number of block tables that hold it, all of one group
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
from itertools import chain

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.checkpoints import StateCheckpoints
from microvllm.runtime.core.pool_audit import audit
from microvllm.runtime.core.prefix_keys import PrefixKeys
from microvllm.runtime.rank_layout import rank_layout

NO_BLOCK = -1  # in a table: what stood there lies behind the window


class BlockPool:
    """All blocks, each of them free, cached or referenced."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.refcount = [0] * num_blocks
        # Of each block that the prefix cache offers: the index of its group, and its key there.
        self.entry_of: dict[int, tuple[dict[bytes, int], bytes]] = {}
        self.free = list(range(num_blocks - 1, -1, -1))  # hold nothing worth keeping
        self.cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, reusable; oldest first

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free ones, and cached ones that would be evicted."""
        return len(self.free) + len(self.cached)

    def take(self) -> int:
        """Hand out a block for new tokens, if need be the one that was unused for longest."""
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.cached.popitem(last=False)
            block_of, key = self.entry_of.pop(block)
            del block_of[key]
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
                if block in self.entry_of:
                    self.cached[block] = None
                else:
                    self.free.append(block)

    def forget(self) -> None:
        """Take all keys away from blocks."""
        self.entry_of.clear()
        self.free.extend(self.cached)
        self.cached.clear()


class LayerGroup:
    """Layers with one window: which of their blocks the prefix cache holds, by key.

    window: tokens that a query sees, its own included; None for all. most_held: blocks that a sequence has at
    a time, at most.
    """

    def __init__(self, pool: BlockPool, window: int | None = None, most_held: int = sys.maxsize) -> None:
        self.pool = pool
        self.window = window
        self.most_held = most_held
        self.block_of: dict[bytes, int] = {}

    def offer(self, block: int, key: bytes) -> None:
        """Let later sequences find a full block."""
        # Two sequences may compute the same prefix at once; the first to finish is kept.
        if key not in self.block_of:
            self.pool.entry_of[block] = self.block_of, key
            self.block_of[key] = block

    def first_seen(self, position: int) -> int:
        """Column of the first block that the token at this position, and so any later one, sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.pool.block_size

    def longest_hit(self, keys: Sequence[bytes]) -> int:
        """Number of leading blocks that need no computing: all that the token after them sees are there."""
        if self.window is None:
            return next((i for i, key in enumerate(keys) if key not in self.block_of), len(keys))
        end = column = len(keys)
        while column > self.first_seen(end * self.pool.block_size):
            column -= 1
            if keys[column] not in self.block_of:
                end = column
        return end

    def hit(self, keys: Sequence[bytes]) -> list[int]:
        """The table of a sequence that begins with these cached blocks."""
        first = self.first_seen(len(keys) * self.pool.block_size)
        return [NO_BLOCK] * first + [self.block_of[key] for key in keys[first:]]


@dataclass(slots=True)
class _Table:
    blocks: list[list[int]]  # of each group
    num_tokens: int
    num_full: int  # leading blocks whose tokens are known and computed: offered to the prefix cache


class KVCacheManager:
    """Hands out the blocks of one pool to tables of all groups; `states`: where sequences may go on.

    A step's methods are O(blocks touched). `check` and `reset_prefix_cache` are O(blocks of the pool),
    `num_unused_slots` is O(sequences).
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        enable_prefix_caching: bool = True,
        state_rows: range = range(0),
    ) -> None:
        """state_rows: those of the checkpoints of states, see `StateCheckpoints`."""
        self.groups, self.pool = groups, groups[0].pool
        self.block_size = self.pool.block_size
        self.states = StateCheckpoints(state_rows, self.block_size, groups[0].longest_hit)
        self.enable_prefix_caching = enable_prefix_caching
        self._root = os.urandom(32)
        self._tables: dict[int, _Table] = {}
        self._no_prefix: list[list[int]] = [[] for _ in groups]

    @classmethod
    def of(cls, config: EngineConfig) -> KVCacheManager:
        """The cache that a configuration has memory for."""
        pool = BlockPool(config.num_blocks, config.block_size)
        groups = [LayerGroup(pool, *group) for group in rank_layout(config).groups(config.max_model_len)]
        return cls(groups, config.enable_prefix_caching, range(config.max_num_seqs + 1, config.state_rows))

    # ---- what there is -------------------------------------------------------------------------

    @property
    def num_available(self) -> int:
        """Columns of all tables that can be handed out now."""
        return self.pool.num_available // len(self.groups)

    @property
    def num_used(self) -> int:
        """Blocks that at least one sequence references."""
        return self.pool.num_blocks - self.pool.num_available

    @property
    def num_unused_slots(self) -> int:
        """Token slots in each sequence's last block that hold no token (internal fragmentation)."""
        return sum(len(t.blocks[0]) * self.block_size - t.num_tokens for t in self._tables.values())

    def blocks_from(self, seq_id: int, column: int) -> tuple[int, ...]:
        """A sequence's blocks from a column on, those of each group in turn.

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
        """Cached blocks, of each group, of the longest prefix of the sequence's first `num_tokens` tokens.

        At least one token is always left to compute, since its logits are what is wanted.
        """
        found = keys.upto((num_tokens - 1) // self.block_size) if self.enable_prefix_caching else []
        kinds: list[LayerGroup | StateCheckpoints] = [*self.groups, self.states]
        length = -1
        while length != len(found):  # until all of them agree
            length = len(found)
            for kind in kinds:
                found = found[: kind.longest_hit(found)]
        return [group.hit(found) for group in self.groups]

    def cache_blocks(self, seq_id: int, keys: PrefixKeys, num_computed: int) -> None:
        """Offer the blocks that `num_computed` known and computed tokens fill to later sequences.

        Then give back those that lie behind a window. Only called with tokens that are known: hashing a
        placeholder would poison the cache, and the next token to compute would not be known.
        """
        table = self._tables[seq_id]
        full = num_computed // self.block_size
        if full <= table.num_full:
            return
        for group, blocks in zip(self.groups, table.blocks, strict=True):
            if self.enable_prefix_caching:
                for column, key in enumerate(keys.upto(full)[table.num_full :], table.num_full):
                    group.offer(blocks[column], key)
            column = group.first_seen(full * self.block_size)
            while column and blocks[column - 1] != NO_BLOCK:
                column -= 1
                self.pool.release(blocks[column : column + 1])
                blocks[column] = NO_BLOCK
        table.num_full = full

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running sequences keep their blocks."""
        for group in self.groups:
            group.block_of.clear()
        self.pool.forget()
        self.states.forget()

    # ---- alloc, append, free -------------------------------------------------------------------

    def can_hold(self, num_tokens: int, prefix: Sequence[Sequence[int]] = ()) -> bool:
        """Whether a new sequence of `num_tokens` that starts with the `prefix` blocks fits now."""
        missing = idle = 0
        for group, blocks in zip(self.groups, prefix or self._no_prefix, strict=True):
            held = [block for block in blocks if block != NO_BLOCK]
            missing += min(self._blocks_for(num_tokens) - len(blocks), group.most_held - len(held))
            idle += sum(1 for block in held if self.pool.refcount[block] == 0)
        return missing <= self.pool.num_available - idle

    def alloc(self, seq_id: int, num_tokens: int, prefix: Sequence[Sequence[int]] = ()) -> bool:
        """Give a new sequence room for `num_tokens` tokens, the first in the shared `prefix` blocks.

        False, and nothing changes, when there are too few blocks.
        """
        if not self.can_hold(num_tokens, prefix):
            return False
        blocks = [list(blocks) for blocks in prefix or self._no_prefix]
        for block in chain.from_iterable(blocks):
            if block != NO_BLOCK:
                self.pool.share(block)
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
            for blocks in table.blocks:
                blocks += [self.pool.take() for _ in range(missing)]
        table.num_tokens = num_tokens
        return True

    def shrink(self, seq_id: int, num_tokens: int) -> None:
        """Take room for the last `num_tokens` back, none of which was offered to the prefix cache."""
        table = self._tables[seq_id]
        table.num_tokens -= num_tokens
        kept = self._blocks_for(table.num_tokens)
        for blocks in table.blocks:
            self.pool.release(blocks[kept:])
            del blocks[kept:]

    def free(self, seq_id: int) -> None:
        """Take a sequence's blocks back; those with a key stay cached until they are needed."""
        # Last column first: the tail of a prefix is then evicted before its head, without which the
        # tail could never be found, and no group's blocks before those that another one still has.
        columns = zip(*map(reversed, self._tables.pop(seq_id).blocks), strict=True)
        self.pool.release(block for block in chain.from_iterable(columns) if block != NO_BLOCK)
        self.states.leave(seq_id)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def check(self) -> None:
        """Raise `BrokenPoolError` unless every invariant of the module's head holds. O(blocks)."""
        tables = [(t.blocks, t.num_tokens, t.num_full) for t in self._tables.values()]
        audit(self.pool, self.groups, tables, shares=self.enable_prefix_caching)
        self.states.check()
