"""Audits a pool of KV blocks: the invariants of `kv_cache.py`. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol


class AuditedPool(Protocol):
    """What a `BlockPool` has."""

    num_blocks: int
    block_size: int
    most_held: int
    refcount: list[int]
    key_of: list[bytes | None]

    @property
    def block_of(self) -> Mapping[bytes, int]: ...

    @property
    def free(self) -> Collection[int]: ...

    @property
    def cached(self) -> Collection[int]: ...

    def first_seen(self, position: int) -> int: ...


class BrokenPoolError(RuntimeError):
    """An invariant of a block pool does not hold: the engine must not go on."""


def audit(pool: AuditedPool, tables: Sequence[tuple[Sequence[int], int, int]], *, shares: bool) -> None:
    """Raise `BrokenPoolError` unless every invariant holds. O(blocks).

    tables: of each sequence its blocks, how many tokens they have room for, and how many of the first blocks
    are full of computed tokens, which sequences may have in common if it `shares` them.
    """
    passed = [pool.first_seen(num_full * pool.block_size) for _, _, num_full in tables]
    held = Counter(b for (blocks, _, _), first in zip(tables, passed, strict=True) for b in blocks[first:])
    all_blocks = list(range(pool.num_blocks))
    parts = [*pool.free, *pool.cached, *held]
    require(pool.refcount == [held[block] for block in all_blocks], "a refcount is wrong")
    require(sorted(parts) == all_blocks, "free, cached and referenced do not partition")
    for (blocks, num_tokens, num_full), first in zip(tables, passed, strict=True):
        kept = blocks[first:]
        own = blocks[max(first, num_full if shares else 0) :]
        require(all(held[b] == 1 for b in own), "a block that a sequence writes is shared")
        require(len(set(kept)) == len(kept), "a sequence holds a block twice")
        require(max(blocks[:first], default=-1) < 0, "a sequence holds a block behind its window")
        require(len(blocks) == -(-num_tokens // pool.block_size), "the table of a sequence is off")
        require(len(kept) <= pool.most_held, "a sequence holds too many blocks")
    keys = pool.block_of.items()
    require(all(pool.key_of[b] == key for key, b in keys), "a key names a wrong block")
    require(all(pool.key_of[b] is not None for b in pool.cached), "a cached block has no key")
    require(all(pool.key_of[b] is None for b in pool.free), "a free block has a key")


def require(holds: bool, problem: str) -> None:
    """Raise `BrokenPoolError` unless an invariant holds."""
    if not holds:
        raise BrokenPoolError(problem)
