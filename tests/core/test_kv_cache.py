"""The block pool alone: tables, reference counts, prefix keys, eviction."""

from __future__ import annotations

import pytest

from microvllm.runtime.core.kv_cache import BrokenPoolError, KVCacheManager


def filled(kv: KVCacheManager, seq_id: int, tokens: list[int], salt: str = "") -> list[int]:
    """Allocate, compute and offer a whole sequence; its blocks."""
    keys = kv.prefix_keys(tokens, salt)
    assert kv.alloc(seq_id, len(tokens), kv.match_prefix(keys, len(tokens)))
    kv.cache_blocks(seq_id, keys, len(tokens))
    kv.check()
    return list(kv.block_table(seq_id))


def match(kv: KVCacheManager, tokens: list[int], salt: str = "") -> list[int]:
    return kv.match_prefix(kv.prefix_keys(tokens, salt), len(tokens))


def test_table_grows_by_whole_blocks() -> None:
    kv = KVCacheManager(num_blocks=4, block_size=4)
    assert kv.alloc(7, 1)
    for num_tokens in range(1, 16):
        assert len(kv.block_table(7)) == -(-num_tokens // 4)
        assert kv.num_used == len(kv.block_table(7))
        assert kv.num_unused_slots == -num_tokens % 4
        assert kv.append(7)
        kv.check()
    assert not kv.append(7), "17 tokens do not fit 4 blocks of 4"
    assert len(kv.block_table(7)) == 4
    kv.check()
    kv.free(7)
    kv.check()
    assert kv.num_used == 0 and kv.num_available == 4 and kv.num_unused_slots == 0


def test_failed_alloc_and_append_change_nothing() -> None:
    kv = KVCacheManager(num_blocks=4, block_size=4)
    prefix = filled(kv, 1, list(range(8)))
    kv.free(1)
    assert kv.alloc(2, 4)
    for refused in (kv.alloc(3, 17, prefix), kv.append(2, 13)):
        assert not refused
        kv.check()
        assert kv.num_available == 3
    with pytest.raises(KeyError):
        kv.block_table(3)
    assert match(kv, list(range(9))) == prefix


def test_can_hold_does_not_count_a_prefix_block_twice() -> None:
    """A cached prefix block is available, but not for the rest of the sequence that starts with it."""
    kv = KVCacheManager(num_blocks=3, block_size=4)
    prefix = filled(kv, 1, list(range(8)))
    kv.free(1)
    assert kv.num_available == 3
    assert kv.can_hold(12, prefix)
    assert not kv.can_hold(13, prefix)
    assert not kv.alloc(2, 13, prefix)
    assert kv.alloc(2, 12, prefix) and kv.block_table(2)[:2] == prefix
    kv.check()
    assert kv.can_hold(8, prefix), "its blocks are referenced: nothing more is needed"
    assert not kv.can_hold(9, prefix)


def test_a_prefix_leaves_at_least_one_token_to_compute() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=4)
    blocks = filled(kv, 1, list(range(8)))
    assert match(kv, list(range(8))) == blocks[:1]
    assert match(kv, list(range(9))) == blocks
    assert match(kv, list(range(4))) == []
    assert match(kv, [0]) == []


def test_only_equal_whole_prefixes_match() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=4)
    blocks = filled(kv, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert match(kv, [1, 2, 3, 4, 5, 6, 7, 8, 0]) == blocks[:2]
    assert match(kv, [1, 2, 3, 4, 5, 6, 7, 0, 9]) == blocks[:1]
    assert match(kv, [0, 2, 3, 4, 5, 6, 7, 8, 9]) == []
    assert match(kv, [5, 6, 7, 8, 9]) == [], "the same block after another parent is another block"


def test_a_partial_block_is_never_offered() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=4)
    keys = kv.prefix_keys(tokens := list(range(9)))
    assert kv.alloc(1, 9)
    for computed, offered in ((3, 0), (4, 1), (7, 1), (8, 2)):
        kv.cache_blocks(1, keys, computed)
        assert match(kv, tokens) == kv.block_table(1)[:offered]


def test_salts_and_pools_do_not_share() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=4)
    tokens = list(range(9))
    filled(kv, 1, tokens, salt="a")
    assert match(kv, tokens, "b") == match(kv, tokens, "") == []
    assert len(match(kv, tokens, "a")) == 2
    other = KVCacheManager(num_blocks=8, block_size=4)
    assert kv.prefix_keys(tokens).upto(2) != other.prefix_keys(tokens).upto(2), "the root key is secret"


def test_any_text_is_a_salt() -> None:
    """Also one that UTF-8 cannot encode: a lone surrogate passes through a JSON parser."""
    kv = KVCacheManager(num_blocks=8, block_size=4)
    tokens = list(range(9))
    filled(kv, 1, tokens, salt="\ud800")
    assert len(match(kv, tokens, "\ud800")) == 2
    assert match(kv, tokens, "\udfff") == match(kv, tokens, "é\0") == []


def test_keys_follow_the_growing_token_list() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=4)
    tokens = list(range(5))
    keys = kv.prefix_keys(tokens)
    first = keys.upto(1)
    tokens += [5, 6, 7, 8]
    assert keys.upto(2) == kv.prefix_keys(list(range(9))).upto(2)
    assert keys.upto(1) == first and keys.upto(0) == []


def test_shared_blocks_are_counted_and_freed_once() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=4)
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
    kv = KVCacheManager(num_blocks=8, block_size=4)
    tokens = list(range(5))
    one, two = kv.prefix_keys(tokens), kv.prefix_keys(tokens)
    assert kv.alloc(1, 5) and kv.alloc(2, 5)
    kv.cache_blocks(1, one, 5)
    kv.cache_blocks(2, two, 5)
    kv.check()
    assert match(kv, tokens) == kv.block_table(1)[:1] != kv.block_table(2)[:1]
    kv.free(1)
    kv.free(2)
    kv.check()
    assert len(match(kv, tokens)) == 1


def test_eviction_takes_the_oldest_and_the_tail_before_the_head() -> None:
    kv = KVCacheManager(num_blocks=6, block_size=4)
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
    kv = KVCacheManager(num_blocks=3, block_size=4)
    shared = filled(kv, 1, list(range(9)))
    assert not kv.alloc(2, 1)
    kv.free(1)
    assert kv.alloc(2, 9, shared[:2]) and kv.block_table(2)[:2] == shared[:2]
    assert not kv.alloc(3, 1)
    kv.check()


def test_reuse_makes_a_prefix_young_again() -> None:
    kv = KVCacheManager(num_blocks=4, block_size=4)
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
    kv = KVCacheManager(num_blocks=8, block_size=4)
    tokens = list(range(9))
    blocks = filled(kv, 1, tokens)
    filled(kv, 2, [*tokens, 9])
    filled(kv, 3, [5] * 9)
    kv.free(3)
    kv.reset_prefix_cache()
    kv.check()
    assert match(kv, tokens) == match(kv, [5] * 9) == []
    assert kv.block_table(1) == blocks and kv.block_table(2)[:2] == blocks[:2]
    kv.free(1)
    kv.free(2)
    kv.check()
    assert kv.num_available == 8 and match(kv, tokens) == []
    filled(kv, 4, tokens)
    assert len(match(kv, tokens)) == 2, "it caches again afterwards"


def test_without_prefix_caching_nothing_is_kept() -> None:
    kv = KVCacheManager(num_blocks=8, block_size=4, enable_prefix_caching=False)
    tokens = list(range(9))
    filled(kv, 1, tokens)
    assert match(kv, tokens) == []
    kv.free(1)
    kv.check()
    assert match(kv, tokens) == [] and len(kv._free) == 8


def test_the_audit_sees_each_kind_of_damage() -> None:
    def damaged(kind: str) -> KVCacheManager:
        kv = KVCacheManager(num_blocks=8, block_size=4)
        filled(kv, 1, [*range(8), 20])
        filled(kv, 2, [*range(8), 21])
        filled(kv, 3, [9] * 9)
        kv.free(3)
        open_block = kv.block_table(1)[2]
        if kind == "a refcount is wrong":
            kv._refcount[open_block] += 1
        elif kind == "do not partition":
            kv._free.append(open_block)
        elif kind == "writes is shared":
            kv._refcount[open_block] += 1
            kv._free.append(kv._tables[2].blocks[2])
            kv._refcount[kv._tables[2].blocks[2]] = 0
            kv._tables[2].blocks[2] = open_block
        elif kind == "holds a block twice":
            table = kv._tables[1].blocks
            kv._free.append(table[2])
            kv._refcount[table[2]] = 0
            table[2] = table[0]
            kv._refcount[table[0]] += 1
            kv._tables[1].num_cached_blocks = 3
        elif kind == "is off":
            kv._tables[1].num_tokens += 4
        elif kind == "names a wrong block":
            kv._block_of[b"forged"] = open_block
        elif kind == "has no key":
            block = next(iter(kv._cached))
            key = kv._key_of[block]
            assert key is not None
            del kv._block_of[key]
            kv._key_of[block] = None
        elif kind == "has a key":
            kv._key_of[kv._free[0]] = b"forged"
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
