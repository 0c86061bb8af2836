"""The block pool alone: tables, reference counts, prefix keys, eviction."""

from __future__ import annotations

import pytest

from microvllm.runtime.core.kv_cache import BlockPool, KVCacheManager
from microvllm.runtime.core.pool_audit import BrokenPoolError

BLOCK = 4


def one_pool(num_blocks: int, enable_prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager([BlockPool(num_blocks, BLOCK)], enable_prefix_caching)


def blocks_of(kv: KVCacheManager, seq_id: int) -> list[int]:
    return list(kv.blocks_from(seq_id, 0))


def filled(kv: KVCacheManager, seq_id: int, tokens: list[int], salt: str = "") -> list[int]:
    """Allocate, compute and offer a whole sequence; its blocks."""
    keys = kv.prefix_keys(tokens, salt)
    assert kv.alloc(seq_id, len(tokens), kv.match_prefix(keys, len(tokens)))
    kv.cache_blocks(seq_id, keys, len(tokens))
    kv.check()
    return blocks_of(kv, seq_id)


def match(kv: KVCacheManager, tokens: list[int], salt: str = "") -> list[int]:
    (blocks,) = kv.match_prefix(kv.prefix_keys(tokens, salt), len(tokens))
    return blocks


def test_table_grows_by_whole_blocks() -> None:
    kv = one_pool(4)
    assert kv.alloc(7, 1)
    for num_tokens in range(1, 16):
        assert len(blocks_of(kv, 7)) == -(-num_tokens // 4)
        assert kv.num_used == len(blocks_of(kv, 7))
        assert kv.num_unused_slots == -num_tokens % 4
        assert kv.append(7)
        kv.check()
    assert not kv.append(7), "17 tokens do not fit 4 blocks of 4"
    assert len(blocks_of(kv, 7)) == 4
    kv.check()
    kv.free(7)
    kv.check()
    assert kv.num_used == 0 and kv.num_available == 4 and kv.num_unused_slots == 0


def test_failed_alloc_and_append_change_nothing() -> None:
    kv = one_pool(4)
    prefix = filled(kv, 1, list(range(8)))
    kv.free(1)
    assert kv.alloc(2, 4)
    for refused in (kv.alloc(3, 17, [prefix]), kv.append(2, 13)):
        assert not refused
        kv.check()
        assert kv.num_available == 3
    with pytest.raises(KeyError):
        blocks_of(kv, 3)
    assert match(kv, list(range(9))) == prefix


def test_can_hold_does_not_count_a_prefix_block_twice() -> None:
    """A cached prefix block is available, but not for the rest of the sequence that starts with it."""
    kv = one_pool(3)
    prefix = filled(kv, 1, list(range(8)))
    kv.free(1)
    assert kv.num_available == 3
    assert kv.can_hold(12, [prefix])
    assert not kv.can_hold(13, [prefix])
    assert not kv.alloc(2, 13, [prefix])
    assert kv.alloc(2, 12, [prefix]) and blocks_of(kv, 2)[:2] == prefix
    kv.check()
    assert kv.can_hold(8, [prefix]), "its blocks are referenced: nothing more is needed"
    assert not kv.can_hold(9, [prefix])


def test_a_prefix_leaves_at_least_one_token_to_compute() -> None:
    kv = one_pool(8)
    blocks = filled(kv, 1, list(range(8)))
    assert match(kv, list(range(8))) == blocks[:1]
    assert match(kv, list(range(9))) == blocks
    assert match(kv, list(range(4))) == []
    assert match(kv, [0]) == []


def test_only_equal_whole_prefixes_match() -> None:
    kv = one_pool(8)
    blocks = filled(kv, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert match(kv, [1, 2, 3, 4, 5, 6, 7, 8, 0]) == blocks[:2]
    assert match(kv, [1, 2, 3, 4, 5, 6, 7, 0, 9]) == blocks[:1]
    assert match(kv, [0, 2, 3, 4, 5, 6, 7, 8, 9]) == []
    assert match(kv, [5, 6, 7, 8, 9]) == [], "the same block after another parent is another block"


def test_a_partial_block_is_never_offered() -> None:
    kv = one_pool(8)
    keys = kv.prefix_keys(tokens := list(range(9)))
    assert kv.alloc(1, 9)
    for computed, offered in ((3, 0), (4, 1), (7, 1), (8, 2)):
        kv.cache_blocks(1, keys, computed)
        assert match(kv, tokens) == blocks_of(kv, 1)[:offered]


def test_salts_and_pools_do_not_share() -> None:
    kv = one_pool(8)
    tokens = list(range(9))
    filled(kv, 1, tokens, salt="a")
    assert match(kv, tokens, "b") == match(kv, tokens, "") == []
    assert len(match(kv, tokens, "a")) == 2
    other = one_pool(8)
    assert kv.prefix_keys(tokens).upto(2) != other.prefix_keys(tokens).upto(2), "the root key is secret"


def test_any_text_is_a_salt() -> None:
    """Also one that UTF-8 cannot encode: a lone surrogate passes through a JSON parser."""
    kv = one_pool(8)
    tokens = list(range(9))
    filled(kv, 1, tokens, salt="\ud800")
    assert len(match(kv, tokens, "\ud800")) == 2
    assert match(kv, tokens, "\udfff") == match(kv, tokens, "é\0") == []


def test_keys_follow_the_growing_token_list() -> None:
    kv = one_pool(8)
    tokens = list(range(5))
    keys = kv.prefix_keys(tokens)
    first = keys.upto(1)
    tokens += [5, 6, 7, 8]
    assert keys.upto(2) == kv.prefix_keys(list(range(9))).upto(2)
    assert keys.upto(1) == first and keys.upto(0) == []


def test_shared_blocks_are_counted_and_freed_once() -> None:
    kv = one_pool(8)
    shared = filled(kv, 1, [*range(8), 20])[:2]
    assert filled(kv, 2, [*range(8), 21])[:2] == shared
    assert kv.num_used == 4
    kv.free(1)
    kv.check()
    assert kv.num_used == 3, "the other sequence still holds the shared blocks"
    kv.free(2)
    kv.check()
    assert kv.num_used == 0 and match(kv, [*range(8), 22]) == shared


def test_two_that_computed_the_same_prefix_keep_their_own_blocks() -> None:
    kv = one_pool(8)
    tokens = list(range(5))
    one, two = kv.prefix_keys(tokens), kv.prefix_keys(tokens)
    assert kv.alloc(1, 5) and kv.alloc(2, 5)
    kv.cache_blocks(1, one, 5)
    kv.cache_blocks(2, two, 5)
    kv.check()
    assert match(kv, tokens) == blocks_of(kv, 1)[:1] != blocks_of(kv, 2)[:1]
    kv.free(1)
    kv.free(2)
    kv.check()
    assert len(match(kv, tokens)) == 1


def test_eviction_takes_the_oldest_and_the_tail_before_the_head() -> None:
    kv = one_pool(6)
    old, new = list(range(9)), list(range(10, 19))
    filled(kv, 1, old)
    filled(kv, 2, new)
    kv.free(1)
    kv.free(2)
    cached = [(len(match(kv, old)), len(match(kv, new)))]
    kv.alloc(3, 1)
    for _ in range(5):
        assert kv.append(3, 4)
        kv.check()
        cached.append((len(match(kv, old)), len(match(kv, new))))
    # The two partial blocks go first, then the older sequence from its end.
    assert cached == [(2, 2), (2, 2), (1, 2), (0, 2), (0, 1), (0, 0)]
    assert kv.num_available == 0


def test_a_referenced_block_is_never_evicted() -> None:
    kv = one_pool(3)
    shared = filled(kv, 1, list(range(9)))
    assert not kv.alloc(2, 1)
    kv.free(1)
    assert kv.alloc(2, 9, [shared[:2]]) and blocks_of(kv, 2)[:2] == shared[:2]
    assert not kv.alloc(3, 1)
    kv.check()


def test_reuse_makes_a_prefix_young_again() -> None:
    kv = one_pool(4)
    first, second = [1] * 5, [2] * 5
    filled(kv, 1, first)
    kv.free(1)
    filled(kv, 2, second)
    kv.free(2)
    filled(kv, 3, first)  # hits, and is then younger than the second
    kv.free(3)
    assert kv.alloc(4, 12)
    assert match(kv, first) and not match(kv, second)


def test_reset_forgets_prefixes_and_keeps_sequences() -> None:
    kv = one_pool(8)
    tokens = list(range(9))
    blocks = filled(kv, 1, tokens)
    filled(kv, 2, [*tokens, 9])
    filled(kv, 3, [5] * 9)
    kv.free(3)
    kv.reset_prefix_cache()
    kv.check()
    assert match(kv, tokens) == match(kv, [5] * 9) == []
    assert blocks_of(kv, 1) == blocks and blocks_of(kv, 2)[:2] == blocks[:2]
    kv.free(1)
    kv.free(2)
    kv.check()
    assert kv.num_available == 8 and match(kv, tokens) == []
    filled(kv, 4, tokens)
    assert len(match(kv, tokens)) == 2, "it caches again afterwards"


def test_without_prefix_caching_nothing_is_kept() -> None:
    kv = one_pool(8, enable_prefix_caching=False)
    tokens = list(range(9))
    filled(kv, 1, tokens)
    assert match(kv, tokens) == []
    kv.free(1)
    kv.check()
    assert match(kv, tokens) == [] and len(kv.pools[0].free) == 8


# ---- pools of several windows ----------------------------------------------------------------------


def two_pools(full: int, window: int, reach: int = 6) -> KVCacheManager:
    """All tokens in one, the last `reach` in the other."""
    return KVCacheManager([BlockPool(full, BLOCK), BlockPool(window, BLOCK, reach)])


def grow(kv: KVCacheManager, seq_id: int, tokens: list[int]) -> None:
    """Compute a sequence block by block."""
    keys = kv.prefix_keys(tokens)
    prefix = kv.match_prefix(keys, len(tokens))
    known = len(prefix[0]) * BLOCK
    assert kv.alloc(seq_id, min(known + BLOCK, len(tokens)), prefix)
    while known < len(tokens):
        new = min(BLOCK, len(tokens) - known)
        if known > len(prefix[0]) * BLOCK:
            assert kv.append(seq_id, new)
        known += new
        kv.cache_blocks(seq_id, keys, known)
        kv.check()


def test_blocks_behind_a_window_go_back_and_stay_cached() -> None:
    kv = two_pools(16, 3)
    grow(kv, 1, tokens := list(range(40)))
    full, window = kv.pools
    assert (full.num_used, window.num_used) == (10, 2), "the next token sees 35 to 40"
    blocks = kv.blocks_from(1, 0)
    assert min(blocks[:10]) >= 0 and blocks[10:18] == (-1,) * 8 and min(blocks[18:]) >= 0
    assert kv.blocks_from(1, 9) == (blocks[9], blocks[19]) and kv.blocks_from(1, 10) == ()
    kv.free(1)
    kv.check()
    assert kv.num_used == 0
    hit = kv.match_prefix(kv.prefix_keys([*tokens, 7]), 41)
    assert [len(each) for each in hit] == [10, 10] and hit[1][:8] == [-1] * 8


def test_a_hit_ends_where_all_pools_agree() -> None:
    kv = two_pools(40, 5)
    grow(kv, 1, tokens := list(range(40)))
    kv.free(1)
    # Of the window five blocks are left, the last ones; a hit of n blocks needs the two in front of it.
    lengths = [len(kv.match_prefix(kv.prefix_keys(tokens), n)[1]) for n in range(1, 41, 4)]
    assert lengths == [0, 0, 0, 0, 0, 0, 0, 7, 8, 9]
    for seq_id, start in ((2, 100), (3, 200)):
        grow(kv, seq_id, list(range(start, start + 12)))
        kv.free(seq_id)
    assert kv.pools[0].longest_hit(kv.prefix_keys(tokens).upto(10)) == 10
    assert kv.match_prefix(kv.prefix_keys(tokens), 40) == [[], []]
    three = KVCacheManager([BlockPool(9, BLOCK), BlockPool(9, BLOCK, 9), BlockPool(9, BLOCK, 2)])
    keys = three.prefix_keys(tokens).upto(6)
    for pool, columns in zip(three.pools, ((0, 1, 2, 3, 4, 5), (0, 1, 3, 4), (0, 2, 4, 5)), strict=True):
        for column in columns:
            pool.offer(pool.take(), keys[column])
    # 6, 5, 5 of them alone; then 5 needs 3 and 4 of the second, and 4 of the third.
    assert len(three.match_prefix(three.prefix_keys(tokens), 25)[0]) == 5


def test_a_pool_that_is_too_small_refuses_and_changes_nothing() -> None:
    kv = two_pools(16, 3)
    assert kv.alloc(1, 8) and kv.alloc(2, 4)
    assert kv.pools[0].num_available == 13 and kv.num_available == 0
    assert not kv.append(1, 4) and not kv.append(2, 1) and not kv.alloc(3, 1)
    kv.check()
    assert kv.pools[0].num_available == 13
    kv.shrink(1, 4)
    assert kv.append(2, 1)
    kv.check()


def test_a_long_prompt_is_admitted_for_what_it_holds_at_a_time() -> None:
    kv = KVCacheManager([BlockPool(100, BLOCK), BlockPool(8, BLOCK, 6, most_held=5)])
    assert kv.can_hold(400) and not kv.can_hold(401)
    assert kv.alloc(1, 16)
    assert not kv.can_hold(40) and kv.can_hold(16)


def test_the_audit_sees_each_kind_of_damage() -> None:
    def damaged(kind: str) -> KVCacheManager:
        kv = one_pool(8)
        filled(kv, 1, [*range(8), 20])
        filled(kv, 2, [*range(8), 21])
        filled(kv, 3, [9] * 9)
        kv.free(3)
        open_block = blocks_of(kv, 1)[2]
        if kind == "a refcount is wrong":
            kv.pools[0].refcount[open_block] += 1
        elif kind == "do not partition":
            kv.pools[0].free.append(open_block)
        elif kind == "writes is shared":
            kv.pools[0].refcount[open_block] += 1
            kv.pools[0].free.append(kv._tables[2].blocks[0][2])
            kv.pools[0].refcount[kv._tables[2].blocks[0][2]] = 0
            kv._tables[2].blocks[0][2] = open_block
        elif kind == "holds a block twice":
            table = kv._tables[1].blocks[0]
            kv.pools[0].free.append(table[2])
            kv.pools[0].refcount[table[2]] = 0
            table[2] = table[0]
            kv.pools[0].refcount[table[0]] += 1
            kv._tables[1].num_full = 3
        elif kind == "is off":
            kv._tables[1].num_tokens += 4
        elif kind == "names a wrong block":
            kv.pools[0].block_of[b"forged"] = open_block
        elif kind == "has no key":
            block = next(iter(kv.pools[0].cached))
            key = kv.pools[0].key_of[block]
            assert key is not None
            del kv.pools[0].block_of[key]
            kv.pools[0].key_of[block] = None
        elif kind == "has a key":
            kv.pools[0].key_of[kv.pools[0].free[0]] = b"forged"
        return kv

    damaged("none").check()
    for kind in (
        "a refcount is wrong",
        "do not partition",
        "writes is shared",
        "holds a block twice",
        "is off",
        "names a wrong block",
        "has no key",
        "has a key",
    ):
        with pytest.raises(BrokenPoolError, match=kind):
            damaged(kind).check()
