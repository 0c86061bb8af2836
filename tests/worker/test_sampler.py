"""The sampler draws from exactly the distribution that its parameters describe, in any batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microvllm.ops.sampling import uniform_numbers
from microvllm.runtime.core.plan import NO_TOKEN
from microvllm.runtime.request import MIN_TEMPERATURE, EngineRequest, SamplingParams
from microvllm.runtime.worker.sampler import Sampler

NO_MASK: list[tuple[int, list[int]]] = []
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -4.0])[
    torch.tensor([3, 7, 0, 9, 5, 1, 8, 2, 6, 4])
]


def bind(sampler: Sampler, row: int, params: SamplingParams) -> None:
    sampler.set_row(row, EngineRequest(row, [0], params), [0], 1)


def choose(
    sampler: Sampler,
    logits: torch.Tensor,
    rows: Sequence[int],
    positions: Sequence[int],
    masked: Sequence[tuple[int, list[int]]] = NO_MASK,
) -> list[int]:
    newest = torch.zeros(len(rows), dtype=torch.int64)
    sampled = sampler.sample(logits.clone(), rows, positions, masked, lambda i: ([], False), newest)
    tokens: list[int] = sampled.tokens.tolist()
    return tokens


def draw(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int] | None = None,
    masked: Sequence[tuple[int, list[int]]] = NO_MASK,
) -> list[int]:
    """One token for each row of logits, request i on row i."""
    sampler = Sampler(len(params), logits.shape[1], seed=0)
    for row, one in enumerate(params):
        bind(sampler, row, one)
    return choose(sampler, logits, range(len(params)), positions or [0] * len(params), masked)


def exact(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """The probabilities by definition, in float64, one token at a time."""
    p = np.exp(logits.double().numpy() / params.temperature)
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0.0
    by_rank = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[by_rank[params.top_k :]] = 0.0
    p /= p.sum()
    kept, mass = [], 0.0
    for token in by_rank:
        if mass >= params.top_p and kept:
            break
        kept.append(token)
        mass += p[token]
    result = np.zeros_like(p)
    result[kept] = p[kept]
    return result / result.sum()


def assert_distributed(tokens: Sequence[int], probabilities: np.ndarray) -> None:
    """Chi-square at five sigmas; what has no probability must not occur at all."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    seen = probabilities * len(tokens) >= 5
    expected = probabilities[seen] * len(tokens)
    rest = probabilities[~seen].sum() * len(tokens)
    statistic = ((counts[seen] - expected) ** 2 / expected).sum()
    degrees = seen.sum() - 1
    if rest >= 5:
        statistic += (counts[~seen].sum() - rest) ** 2 / rest
        degrees += 1
    # Wilson and Hilferty (1931): the cube root of chi-square / degrees is nearly normal.
    if degrees:
        deviation = ((statistic / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / np.sqrt(2 / (9 * degrees))
        assert deviation < 5, f"chi-square {statistic:.1f} at {degrees} degrees of freedom"
    else:
        assert counts[seen].sum() == len(tokens)


# ---- distributions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 10},
        {"top_k": 1000},
        {"top_k": -1},
        {"top_p": 0.5},
        {"top_p": 0.9, "temperature": 1.7},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"min_p": 0.05, "top_p": 0.8, "temperature": 1.3},
        {"top_k": 5, "top_p": 0.7},
        {"top_k": 6, "min_p": 0.1, "top_p": 0.95, "temperature": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("by", ["seed", "position"])
def test_draws_follow_the_exact_distribution(options: dict[str, float], by: str) -> None:
    """8,000 draws over as many seeds at one position, and over as many positions of one seed."""
    count = 8_000
    seeds = range(count) if by == "seed" else itertools.repeat(1234)
    params = [SamplingParams(seed=seed, **options) for seed in itertools.islice(seeds, count)]  # type: ignore[arg-type]
    positions = [7] * count if by == "seed" else list(range(count))
    tokens = draw(LOGITS.repeat(count, 1), params, positions)
    assert_distributed(tokens, exact(LOGITS, params[0]))


def test_unseeded_requests_differ_and_follow_the_distribution() -> None:
    count = 8_000
    tokens = draw(LOGITS.repeat(count, 1), [SamplingParams()] * count)
    assert_distributed(tokens, exact(LOGITS, SamplingParams()))


def test_a_nucleus_larger_than_the_shortcut() -> None:
    """1000 nearly equal tokens: the first 256 candidates hold far less than top_p."""
    vocab, count = 1000, 5_000
    logits = torch.linspace(0.0, -0.5, vocab)[
        torch.randperm(vocab, generator=torch.Generator().manual_seed(1))
    ]
    params = [SamplingParams(seed=seed, top_p=0.6) for seed in range(count)]
    probabilities = exact(logits, params[0])
    kept = int((probabilities > 0).sum())
    assert kept > 500
    # float32 may put the border of the nucleus one token off.
    tokens = draw(logits.repeat(count, 1), params)
    allowed = set(np.argsort(-probabilities)[:kept].tolist())
    border = torch.argsort(logits, descending=True)[kept].item()
    assert set(tokens) <= allowed | {border}
    by_rank = np.argsort(-probabilities)
    ranks = np.argsort(by_rank)[tokens]
    edges = [probabilities[by_rank[start : start + 100]].sum() for start in range(0, vocab, 100)]
    assert_distributed([min(rank // 100, (kept - 1) // 100) for rank in ranks], np.array(edges))


def test_top_k_larger_than_the_shortcut() -> None:
    vocab, count = 700, 5_000
    logits = torch.linspace(0.0, -0.3, vocab)
    tokens = draw(logits.repeat(count, 1), [SamplingParams(seed=seed, top_k=500) for seed in range(count)])
    assert max(tokens) < 500 and len(set(tokens)) > 480
    edges = exact(logits, SamplingParams(top_k=500)).reshape(-1, 50).sum(1)
    assert_distributed([token // 50 for token in tokens], edges)


# ---- greedy, and what must equal it ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": 9e-6}, {"top_p": 1e-12}, {"top_k": 1}, {"min_p": 1.0}],
    ids=str,
)
def test_narrow_settings_are_greedy(options: dict[str, float]) -> None:
    logits = torch.randn(500, 3000, generator=torch.Generator().manual_seed(5)) * 3
    params = [SamplingParams(seed=seed, **options) for seed in range(500)]  # type: ignore[arg-type]
    assert draw(logits, params) == logits.argmax(-1).tolist()


def test_greedy_ignores_the_other_parameters() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5]])
    assert draw(logits, [SamplingParams(temperature=0.0, top_k=2, top_p=0.1, min_p=0.5, seed=3)]) == [1]


def test_temperatures_at_their_bounds() -> None:
    count = 8_000
    small = torch.tensor([0.0, -0.01, -0.02])
    # Positive temperatures below the least one count as the least one.
    params = [SamplingParams(seed=seed, temperature=1e-4) for seed in range(count)]
    tokens = draw(small.repeat(count, 1), params)
    assert_distributed(tokens, exact(small, SamplingParams(temperature=MIN_TEMPERATURE)))
    hot = [SamplingParams(seed=seed, temperature=2.0) for seed in range(count)]
    assert_distributed(draw(LOGITS.repeat(count, 1), hot), exact(LOGITS, hot[0]))
    # Large logits over a small temperature overflow nothing.
    large = torch.tensor([[3e4, -3e4, 2.9e4]])
    assert draw(large, [SamplingParams(seed=1, temperature=MIN_TEMPERATURE)]) == [0]


# ---- the same in any batch ------------------------------------------------------------------------

some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 300]),
    top_p=st.sampled_from([1e-12, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@settings(max_examples=40)
@given(params=st.lists(some_params, min_size=2, max_size=12), data=st.integers(0, 2**32))
def test_a_seeded_request_draws_the_same_in_any_batch(params: list[SamplingParams], data: int) -> None:
    logits = torch.randn(len(params), 400, generator=torch.Generator().manual_seed(data)) * 2
    positions = [(data + 17 * i) % 4096 for i in range(len(params))]
    together = draw(logits, params, positions)
    for index, one in enumerate(params):
        assert draw(logits[index : index + 1], [one], positions[index : index + 1]) == [together[index]]


@pytest.mark.parametrize("options", [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 7, "top_p": 0.8}], ids=str)
def test_equal_logits_do_not_make_a_draw_depend_on_its_company(options: dict[str, Any]) -> None:
    """bfloat16 has 8 bits: among 3000 logits most have equals, also at the border of what is kept."""
    company = SamplingParams(seed=1, top_k=600)
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(1, 3000, generator=generator) * 2).bfloat16().float()
        one = SamplingParams(seed=seed, **options)
        assert draw(logits, [one]) == draw(logits.repeat(2, 1), [one, company])[:1]


def test_of_equal_logits_the_first_are_kept() -> None:
    count = 3_000
    logits = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 2.0, 1.0] + [-1.0] * 500)
    tokens = draw(logits.repeat(count, 1), [SamplingParams(seed=seed, top_k=4) for seed in range(count)])
    assert set(tokens) == {2, 5, 0, 3}
    assert_distributed(tokens, exact(logits, SamplingParams(top_k=4)))


def test_rows_are_independent_of_their_number_and_their_past() -> None:
    """The same request on another row, after others used and left it."""
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(2))
    wish = SamplingParams(seed=99, top_p=0.9)
    sampler = Sampler(4, 300, seed=0)
    drawn = []
    for row in range(4):
        bind(sampler, row, SamplingParams(seed=row, top_k=2, min_p=0.3, temperature=0.4))
        sampler.clear_row(row)
        bind(sampler, row, wish)
        drawn += choose(sampler, logits, [row], [31])
    assert len(set(drawn)) == 1
    sampler.clear_row(2)
    cleared = choose(sampler, logits, [2], [31])
    assert cleared == logits.argmax(-1).tolist()


def test_the_engine_seed_decides_what_unseeded_requests_draw() -> None:
    logits = torch.zeros(50, 1000)

    def tokens(seed: int) -> list[int]:
        sampler = Sampler(50, 1000, seed)
        for row in range(50):
            bind(sampler, row, SamplingParams())
        return choose(sampler, logits, range(50), [0] * 50)

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(-1) == tokens(-1) != tokens(1)


# ---- rows that are broken, and masks --------------------------------------------------------------

BROKEN = {
    "nan everywhere": torch.full((10,), torch.nan),
    "one nan": LOGITS.clone().index_fill_(0, torch.tensor([4]), torch.nan),
    "all -inf": torch.full((10,), -torch.inf),
    "one +inf": LOGITS.clone().index_fill_(0, torch.tensor([4]), torch.inf),
}


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("row", BROKEN)
def test_a_broken_row_has_no_token_and_harms_no_other(row: str, options: dict[str, float]) -> None:
    one = SamplingParams(seed=5, **options)  # type: ignore[arg-type]
    other = SamplingParams(seed=6, top_p=0.8)
    alone = draw(LOGITS[None], [other])
    assert draw(BROKEN[row][None], [one]) == [NO_TOKEN]
    assert draw(torch.stack([LOGITS, BROKEN[row], LOGITS]), [other, one, other]) == [*alone, NO_TOKEN, *alone]


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((2000, 50), -torch.inf)
    logits[:, 20] = logits[:, 30] = 0.0
    for options in ({}, {"top_k": 40}, {"top_p": 0.99999}, {"top_k": 10, "top_p": 1.0}):
        params = [SamplingParams(seed=seed, **options) for seed in range(2000)]  # type: ignore[arg-type]
        assert set(draw(logits, params)) == {20, 30}


def test_masked_tokens_are_not_drawn_and_the_others_keep_their_proportions() -> None:
    count = 8_000
    best = int(LOGITS.argmax())
    masked = [(index, [best, 0]) for index in range(count)]
    tokens = draw(LOGITS.repeat(count, 1), [SamplingParams(seed=s) for s in range(count)], masked=masked)
    without = LOGITS.clone()
    without[[best, 0]] = -torch.inf
    assert_distributed(tokens, exact(without, SamplingParams()))
    assert draw(LOGITS[None], [SamplingParams(temperature=0.0)], masked=[(0, [best])]) != [best]
    assert draw(LOGITS[None], [SamplingParams(temperature=0.0)], masked=[(0, [])]) == [best]
    everything = [(0, list(range(10)))]
    assert draw(LOGITS[None], [SamplingParams(seed=1)], masked=everything) == [NO_TOKEN]


# ---- random numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["seed", "position", "both"])
def test_numbers_are_uniform_and_uncorrelated(by: str) -> None:
    count = 1 << 17
    steps = np.arange(count)
    seeds = (steps if by != "position" else np.full(count, 42)).astype(np.uint64)
    positions = steps if by != "seed" else np.full(count, 3)
    numbers = uniform_numbers(seeds, positions)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert_distributed((numbers * 64).astype(int).tolist(), np.full(64, 1 / 64))
    # Neighbours: pairs fill the square, and the difference of successive numbers has no favourite.
    pairs = (numbers[:-1] * 16).astype(int) * 16 + (numbers[1:] * 16).astype(int)
    assert_distributed(pairs[::2].tolist(), np.full(256, 1 / 256))
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / np.sqrt(count)


def test_numbers_depend_on_seed_and_position_only() -> None:
    seeds = np.array([0, 1, 2**64 - 1, 12345], dtype=np.uint64)
    positions = np.array([0, 5, 2**31, 77])
    together = uniform_numbers(seeds, positions)
    alone = [uniform_numbers(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == alone
    assert len(set(together.tolist())) == 4


def test_no_seed_gives_the_numbers_of_another_one_position_later() -> None:
    """Adding to the seed what a position adds would only shift the numbers, were the seed not mixed first."""
    positions = np.arange(1000)
    later = uniform_numbers(np.zeros(1000, dtype=np.uint64), positions + 1)
    step = np.full(1000, 0x9E3779B97F4A7C15, dtype=np.uint64)
    assert not np.isin(uniform_numbers(step, positions), later).any()
    assert not np.isin(uniform_numbers(np.ones(1000, dtype=np.uint64), positions), later).any()
