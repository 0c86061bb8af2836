"""The block pool alone: tables, reference counts, prefix keys, eviction."""

from __future__ import annotations

import pytest

from microvllm.runtime.core.kv_cache import BlockPool, KVCacheManager, LayerGroup
from microvllm.runtime.core.pool_audit import BrokenPoolError

BLOCK = 4


def one_pool(num_blocks: int, enable_prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager([LayerGroup(BlockPool(num_blocks, BLOCK))], enable_prefix_caching)


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
    assert match(kv, tokens) == [] and len(kv.pool.free) == 8


# ---- groups of layers with several windows ---------------------------------------------------------


def two_groups(num_blocks: int, reach: int = 6) -> KVCacheManager:
    """All tokens in one, the last `reach` in the other."""
    pool = BlockPool(num_blocks, BLOCK)
    return KVCacheManager([LayerGroup(pool), LayerGroup(pool, reach)])


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
    kv = two_groups(20)
    grow(kv, 1, tokens := list(range(40)))
    assert kv.num_used == 10 + 2, "the next token sees 35 to 40"
    blocks = kv.blocks_from(1, 0)
    assert min(blocks[:10]) >= 0 and blocks[10:18] == (-1,) * 8 and min(blocks[18:]) >= 0
    assert kv.blocks_from(1, 9) == (blocks[9], blocks[19]) and kv.blocks_from(1, 10) == ()
    kv.free(1)
    kv.check()
    assert kv.num_used == 0
    hit = kv.match_prefix(kv.prefix_keys([*tokens, 7]), 41)
    assert [len(each) for each in hit] == [10, 10] and hit[1][:8] == [-1] * 8


def test_what_one_group_gives_back_serves_another() -> None:
    """A text grows to 40 tokens in 13 blocks, where each group alone has 10 blocks for them."""
    kv = two_groups(13)
    grow(kv, 1, list(range(40)))
    assert kv.num_used == 12 and kv.num_available == 0
    assert not kv.append(1, 1), "a block for each group is needed"
    kv.check()
    kv.free(1)
    assert kv.num_available == 6


def test_a_hit_ends_where_all_groups_agree() -> None:
    kv = two_groups(45)
    grow(kv, 1, tokens := list(range(40)))
    kv.free(1)
    # Of 25 free blocks and 20 cached ones; those behind the window are the oldest. One of them is left.
    assert kv.alloc(2, 16 * BLOCK)
    lengths = [len(kv.match_prefix(kv.prefix_keys(tokens), n)[1]) for n in range(1, 42, 4)]
    assert kv.groups[0].longest_hit(kv.prefix_keys(tokens).upto(10)) == 10
    assert lengths == [0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 10], "two in front of it are needed"
    assert kv.append(2, BLOCK)
    assert kv.groups[0].longest_hit(kv.prefix_keys(tokens).upto(10)) == 9
    assert kv.match_prefix(kv.prefix_keys(tokens), 41) == [[], []]
    pool = BlockPool(27, BLOCK)
    three = KVCacheManager([LayerGroup(pool), LayerGroup(pool, 9), LayerGroup(pool, 2)])
    keys = three.prefix_keys(tokens).upto(6)
    for group, columns in zip(three.groups, ((0, 1, 2, 3, 4, 5), (0, 1, 3, 4), (0, 2, 4, 5)), strict=True):
        for column in columns:
            group.offer(pool.take(), keys[column])
    # 6, 5, 5 of them alone; then 5 needs 3 and 4 of the second, and 4 of the third.
    assert len(three.match_prefix(three.prefix_keys(tokens), 25)[0]) == 5


def test_a_short_text_loses_its_end_in_all_groups_first() -> None:
    """Blocks of one group are of no use without those of the others."""
    kv = two_groups(24, reach=100)
    grow(kv, 1, tokens := list(range(40)))
    kv.free(1)
    assert kv.alloc(2, 4 * BLOCK)
    assert [len(each) for each in kv.match_prefix(kv.prefix_keys(tokens), 41)] == [8, 8]
    assert kv.append(2, 2 * BLOCK)
    assert [len(each) for each in kv.match_prefix(kv.prefix_keys(tokens), 41)] == [6, 6]
    kv.check()


def test_too_few_blocks_for_all_groups_change_nothing() -> None:
    kv = two_groups(7)
    assert kv.alloc(1, 8) and kv.alloc(2, 4)
    assert kv.pool.num_available == 1 and kv.num_available == 0
    assert not kv.append(1, 4) and not kv.append(2, 1) and not kv.alloc(3, 1)
    kv.check()
    assert kv.pool.num_available == 1
    kv.shrink(1, 4)
    assert kv.append(2, 1)
    kv.check()


def test_a_long_prompt_is_admitted_for_what_it_holds_at_a_time() -> None:
    pool = BlockPool(105, BLOCK)
    kv = KVCacheManager([LayerGroup(pool), LayerGroup(pool, 6, most_held=5)])
    assert kv.can_hold(400) and not kv.can_hold(401)
    assert kv.alloc(1, 16)
    assert kv.can_hold(368) and not kv.can_hold(369)


def test_the_audit_sees_each_kind_of_damage() -> None:
    def damaged(kind: str) -> KVCacheManager:
        kv = one_pool(8)
        filled(kv, 1, [*range(8), 20])
        filled(kv, 2, [*range(8), 21])
        filled(kv, 3, [9] * 9)
        kv.free(3)
        open_block = blocks_of(kv, 1)[2]
        if kind == "a refcount is wrong":
            kv.pool.refcount[open_block] += 1
        elif kind == "do not partition":
            kv.pool.free.append(open_block)
        elif kind == "writes is shared":
            kv.pool.refcount[open_block] += 1
            kv.pool.free.append(kv._tables[2].blocks[0][2])
            kv.pool.refcount[kv._tables[2].blocks[0][2]] = 0
            kv._tables[2].blocks[0][2] = open_block
        elif kind == "holds a block twice":
            table = kv._tables[1].blocks[0]
            kv.pool.free.append(table[2])
            kv.pool.refcount[table[2]] = 0
            table[2] = table[0]
            kv.pool.refcount[table[0]] += 1
            kv._tables[1].num_full = 3
        elif kind == "is off":
            kv._tables[1].num_tokens += 4
        elif kind == "names a wrong block":
            kv.groups[0].block_of[b"forged"] = open_block
        elif kind == "a key names":
            kv.pool.entry_of[open_block] = kv.groups[0].block_of, b"forged"
        elif kind == "has no key":
            block = next(iter(kv.pool.cached))
            index, key = kv.pool.entry_of.pop(block)
            del index[key]
        elif kind == "has a key":
            kv.groups[0].offer(kv.pool.free[0], b"forged")
        return kv

    damaged("none").check()
    for kind in (
        "a refcount is wrong",
        "do not partition",
        "writes is shared",
        "holds a block twice",
        "is off",
        "names a wrong block",
        "a key names",
        "has no key",
        "has a key",
    ):
        with pytest.raises(BrokenPoolError, match=kind):
            damaged(kind).check()


def test_the_audit_sees_a_block_of_two_groups() -> None:
    kv = two_groups(8)
    grow(kv, 1, [1, 2, 3, 4])
    first, second = kv._tables[1].blocks
    kv.pool.refcount[first[0]] += 1
    kv.pool.free.append(second[0])
    kv.groups[1].block_of.clear()
    del kv.pool.entry_of[second[0]]
    kv.pool.refcount[second[0]], second[0] = 0, first[0]
    with pytest.raises(BrokenPoolError, match="two groups hold a block"):
        kv.check()
