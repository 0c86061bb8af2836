"""The fused GPU operators against plain torch in float32; interpreted where there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from triton_interpreter import DEVICE  # isort: skip  (first, as it chooses how kernels run)

import triton
import triton.language as tl

from microvllm.ops.activation import gated_unit, silu_and_mul
from microvllm.ops.gpu import sampling
from microvllm.ops.gpu.bitmask import apply_bitmask
from microvllm.ops.gpu.gumbel import gumbel_block
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.gpu.sampling import Delivery, TokenSampler
from microvllm.ops.gpu.skinny import MAX_SPLIT_TILES, skinny_linear
from microvllm.ops.gpu.tiling import MAX_SKINNY_ROWS, Tiling, prefers_gemv
from microvllm.ops.norm import norm_heads, norm_parts, rms_norm

# Relative error of a result that is rounded once, after sums in float32. (The interpreter's product of
# matrices takes bfloat16 for integers.)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|a - b| / |b|; NaN is infinite."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return math.inf if math.isnan(error) else error


@pytest.fixture(params=DTYPES if DEVICE.type == "cuda" else DTYPES[:1], ids=str)
def ops(request: pytest.FixtureRequest) -> GpuOperators:
    return GpuOperators(request.param, DEVICE, "triton")


# ---- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 5, 33])
def test_a_skinny_product(rows: int, fused: bool, gated: bool, dtype: torch.dtype) -> None:
    """Sizes that are no multiple of a tile's; fused: with norm, bias and residual."""
    n, k = 13, 88
    x, weight = random(rows, k, seed=1, dtype=dtype), random(2 * n if gated else n, k, seed=2, dtype=dtype)
    gemv = prefers_gemv(rows, n, k, gated=gated)
    tiling = Tiling(4, 32, 4) if gemv else Tiling(16, 32, 4, 2, splits=2 if fused else 1)
    arrivals = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)
    bias = norm = residual = None
    reference = x.float()
    if fused:
        bias, norm = random(weight.shape[0], seed=3, dtype=dtype), random(k, seed=4, dtype=dtype)
        residual = random(rows, n, seed=5, dtype=dtype)
        reference = rms_norm(reference, norm.float(), 1e-3)
    reference = linear(reference, weight.float(), None if bias is None else bias.float())
    reference = silu_and_mul(reference) if gated else reference
    reference = reference if residual is None else reference + residual.float()
    y = skinny_linear(
        x, weight, arrivals, bias, norm=norm, eps=1e-3, residual=residual, gated=gated, tiling=tiling
    )
    assert not arrivals.any()
    assert y.dtype == dtype and y.shape == (rows, n)
    assert relative_error(y, reference) < TOLERANCE[dtype]


@pytest.mark.parametrize("eps", [(1e-2, 1e-2), (1e-2, 1e-5)])
def test_norms_of_parts_of_rows(ops: GpuOperators, eps: tuple[float, float]) -> None:
    dtype = ops.activation_dtype
    x = random(3, 100, seed=1, dtype=dtype)
    weights = random(48, seed=2, dtype=dtype), random(20, seed=3, dtype=dtype)
    expected = x.float().clone()
    norm_parts(expected, [(w.float(), e) for w, e in zip(weights, eps, strict=True)], rms_norm)
    found = ops.norm_parts(x.clone(), list(zip(weights, eps, strict=True)))
    assert relative_error(found, expected) < TOLERANCE[dtype]
    assert torch.equal(found[:, 68:], x[:, 68:])


def test_gelu_of_one_half_times_the_other(ops: GpuOperators) -> None:
    """Of gates large enough for either end, behind a product with the identity."""
    x = random(3, 60, seed=1, dtype=ops.activation_dtype) * 20
    inner = ops.mlp_input(None, torch.eye(60, dtype=x.dtype, device=DEVICE), None, "gelu_tanh", True)
    expected = gated_unit(x.float(), "gelu_tanh")
    assert relative_error(inner(x), expected) < TOLERANCE[x.dtype]


def test_norms_of_single_heads(ops: GpuOperators) -> None:
    x, weight = random(3, 120, seed=1, dtype=ops.activation_dtype), random(5, 24, seed=2)
    expected = norm_heads(x.float(), weight, 1e-3)
    assert relative_error(ops.norm_heads(x.clone(), weight, 1e-3), expected) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("rows", [1, 2, 6, MAX_SKINNY_ROWS + 1])
def test_what_a_decoder_calls(ops: GpuOperators, rows: int) -> None:
    """Whichever way a number of rows goes, with the tilings that are chosen for it."""
    dtype, hidden, width = ops.activation_dtype, 40, 24
    tolerance = TOLERANCE[dtype]
    x, norm = random(rows, hidden, seed=1, dtype=dtype), random(hidden, seed=2, dtype=dtype)
    up, down = random(2 * width, hidden, seed=3, dtype=dtype) / 9, random(hidden, width, seed=4, dtype=dtype)
    bias = random(2 * width, seed=5, dtype=dtype)
    before = x.clone()
    normed = rms_norm(x.float(), norm.float(), 1e-5)
    plain = linear(normed, up.float(), bias.float())
    assert relative_error(ops.norm_linear(norm, 1e-5, up, bias)(x), plain) < tolerance
    act = ops.norm_gate_up(norm, 1e-5, up)(x)
    assert relative_error(act, silu_and_mul(linear(normed, up.float()))) < tolerance
    assert torch.equal(x, before)
    for offset in (None, random(hidden, seed=6, dtype=dtype)):
        product = linear(act.float(), down.float(), None if offset is None else offset.float())
        assert relative_error(ops.linear(down, offset)(act), product) < tolerance
        y = ops.linear(down, offset)(act, x.clone())
        assert relative_error(y, product + x.float()) < tolerance


def test_no_rows_and_embedding_rows(ops: GpuOperators) -> None:
    table = random(11, 24, dtype=ops.activation_dtype)
    gather = ops.embedding(table)
    for dtype in (torch.int64, torch.int32):
        ids = torch.tensor([10, 0, 3, 3], dtype=dtype, device=DEVICE)
        assert torch.equal(gather(ids), table[[10, 0, 3, 3]])
    assert gather(torch.empty(0, dtype=torch.int64, device=DEVICE)).shape == (0, 24)
    assert ops.norm_gate_up(table[0], 1e-5, table[:6])(table[:0]).shape == (0, 3)


def test_a_bitmask_takes_tokens_out() -> None:
    """Of some rows, of a vocabulary that ends within a word."""
    vocab, at = 70 * 32 + 5, torch.tensor([3, 0], device=DEVICE)
    allowed = random(2, vocab, seed=1) > 0
    padded = torch.zeros(2, 71 * 32, dtype=torch.int64, device=DEVICE)
    padded[:, :vocab] = allowed
    powers = 2 ** torch.arange(32, dtype=torch.int64, device=DEVICE)
    words = (padded.view(2, 71, 32) * powers).sum(-1).to(torch.int32)
    logits = random(4, vocab, seed=2)
    expected = logits.clone()
    expected[at] = expected[at].masked_fill(~allowed, -torch.inf)
    apply_bitmask(logits, words, at)
    assert torch.equal(logits, expected)


# ---- sampling -------------------------------------------------------------------------------------


def sample(
    logits: Tensor,
    temperature: float | list[float],
    *,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    seed: int = 11,
    position: int = 0,
    filters: bool = False,
    sampler: TokenSampler | None = None,
    delivery: Delivery | None = None,
) -> list[int]:
    m = len(logits)

    def table(value: object, dtype: torch.dtype) -> Tensor:
        # Parameters lie at rows[i], in falling order: nothing may take i for the row.
        values = value if isinstance(value, list) else [value] * m
        return torch.tensor([*values, 77][::-1], dtype=dtype, device=DEVICE)

    return (sampler or TokenSampler(m, DEVICE))(
        logits,
        torch.arange(m, 0, -1, device=DEVICE),
        torch.full((m,), position, device=DEVICE) + torch.arange(m, device=DEVICE),
        temperature=table(temperature, torch.float32),
        top_k=table(top_k, torch.int32),
        top_p=table(top_p, torch.float32),
        min_p=table(min_p, torch.float32),
        seed=table(seed, torch.int64),
        filters=filters,
        delivery=delivery,
    ).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("filters", [False, True])
def test_greedy_is_the_lowest_id_of_the_largest(dtype: torch.dtype, filters: bool) -> None:
    logits = random(5, 4100, dtype=dtype)
    logits[0, [4099, 4096]] = 9.0  # of two equal ones
    logits[1, 1024] = 9.0
    logits[2, :] = -torch.inf  # nothing to choose from
    logits[3, 77] = torch.nan
    logits[4, 3] = torch.inf
    sampler = TokenSampler(8, DEVICE)
    for _ in range(2):  # and again: the first call left nothing behind
        tokens = sample(logits, 0.0, filters=filters, sampler=sampler)
        assert tokens == [4096, 1024, -1, -1, -1]


@pytest.mark.parametrize("filters", [False, True])
def test_tokens_are_delivered_to_rows_and_to_the_host(filters: bool) -> None:
    """Rows lie in falling order (see `sample`); one is padding, one has no token, one is filtered."""
    logits = random(4, 4100)
    logits[1] = -torch.inf
    newest = torch.full((6,), -7, device=DEVICE)
    sent = torch.full((9,), -7, pin_memory=DEVICE.type == "cuda")
    places = torch.tensor([2, 3, -1, 8], dtype=torch.int32, device=DEVICE)
    tokens = sample(
        logits,
        [0.0, 0.0, 0.9, 0.9],
        top_k=[0, 0, 0, 5 if filters else 0],
        filters=filters,
        delivery=Delivery(newest, sent, places),
    )
    assert tokens[:2] == [int(logits[0].argmax()), -1]
    assert newest.tolist() == [-7, tokens[3], tokens[2], 0, tokens[0], -7]
    assert sent.tolist() == [-7, -7, tokens[0], -1, -7, -7, -7, -7, tokens[3]]


@triton.jit
def _store_numbers(out, seed, position, block, LANE: tl.constexpr):
    numbers = gumbel_block(tl.load(seed), tl.load(position), block, LANE)
    for w in tl.static_range(4):
        tl.store(out + w * LANE + tl.arange(0, LANE), numbers[w])


def numbers_of(seed: int, position: int, count: int) -> Tensor:
    """The Gumbel numbers of the first entries of a vocabulary: [count] float32."""
    blocks = -(-count // 4096)
    out = torch.empty(blocks, 4096, device=DEVICE)
    where = [torch.tensor([number], device=DEVICE) for number in (seed, position)]
    for block in range(blocks):
        _store_numbers[(1,)](out[block], *where, block, LANE=1024)
    return out.view(-1)[:count]


def test_the_numbers_are_independent_standard_gumbel_numbers() -> None:
    """By Kolmogorov and Smirnov, at a level of 10^-6, and by their correlations."""
    same = numbers_of(5, 9, 8192).double().cpu()
    uniform = (-(-same).exp()).exp().sort().values
    steps = torch.arange(1, 8193) / 8192
    assert float(torch.maximum(steps - uniform, uniform - steps + 1 / 8192).max()) < 2.7 / 8192**0.5
    for seed, position in ((5, 10), (6, 9), (5 + (1 << 40), 9), (5, 9 + (1 << 35))):
        other = numbers_of(seed, position, 8192).double().cpu()
        assert abs(float(torch.corrcoef(torch.stack((same, other)))[0, 1])) < 0.06
    for shift in (1, 1024, 4096):
        assert abs(float(torch.corrcoef(torch.stack((same[:-shift], same[shift:])))[0, 1])) < 0.08


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    logits = random(3, 6000)
    for seed, position in ((11, 7), (-(1 << 62), 1 << 40)):
        tokens = sample(logits, [0.0, 0.7, 1.3], seed=seed, position=position)
        expected = [int(logits[0].argmax())]
        for i, temperature in ((1, 0.7), (2, 1.3)):
            numbers = numbers_of(seed, position + i, 6000)
            expected.append(int((logits[i] / temperature + numbers).argmax()))
        assert tokens == expected


def kept(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """[vocab] bool, by the definition: sorted, equal ones by id."""
    scaled = row.double().cpu() / temperature
    if min_p:
        scaled[scaled < scaled.max() + math.log(min_p)] = -math.inf
    values, ids = scaled.sort(descending=True, stable=True)
    if top_k:
        values[top_k:] = -math.inf
    probs = values.softmax(-1)
    stays = torch.zeros(len(row), dtype=torch.bool)
    stays[ids] = (probs.cumsum(-1) - probs < top_p) & (probs > 0)
    return stays


def check_draws(logits: Tensor, temperature: float, wishes: list[tuple[int, float, float]]) -> None:
    """Each row's token is the best of those kept, by the numbers that decide without a filter, too."""
    top_k, top_p, min_p = (list(column) for column in zip(*wishes, strict=True))
    tokens = sample(logits, temperature, top_k=top_k, top_p=top_p, min_p=min_p, filters=True)
    for i, (token, wish) in enumerate(zip(tokens, wishes, strict=True)):
        row = logits[i].float()
        scores = (row / temperature + numbers_of(11, i, len(row))).cpu()
        stays = kept(row, temperature, *wish)
        assert token == int(scores.masked_fill(~stays, -math.inf).argmax()), (i, wish)


FILTERS = [
    (7, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (5000, 0.6, 0.0),
    (0, 0.01, 0.0),
    (0, 1.0, 0.2),
    (9, 0.8, 0.05),
]


@pytest.mark.parametrize("rounded", [False, True])
def test_filters_keep_what_they_should(rounded: bool) -> None:
    logits = random(len(FILTERS), 300, seed=5) * 2
    logits = logits.round() if rounded else logits  # then many are equal
    logits[0, 5:] = -torch.inf  # fewer than top-k are left
    check_draws(logits, 1.5, FILTERS)


# More stays than a list holds; a list is too short for the mass; there are fewer groups than the top-k.
WIDE = [(20, 0.95, 0.0), (0, 0.9, 0.0), (700, 0.5, 1e-6), (1199, 0.7, 0.0), (0, 1.0, 0.01)]
BRIEF = [(0, 0.9, 0.0), (300, 0.8, 0.0)]


@pytest.mark.parametrize(
    "dtype, ways", [(torch.float32, WIDE), (torch.bfloat16, BRIEF), (torch.float16, BRIEF)], ids=str
)
def test_filters_of_more_than_a_list_holds(
    dtype: torch.dtype, ways: list[tuple[int, float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CAPACITY", 64)
    logits = random(1, 1201, seed=7).repeat(len(ways), 1) * 3
    logits[1, 17] = -torch.inf
    check_draws(logits.to(dtype), 1.1, ways)


@pytest.mark.parametrize("spread", [0.05, 1.5])
def test_a_top_p_without_top_k_over_several_blocks(spread: float) -> None:
    """The less of the mass is inside, the more draws are rejected; of equal entries the lower ids stay."""
    ways = [(0, top_p, min_p) for top_p in (0.9, 0.5, 0.1, 0.002) for min_p in (0.0, 0.6)] * 2
    logits = random(len(ways), 9000, seed=3) * spread
    logits[len(ways) // 2 :] = (logits[len(ways) // 2 :] * 4).round() / 4
    check_draws(logits, 0.9, ways)


def test_filters_of_rows_with_little_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CAPACITY", 64)
    logits = random(8, 300) * 2
    logits[0] = -torch.inf
    logits[1, 299] = torch.nan
    logits[2, 9] = torch.inf
    logits[3:5] = -torch.inf
    logits[3, 298] = -2.0  # one is finite
    logits[4, [5, 290]] = torch.tensor([-0.0, 0.0], device=DEVICE)  # equal: the lower id is first
    logits[5] = -1e30  # all are equal
    temperature, top_k = [1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 0.01, 1e30], [5, 5, 5, 5, 1, 5, 50, 8]
    tokens = sample(logits, temperature, top_k=top_k, top_p=[0.9] * 7 + [0.5], filters=True)
    assert tokens[:5] == [-1, -1, -1, 298, 5]
    assert 0 <= tokens[5] < 5
    assert tokens[6] == int(logits[6].argmax())  # at so low a temperature
    assert tokens[7] in logits[7].topk(4).indices  # half of the mass of eight that are alike


def test_more_rows_than_the_sampler_has_are_refused() -> None:
    table = torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match="3 rows"):
        TokenSampler(2, DEVICE)(
            torch.zeros(3, 8, device=DEVICE),
            torch.zeros(3, dtype=torch.int64, device=DEVICE),
            torch.zeros(3, dtype=torch.int64, device=DEVICE),
            temperature=table, top_k=table, top_p=table, min_p=table, seed=table, filters=False,
        )  # fmt: skip
