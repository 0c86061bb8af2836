"""Draws under top-k, top-p and min-p, a program a row.

What stays after a filter are the entries from some rank on (see `ranks`). Without top-k, rejection draws from
them (`rejection`). With top-k, bisection finds that rank: by the number of entries above for top-k, by their
mass, the sum of 2 ** ((logit - top) * log2(e) / temperature), for a top-p behind it. A pass over a whole row
is what takes long. So each row is first cut into groups of 32 entries whose largest are known. A value that k
of these reach is one that k entries reach, and few more as long as the large ones are spread over the groups:
those few are listed. Where a list does not hold the whole answer (a large top-k), the search is over the row
until what is undecided fits a list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from microvllm.ops.gpu.gumbel import gumbel_of
from microvllm.ops.gpu.launch import follow
from microvllm.ops.gpu.ranks import (
    NOTHING,
    entry_of,
    first_rank,
    from_rank,
    key_of,
    rank_of,
    token_of,
    value_of,
)
from microvllm.ops.gpu.rejection import best_of_block, draw_by_rejection

GROUP = tl.constexpr(32)  # entries: 4 words of 8 neighbours, which one thread has loaded
CAPACITY = 4096  # of a list


@triton.jit
def is_filtered(temperature, top_k, top_p, min_p):
    """Return whether a row is sampled from fewer than all entries."""
    return (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))


@triton.jit
def deliver(newest, sent, places, i, row, token):
    """Make the token of logits row i the newest of its request's row, and write it to the host's memory."""
    tl.store(newest + row, tl.maximum(token, 0))
    place = tl.load(places + i)
    tl.store(sent + place, token, mask=place >= 0)


@triton.jit
def store_largest(largest, values, LANE: tl.constexpr):
    """Store the largest of each group of a program's entries.

    largest: where, [LANE // 8] float32; values: [LANE], the largest of entries LANE apart.
    """
    groups = tl.max(tl.reshape(values, (LANE // 8, 8)), 1)
    tl.store(largest + tl.arange(0, LANE // 8), groups)


@triton.jit
def _below(low, high, top, temperature):
    """A value to try between two: the middle; farther and farther down where there is no low one."""
    down = high - tl.maximum(top - high, 4.0 * temperature)
    return tl.where(low < -3e38, down, low + (high - low) * 0.5)


@triton.jit
def _middle(low, high, top, temperature, tries, VOCAB: tl.constexpr, UNUSED: tl.constexpr):
    """A rank above `low` and below `high`, which are at least two entries apart; after some `tries` by keys.

    By values a search soon ends where most logits are, by keys it ends in 32 steps wherever they are.
    """
    first, last = low >> 32, (high - 1) >> 32
    low_value, high_value = value_of(first.to(tl.int32), UNUSED), value_of(last.to(tl.int32), UNUSED)
    key = key_of(_below(low_value, high_value, top, temperature), UNUSED).to(tl.int64)
    by_value = (tries < 16) & (key > first) & (key <= last)
    key = tl.where(by_value, key, first + (last - first + 1) // 2)
    # Of one value only the entries are left to tell apart.
    start, end = (first << 32) + (0x80000000 - VOCAB), (first << 32) + 0x80000000
    start, end = tl.maximum(start, low), tl.minimum(end, high)
    return tl.where(first < last, key << 32, start + (end - start) // 2)


@triton.jit
def _cut(largest, few, floor, top, temperature):
    """A value that at least `few` of the groups reach, and not many more; `floor` if fewer reach that."""
    low, high = floor, top
    count = tl.sum((largest >= low).to(tl.int32), 0)
    tries = 0
    while (count > few + few // 4 + 8) & (tries < 24):
        middle = _below(low, high, top, temperature)
        reach = tl.sum((largest >= middle).to(tl.int32), 0)
        if reach >= few:
            low, count = tl.maximum(low, middle), reach
        else:
            high = middle
        tries += 1
    return low


@triton.jit
def _fill(
    ranks,
    groups,
    largest,
    logits,
    low,
    high,
    VOCAB: tl.constexpr,
    LANE: tl.constexpr,
    UNUSED: tl.constexpr,
    CAPACITY: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """List the ranks from `low` to below `high`: how many there are; the list has the first CAPACITY.

    ranks: [CAPACITY]; groups: scratch for as many group numbers as there are.
    """
    BLOCK: tl.constexpr = 4 * LANE
    SIDE: tl.constexpr = LANE // 8  # groups of one block
    chosen = largest >= value_of((low >> 32).to(tl.int32), UNUSED)
    tl.debug_barrier()  # the program's other threads may still read the list before this one
    tl.store(groups + tl.cumsum(chosen.to(tl.int32), 0) - 1, tl.arange(0, GROUPS), chosen)
    tl.debug_barrier()
    members = tl.sum(chosen.to(tl.int32), 0) * GROUP
    size = members * 0
    for start in range(0, members, BLOCK):
        at = start + tl.arange(0, BLOCK)
        group = tl.load(groups + at // GROUP, at < members, 0)
        entry = group // SIDE * BLOCK + at % GROUP // 8 * LANE + group % SIDE * 8 + at % 8
        known = (at < members) & (entry < VOCAB)
        rank = rank_of(tl.load(logits + entry, known, float("-inf")).to(tl.float32), entry, UNUSED)
        taken = known & (rank >= low) & (rank < high)
        place = size + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(ranks + place, rank, taken & (place < CAPACITY))
        size += tl.sum(taken.to(tl.int32), 0)
    tl.debug_barrier()
    return size


@triton.jit
def _weigh(
    ranks,
    size,
    listed,
    logits,
    threshold,
    top,
    temperature,
    VOCAB: tl.constexpr,
    LANE: tl.constexpr,
    UNUSED: tl.constexpr,
):
    """Number and mass of the entries from rank `threshold` on: of the list, if `listed`, else of the row."""
    scale = 1.4426950408889634 / temperature
    count, mass = size * 0, top * 0.0
    if listed:
        counts, masses = tl.zeros((LANE,), tl.int32), tl.zeros((LANE,), tl.float32)
        for start in tl.range(0, size, LANE, num_stages=1):
            at = start + tl.arange(0, LANE)
            rank = tl.load(ranks + at, at < size, NOTHING)
            taken = rank >= threshold
            counts += taken.to(tl.int32)
            value = value_of((rank >> 32).to(tl.int32), UNUSED)
            masses += tl.where(taken, tl.exp2((value - top) * scale), 0.0)
        count, mass = tl.sum(counts, 0), tl.sum(masses, 0)
    else:
        BLOCK: tl.constexpr = 8 * LANE
        all_counts, all_masses = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
        edge, last = value_of((threshold >> 32).to(tl.int32), UNUSED), entry_of(threshold)
        for start in tl.range(0, VOCAB, BLOCK, num_stages=4):
            entry = start + tl.arange(0, BLOCK)
            value = tl.load(logits + entry, entry < VOCAB, float("-inf")).to(tl.float32)
            taken = from_rank(value, entry, edge, last)
            all_counts += taken.to(tl.int32)
            all_masses += tl.where(taken, tl.exp2((value - top) * scale), 0.0)
        count, mass = tl.sum(all_counts, 0), tl.sum(all_masses, 0)
    return count, mass


@triton.jit
def _draw_of_top_k(
    ranks,
    groups,
    largest,
    logits,
    top_k,
    top_p,
    floor,
    top,
    temperature,
    seed,
    position,
    VOCAB: tl.constexpr,
    LANE: tl.constexpr,
    UNUSED: tl.constexpr,
    CAPACITY: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Draw from the `top_k` best entries of a row that are not below `floor`, and of these from the top-p."""
    end = rank_of(top, top_k * 0, UNUSED) + 1  # above all
    cut = first_rank(_cut(largest, top_k, floor, top, temperature), UNUSED)
    size = _fill(ranks, groups, largest, logits, cut, end, VOCAB, LANE, UNUSED, CAPACITY, GROUPS)
    # The list has what is from `cut` on, and below what `above` and `mass_above` are number and mass of.
    listed = size <= CAPACITY
    above, mass_above = size * 0, top * 0.0
    low, low_count = cut, size
    # First by number, then by mass: each narrows what the one before it left.
    for by_mass in range(2):
        active = top_k < low_count
        wanted_count, wanted_mass = top_k, top * 0.0
        if by_mass == 1:
            active = top_p < 1
            if active:
                low_count, total = _weigh(
                    ranks, size, listed & (low >= cut), logits, low, top, temperature, VOCAB, LANE, UNUSED
                )
                wanted_count, wanted_mass = size * 0, top_p * total
        # [low, high) holds the lowest rank that stays, until one entry is left of it.
        high, high_count, high_mass = end, size * 0, top * 0.0
        tries = 0
        while active & (low_count > tl.maximum(wanted_count, high_count + 1)):
            if (listed == 0) & (low_count - high_count <= CAPACITY):
                size = _fill(ranks, groups, largest, logits, low, high, VOCAB, LANE, UNUSED, CAPACITY, GROUPS)
                listed, cut, above, mass_above = size <= CAPACITY, low, high_count, high_mass
            middle = _middle(low, high, top, temperature, tries, VOCAB, UNUSED)
            middle = tl.where(listed & (low < cut), cut, middle)
            count, mass = _weigh(ranks, size, listed, logits, middle, top, temperature, VOCAB, LANE, UNUSED)
            if listed:
                count, mass = count + above, mass + mass_above
            if (count >= wanted_count) & (mass >= wanted_mass):
                low, low_count = middle, count
            else:
                high, high_count, high_mass = middle, count, mass
            listed = listed & (high > cut)
            tries += 1
        listed = listed & (above == 0)
    best = tl.full((LANE,), NOTHING, tl.int64)
    if listed & (low >= cut):  # and all that stay are in it
        for start in tl.range(0, size, LANE, num_stages=1):
            at = start + tl.arange(0, LANE)
            rank = tl.load(ranks + at, at < size, NOTHING)
            entry = entry_of(rank)
            value = value_of((rank >> 32).to(tl.int32), UNUSED)
            score = value / temperature + gumbel_of(seed, position, entry, LANE)
            best = tl.maximum(best, tl.where(rank >= low, rank_of(score, entry), NOTHING))
    else:
        edge, last = value_of((low >> 32).to(tl.int32), UNUSED), entry_of(low)
        for block in range(0, tl.cdiv(VOCAB, 4 * LANE)):
            scores = best_of_block(logits, block, edge, last, temperature, seed, position, VOCAB, LANE)
            best = tl.maximum(best, scores)
    return token_of(tl.max(best, 0))


@triton.jit
def filter_kernel(
    tokens,
    newest,
    sent,
    places,
    lists,
    group_lists,
    group_largest,
    block_best,
    logits,
    rows,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    VOCAB: tl.constexpr,
    LANE: tl.constexpr,
    UNUSED: tl.constexpr,
    CAPACITY: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    DELIVERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one row. Draws where the row has a filter, and a token: it says that the logits are finite.

    newest, sent, places: see `deliver`, if DELIVERS, for rows with a filter.
    lists: [m, CAPACITY] int64 and group_lists: [m, NUM_GROUPS] int32 are scratch; group_largest:
    [m, NUM_GROUPS] float32, see `store_largest`; block_best: [m, NUM_BLOCKS] int64, the rank of the best
    score of every 4 * LANE entries, of rows without top-k. GROUPS, BLOCKS: the powers of two that they fit.
    """
    follow(PDL)
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row).to(tl.int32)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    token = tl.load(tokens + i)
    filtered = is_filtered(temperature, top_k, top_p, min_p)
    if (token >= 0) & filtered:
        logits += i * VOCAB
        group = tl.arange(0, GROUPS)
        largest = tl.load(group_largest + i * NUM_GROUPS + group, group < NUM_GROUPS, float("-inf"))
        top = tl.max(largest, 0)
        # log(0) = -inf keeps all that is finite.
        floor = tl.maximum(top + temperature * tl.log(min_p), -3.4028234663852886e38)
        seed, position = tl.load(seeds + row), tl.load(positions + i)
        if top_k > 0:
            token = _draw_of_top_k(
                lists + i * CAPACITY,
                group_lists + i * NUM_GROUPS,
                largest,
                logits,
                top_k,
                top_p,
                floor,
                top,
                temperature,
                seed,
                position,
                VOCAB,
                LANE,
                UNUSED,
                CAPACITY,
                GROUPS,
            )
        else:
            block = tl.arange(0, BLOCKS)
            best = tl.load(block_best + i * NUM_BLOCKS + block, block < NUM_BLOCKS, NOTHING)
            token = draw_by_rejection(
                best, logits, top_p, floor, top, temperature, seed, position, VOCAB, LANE, BLOCKS
            )
        tl.store(tokens + i, token)
    if DELIVERS:  # noqa: SIM102 (known as the kernel is compiled)
        if filtered:
            deliver(newest, sent, places, i, row, token)
