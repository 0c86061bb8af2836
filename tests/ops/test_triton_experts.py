"""Mixtures of experts by the GPU's kernels against plain torch; interpreted where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_case import relative_error
from test_triton_coded import coded as codes
from torch import Tensor
from torch.nn.functional import linear, silu

from triton_interpreter import DEVICE  # isort: skip  (first, as it chooses how kernels run)

from microvllm.ops.activation import CLAMPED
from microvllm.ops.experts import NO_BIASES, ExpertBiases, ExpertWeights, route
from microvllm.ops.gpu.experts import FIXED_ORDER, TILINGS, GpuExperts, mxfp4_tiling
from microvllm.ops.gpu.grouped import GroupedTiling, GroupedWeight
from microvllm.ops.gpu.mxfp4 import UNPACK
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.gpu.routing import choose, route_few, sort_choices
from microvllm.ops.mxfp4 import MAGNITUDES, MAX_SCALE, Mxfp4Tensor, powers, scales_of, words_of
from microvllm.ops.mxfp4 import quantize as quantize_mxfp4
from microvllm.ops.norm import rms_norm
from microvllm.ops.operators import TorchOperators
from microvllm.ops.routing import Routing
from microvllm.ops.scaled import ScaledTensor, quantize

ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
HIDDEN, WIDTH = 72, 40

ROUTINGS = {
    "softmax": Routing(num_chosen=3),
    "not normalised": Routing(num_chosen=2, normalized=False),
    "sigmoid": Routing(num_chosen=4, sigmoid=True, scale=2.5),
    "added to the sum": Routing(num_chosen=3, sigmoid=True, smallest_sum=0.5),
    "groups": Routing(num_chosen=3, sigmoid=True, num_groups=4, num_chosen_groups=2),
    "all": Routing(num_chosen=12),
}
COUNT = 12


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_choice_of_experts(name: str, corrected: bool) -> None:
    """Corrected by what is added to scores, and by what weights are multiplied by."""
    logits, routing = random(33, COUNT, seed=1), ROUTINGS[name]
    correction, scales = (random(COUNT, seed=seed) if corrected else None for seed in (2, 3))
    weights, chosen = choose(logits, routing, correction, scales=scales)
    expected, numbers = route(logits, routing, correction, scales)
    assert torch.equal(chosen.long(), numbers) and relative_error(weights, expected) < 1e-5


@pytest.mark.parametrize("name", [name for name, routing in ROUTINGS.items() if routing.num_groups == 1])
@pytest.mark.parametrize("normed", [False, True])
def test_the_choice_of_few_tokens(name: str, normed: bool) -> None:
    x, router, routing = random(3, HIDDEN, seed=1), random(COUNT, HIDDEN, seed=2), ROUTINGS[name]
    norm = random(HIDDEN, seed=3) + 1 if normed else None
    correction, arrivals = random(COUNT, seed=4), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    scales = random(COUNT, seed=5) if normed else None
    weights, chosen = route_few(x, router, routing, correction, norm, 1e-3, arrivals, scales=scales)
    logits = (x if norm is None else rms_norm(x, norm, 1e-3)) @ router.t()
    expected, numbers = route(logits, routing, correction, scales)
    assert torch.equal(chosen.long(), numbers) and relative_error(weights, expected) < 1e-5
    assert not arrivals.any()


def test_of_equal_scores_the_first_experts_are_taken_and_none_twice() -> None:
    logits = torch.zeros(2, COUNT, device=DEVICE)
    logits[1, 5] = torch.nan
    weights, chosen = choose(logits, Routing(num_chosen=3), None)
    assert chosen[0].tolist() == [0, 1, 2] and weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert int(chosen.min()) >= 0 and int(chosen.max()) < COUNT


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 12, 3), (50, 12, 3), (300, 5, 2), (9, 40, 8)])
def test_choices_are_sorted_by_expert(tokens: int, experts: int, k: int, rows: int) -> None:
    """Some experts have none; each tile is a run of one expert's, and all runs together are all choices."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, max(2, experts - 2), generator=generator).topk(k).indices
    flat = chosen.flatten()
    found = sort_choices(chosen.int().to(DEVICE), experts, rows)
    assert found.order.tolist() == flat.argsort(stable=True).tolist()
    at = 0
    for expert, start, stop in zip(*(each.tolist() for each in found[1:]), strict=True):
        if start == stop:
            continue
        assert start == at and stop - start <= rows
        assert set(flat[found.order[start:stop].long().cpu()].tolist()) == {expert}
        at = stop
    assert at == tokens * k


def weights_of(count: int, dtype: torch.dtype, **options: Any) -> ExpertWeights:
    return ExpertWeights(
        random(count, HIDDEN, seed=1, dtype=dtype) * HIDDEN**-0.5,
        random(count * 2 * WIDTH, HIDDEN, seed=2, dtype=dtype) * HIDDEN**-0.5,
        random(count * HIDDEN, WIDTH, seed=3, dtype=dtype) * WIDTH**-0.5,
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fixed_order", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts(tokens: int, fixed_order: bool, dtype: torch.dtype) -> None:
    weights, routing = weights_of(COUNT, dtype), ROUTINGS["softmax"]
    norm = random(HIDDEN, seed=4, dtype=dtype), 1e-5
    x, residual = random(tokens, HIDDEN, seed=5, dtype=dtype), random(tokens, HIDDEN, seed=6, dtype=dtype)
    operators = GpuOperators(dtype, DEVICE, "triton", fixed_order)
    first, last = operators.experts(norm, weights, routing, "silu")
    assert isinstance(last, GpuExperts)
    # The router's logits in this dtype: rounded otherwise they might choose others.
    logits = operators.product(weights.router, norm=norm)(x).float().cpu()
    exact = ExpertWeights(*(each.float().cpu() for each in weights[:3]))
    normed, reference = TorchOperators(torch.float32).experts(
        (norm[0].float().cpu(), 1e-5), exact, routing, "silu"
    )
    reference._router = lambda _: logits  # type: ignore[attr-defined]
    expected = reference(normed(x.float().cpu()))
    assert relative_error(last(first(x)).float().cpu(), expected) < TOLERANCE[dtype]
    added = last(first(x), residual.clone()).float().cpu()
    assert relative_error(added, expected + residual.float().cpu()) < TOLERANCE[dtype]
    onto_itself = x.clone()
    total = last(first(onto_itself), onto_itself).float().cpu()
    assert relative_error(total, expected + x.float().cpu()) < TOLERANCE[dtype]
    assert last(x[:0]).shape == (0, HIDDEN)


def test_fewer_stages_where_there_is_less_shared_memory() -> None:
    """A100 and H200 as tuned; a card of 99 KB a program with two."""
    for tiling in (*TILINGS.values(), FIXED_ORDER):
        assert tiling.within(227 << 10, 2, 2) == tiling.within(163 << 10, 2, 2) == tiling
        small = tiling.within(99 << 10, 2, 2)
        assert 2 <= small.stages <= tiling.stages
        assert (2 * small.columns + small.rows) * small.block_k * 2 * small.stages <= 99 << 10


def coded(weight: Tensor, block: tuple[int, int]) -> ScaledTensor:
    codes, scales = quantize(weight.float(), block)
    return ScaledTensor.of(codes, scales, (block[0], block[1] or weight.shape[1]))


@pytest.mark.parametrize("block", [None, (1, 0), (8, 32), (1, 32)], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("boxes", [False, True])
def test_ways_of_a_product(boxes: bool, swapped: bool, block: tuple[int, int] | None) -> None:
    """Columns and terms that do not fill the tiles; a box reaches into the next expert's rows."""
    tiling = GroupedTiling(16, 64 if swapped else 32, 32, 4, 2, swapped, boxes)
    tokens, k, dtype, hidden = (
        9,
        3,
        torch.float16,
        80,
    )  # rows of codes that are multiples of 16 bytes, for TMA
    gate_up = random(COUNT * 2 * WIDTH, hidden, seed=2, dtype=dtype) * hidden**-0.5
    down = random(COUNT * hidden, 48, seed=3, dtype=dtype) * WIDTH**-0.5
    x = random(tokens, hidden, seed=5, dtype=dtype)
    scales, chosen = choose(random(tokens, COUNT, seed=6), Routing(num_chosen=k))
    choices = sort_choices(chosen, COUNT, tiling.rows)
    first: Tensor = gate_up if block is None else coded(gate_up, block)
    last: Tensor = down if block is None else coded(down, block)
    gate_up, down = (
        each.dequantized(torch.float32) if isinstance(each, ScaledTensor) else each.float()
        for each in (first, last)
    )
    inner = GroupedWeight(first, WIDTH, dtype, gated=True, boxes=True)(x, choices, k, tiling)
    rows = x.float()[(choices.order // k).long()]
    experts = chosen.flatten()[choices.order.long()].long()
    gate, up = gate_up.view(COUNT, 2, WIDTH, hidden)[experts].unbind(1)
    expected = silu(torch.einsum("nd,nid->ni", rows, gate)) * torch.einsum("nd,nid->ni", rows, up)
    assert relative_error(inner, expected) < TOLERANCE[dtype]
    inner = random(tokens * k, 48, seed=7, dtype=dtype)
    parts = GroupedWeight(last, hidden, dtype, boxes=True)(inner, choices, k, tiling, scales=scales)
    down = down.view(COUNT, hidden, 48)[experts]
    expected = (
        torch.einsum("ni,ndi->nd", inner.float(), down) * scales.flatten()[choices.order.long()][:, None]
    )
    assert relative_error(parts[choices.order.long()], expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("block", [(1, 0), (8, 32), (8, 24)], ids=str)
@pytest.mark.parametrize("tokens", [1, 20])
def test_experts_in_codes(tokens: int, block: tuple[int, int]) -> None:
    """Also in blocks that no tensor core's step divides."""
    weights, routing, dtype = weights_of(COUNT, torch.float32), ROUTINGS["softmax"], torch.float32
    packed = weights._replace(gate_up=coded(weights.gate_up, block), down=coded(weights.down, block))
    plain = weights._replace(gate_up=packed.gate_up.dequantized(dtype), down=packed.down.dequantized(dtype))
    x = random(tokens, HIDDEN, seed=5)
    _, ours = GpuOperators(dtype, DEVICE, "triton").experts(None, packed, routing, "silu")
    _, theirs = TorchOperators(dtype).experts(None, plain, routing, "silu")
    assert relative_error(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "gated", "bits", "group", "zeros"),
    [
        (1, "silu", 4, 32, True),
        (9, "gelu", 4, 1000, False),
        (3, "silu", 8, 32, False),
        (20, "silu", 4, 32, "offsets"),
        (3, "gelu", 8, 16, "offsets"),
    ],
)
def test_experts_in_words(tokens: int, gated: str, bits: int, group: int, zeros: bool | str) -> None:
    """Of 4 or 8 bits, with zero points, offsets or neither; columns that fill neither steps nor tiles."""
    hidden, width, dtype, routing = 80, 48, torch.float16, ROUTINGS["softmax"]
    gate_up = codes(COUNT * 2 * width, hidden, bits, group, zeros=zeros, seed=1)
    down = codes(COUNT * hidden, width, bits, group, zeros=zeros, seed=2)
    router = random(COUNT, hidden, seed=3) * hidden**-0.5
    packed = ExpertWeights(router, gate_up, down)
    plain = ExpertWeights(router, gate_up.dequantized(torch.float32), down.dequantized(torch.float32))
    x = random(tokens, hidden, seed=5, dtype=dtype)
    _, ours = GpuOperators(dtype, DEVICE, "triton").experts(
        None, packed._replace(router=router.to(dtype)), routing, gated
    )
    _, theirs = TorchOperators(torch.float32).experts(None, plain, routing, gated)
    theirs._router = lambda _: linear(x, router.to(dtype)).float()  # type: ignore[attr-defined]
    assert relative_error(ours(x), theirs(x.float())) < TOLERANCE[dtype]


def test_experts_whose_matrices_are_of_two_kinds() -> None:
    hidden, width, dtype, routing = 80, 48, torch.float32, ROUTINGS["softmax"]
    gate_up = random(COUNT * 2 * width, hidden, seed=1) * hidden**-0.5
    down = codes(COUNT * hidden, width, 4, 32, zeros=True, seed=2)
    packed = ExpertWeights(random(COUNT, hidden, seed=3), gate_up, down)
    x = random(3, hidden, seed=5)
    _, ours = GpuOperators(dtype, DEVICE, "triton").experts(None, packed, routing, "silu")
    _, theirs = TorchOperators(dtype).experts(
        None, packed._replace(down=down.dequantized(dtype)), routing, "silu"
    )
    assert relative_error(ours(x), theirs(x)) < 1e-5


def biases_of(rank: int = 0) -> ExpertBiases:
    gate_up, down = 3 * random(COUNT * 2 * WIDTH, seed=8), 3 * random(COUNT * HIDDEN, seed=9)
    return ExpertBiases(random(COUNT, seed=7), gate_up, None if rank else down)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("block", [None, (8, 32)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_biases_and_the_clamped_unit(tokens: int, block: tuple[int, int] | None, rank: int) -> None:
    """Of numbers on both sides of where it is cut off; only a first shard adds the last bias."""
    weights, dtype = weights_of(COUNT, torch.float32, biases=biases_of(rank)), torch.float32
    exact = weights
    if block is not None:
        weights = weights._replace(gate_up=coded(weights.gate_up, block), down=coded(weights.down, block))
        exact = weights._replace(
            gate_up=weights.gate_up.dequantized(dtype), down=weights.down.dequantized(dtype)
        )
    norm = random(HIDDEN, seed=4) * 5, 1e-5
    x, residual = random(tokens, HIDDEN, seed=5), random(tokens, HIDDEN, seed=6)
    first, last = GpuOperators(dtype, DEVICE, "triton").experts(norm, weights, ROUTINGS["softmax"], CLAMPED)
    normed, reference = TorchOperators(dtype).experts(norm, exact, ROUTINGS["softmax"], CLAMPED)
    expected = reference(normed(x), residual.clone())
    assert relative_error(last(first(x), residual.clone()), expected) < 1e-5
    if block is None:
        operators = GpuOperators(dtype, DEVICE, "triton", True)
        first, last = operators.experts(norm, weights, ROUTINGS["softmax"], CLAMPED)
        assert relative_error(last(first(x), residual.clone()), expected) < 1e-5


def in_mxfp4(weight: Tensor) -> Mxfp4Tensor:
    codes, scales = quantize_mxfp4(weight.float())
    return Mxfp4Tensor.of(words_of(codes), weight.shape[1], scales_of(scales))


def test_the_instructions_that_widen_mxfp4_to_bfloat16() -> None:
    """Computed here, as the interpreter has none: every code at every place, and every scale."""
    words = torch.tensor([0x76543210, -0x01234568], dtype=torch.int32)
    values = {"$8": int(words[0]) & 0xFFFFFFFF, "$9": int(words[1]) & 0xFFFFFFFF}
    for line in str(UNPACK.value).splitlines():
        name, *operands = (part.strip(",;") for part in line.split()[:6])
        if name not in ("prmt.b32", "shl.b32", "shr.b32", "and.b32", "or.b32"):
            assert name in ("{", "}")
            continue
        out, first, second = operands[0], values[operands[1]], operands[2]
        other = values[second] if second in values else int(second, 0)
        if name == "prmt.b32":
            both, picks = first | other << 32, int(operands[3], 16)
            found = sum((both >> 8 * (picks >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        else:
            operation = {"shl": "__lshift__", "shr": "__rshift__", "and": "__and__", "or": "__or__"}
            found = getattr(first, operation[name.removesuffix(".b32")])(other)
        values[out] = found & 0xFFFFFFFF
    pairs = torch.tensor([values[f"${place}"] for place in range(8)], dtype=torch.int64)
    halves = torch.stack((pairs & 0xFFFF, pairs >> 16)).to(torch.uint16).view(torch.bfloat16)
    scales = torch.arange(MAX_SCALE + 1)
    exponents = (scales + 126 << 7).to(torch.int16).view(torch.bfloat16)
    found = (halves.flatten() * exponents[:, None]).float()
    magnitudes = torch.tensor(MAGNITUDES)
    numbers = torch.cat((magnitudes, -magnitudes))
    codes = [int(word) >> 4 * place & 15 for word in words for place in range(8)]
    expected = numbers[codes] * powers(scales)[:, None]
    assert found.equal(expected.bfloat16().float()) and len(set(codes)) == 16


@pytest.mark.parametrize("first_packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 20])
def test_mxfp4_beside_a_plain_matrix(tokens: int, first_packed: bool) -> None:
    """As where a shard cuts the blocks of one of the two."""
    hidden, width, count = 96, 64, 5
    router = random(count, hidden, seed=1) * hidden**-0.5
    plain = random(count * 2 * width, hidden, seed=2) * 0.1, random(count * hidden, width, seed=3) * 0.1
    packed = [in_mxfp4(each) if i == 1 - first_packed else each for i, each in enumerate(plain)]
    exact = [each.dequantized(torch.float32) if isinstance(each, Mxfp4Tensor) else each for each in packed]
    x = random(tokens, hidden, seed=5)
    gpu, reference = GpuOperators(torch.float32, DEVICE, "triton"), TorchOperators(torch.float32)
    _, ours = gpu.experts(None, ExpertWeights(router, *packed), ROUTINGS["softmax"], CLAMPED)
    _, theirs = reference.experts(None, ExpertWeights(router, *exact), ROUTINGS["softmax"], CLAMPED)
    assert relative_error(ours(x), theirs(x)) < 1e-5


def test_tilings_in_mxfp4_are_those_that_were_the_fastest() -> None:
    """Of 35, 64 and 256 tokens of gpt-oss-20b, 4 of 32 experts each: rows of a tile, and stages."""
    for tokens, rows, stages in ((35, 8, 3), (64, 16, 2), (256, 32, 2), (8192, 64, 2)):
        choices = tokens * 4 / 32
        first, second = (mxfp4_tiling(choices, gated=gated) for gated in (True, False))
        assert (first.rows, first.stages) == (rows, stages)
        assert (second.rows, second.stages) == (rows, 3), "sorted for both"


@pytest.mark.parametrize("activation", ["silu", CLAMPED, "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_in_mxfp4(
    tokens: int, dtype: torch.dtype, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end within a run of words, and tiles that reach beyond the rows of an expert."""
    monkeypatch.setenv("MICROVLLM_GPU_OFF", "few_mxfp4")
    experts_in_mxfp4(tokens, 160, 96, dtype, activation, ROUTINGS["softmax"])


@pytest.mark.parametrize(("tokens", "hidden", "width"), [(1, 32, 288), (2, 288, 32)])
def test_few_tokens_of_experts_in_mxfp4(
    tokens: int, hidden: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two runs of words, which a program has side by side, and of one; the last is not full."""
    monkeypatch.setattr("microvllm.ops.gpu.experts.sort_choices", None)
    if tokens == 1:
        experts_in_mxfp4(tokens, hidden, width, DTYPES[0], CLAMPED, ROUTINGS["not normalised"])
    else:
        experts_in_mxfp4(tokens, hidden, width, DTYPES[1], "silu", Routing(num_chosen=1, scale=1.5))


def experts_in_mxfp4(
    tokens: int, hidden: int, width: int, dtype: torch.dtype, activation: str, routing: Routing
) -> None:
    """Compares what they give to random tokens with plain torch."""
    count = 5
    gate_up = random(count * 2 * width, hidden, seed=2) * hidden**-0.5
    gate_up[7] *= 2.0**-30
    gate_up[9] *= 40
    first, last = in_mxfp4(gate_up), in_mxfp4(random(count * hidden, width, seed=3) * width**-0.5)
    exact = first.dequantized(torch.float32), last.dequantized(torch.float32)
    assert relative_error(exact[0], gate_up) < 0.15
    biases = ExpertBiases(*(random(size, seed=7) for size in (count, count * 2 * width, count * hidden)))
    biases = ExpertBiases(*(bias.to(dtype) for bias in biases)) if activation == CLAMPED else NO_BIASES
    router = random(count, hidden, seed=1, dtype=dtype) * hidden**-0.5
    x, residual = random(tokens, hidden, seed=5, dtype=dtype), random(tokens, hidden, seed=6, dtype=dtype)
    _, ours = GpuOperators(dtype, DEVICE, "triton").experts(
        None, ExpertWeights(router, first, last, biases=biases), routing, activation
    )
    plain = ExpertBiases(*(None if bias is None else bias.float() for bias in biases))
    _, theirs = TorchOperators(torch.float32).experts(
        None, ExpertWeights(router.float(), *exact, biases=plain), routing, activation
    )
    expected = theirs(x.float(), residual.clone().float())
    assert relative_error(ours(x, residual.clone()), expected) < TOLERANCE[dtype]


def test_another_activation() -> None:
    weights, routing = weights_of(COUNT, torch.float32), ROUTINGS["sigmoid"]
    x = random(5, HIDDEN, seed=5)
    _, ours = GpuOperators(torch.float32, DEVICE, "triton").experts(None, weights, routing, "gelu_tanh")
    _, theirs = TorchOperators(torch.float32).experts(None, weights, routing, "gelu_tanh")
    assert relative_error(ours(x), theirs(x)) < 1e-5


@pytest.mark.skipif(not ON_GPU, reason="the interpreter's sums are numpy's")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_keeps_its_bits_in_any_company(dtype: torch.dtype) -> None:
    weights, routing = weights_of(COUNT, dtype), ROUTINGS["softmax"]
    x = random(300, HIDDEN, seed=1, dtype=dtype)
    operators = GpuOperators(dtype, DEVICE, "triton", True)
    _, experts = operators.experts(None, weights, routing, "silu")
    together = experts(x)
    for rows in (1, 2, 7, 64, 65, 257):
        for first in (0, 300 - rows):
            assert torch.equal(experts(x[first : first + rows].contiguous()), together[first : first + rows])
