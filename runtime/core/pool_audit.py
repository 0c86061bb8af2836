"""Audits a pool of KV blocks: the invariants of `kv_cache.py`. Imports no torch."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Protocol


class AuditedPool(Protocol):
    """What a `BlockPool` has."""

    num_blocks: int
    block_size: int
    refcount: list[int]
    entry_of: dict[int, tuple[dict[bytes, int], bytes]]
    free: list[int]
    cached: OrderedDict[int, None]


class AuditedGroup(Protocol):
    """What a `LayerGroup` has."""

    most_held: int
    block_of: dict[bytes, int]

    def first_seen(self, position: int) -> int: ...


TableOfAll = tuple[Sequence[Sequence[int]], int, int]  # of a sequence


class BrokenPoolError(RuntimeError):
    """An invariant of a block pool does not hold: the engine must not go on."""


def audit(
    pool: AuditedPool, groups: Sequence[AuditedGroup], tables: Sequence[TableOfAll], *, shares: bool
) -> None:
    """Raise `BrokenPoolError` unless every invariant holds. O(blocks).

    tables: the blocks of each group, how many tokens they have room for, and how many of the first columns
    are full of computed tokens, which sequences may have in common if it `shares` them.
    """
    rows = [
        (group, blocks, group.first_seen(num_full * pool.block_size), num_tokens, num_full)
        for each, num_tokens, num_full in tables
        for group, blocks in zip(groups, each, strict=True)
    ]
    holds = [(block, id(group)) for group, blocks, first, *_ in rows for block in blocks[first:]]
    held = Counter(block for block, _ in holds)
    parts = [*pool.free, *pool.cached, *held]
    counted = {block: count for block, count in enumerate(pool.refcount) if count}
    require(counted == held and len(pool.refcount) == pool.num_blocks, "a refcount is wrong")
    require(sorted(parts) == list(range(pool.num_blocks)), "free, cached and referenced do not partition")
    require(len(set(holds)) == len(held), "two groups hold a block")
    for group, blocks, first, num_tokens, num_full in rows:
        kept, own = blocks[first:], blocks[max(first, num_full if shares else 0) :]
        require(all(held[b] == 1 for b in own), "a block that a sequence writes is shared")
        require(len(set(kept)) == len(kept), "a sequence holds a block twice")
        require(max(blocks[:first], default=-1) < 0, "a sequence holds a block behind its window")
        require(len(blocks) == -(-num_tokens // pool.block_size), "the table of a sequence is off")
        require(len(kept) <= group.most_held, "a sequence holds too many blocks")
    # Each entry is a key of a group; of different blocks they differ, so as many are all.
    indexes, entries = {id(group.block_of) for group in groups}, pool.entry_of.items()
    found = all(index.get(key) == b and id(index) in indexes for b, (index, key) in entries)
    num_keys = sum(len(group.block_of) for group in groups)
    require(found and num_keys == len(entries), "a key names a wrong block")
    require(pool.entry_of.keys() >= pool.cached.keys(), "a cached block has no key")
    require(pool.entry_of.keys().isdisjoint(pool.free), "a free block has a key")


def require(holds: bool, problem: str) -> None:
    """Raise `BrokenPoolError` unless an invariant holds."""
    if not holds:
        raise BrokenPoolError(problem)
