"""Mixtures of experts by the C kernels against plain torch, and their choice against transformers."""

from __future__ import annotations

import itertools

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_case import examples
from model_tools import relative_error
from quantized_case import dequantized, quantized
from torch import Tensor

from microvllm.ops.activation import CLAMPED
from microvllm.ops.cpu.build import load_kernels
from microvllm.ops.cpu.experts import CpuExperts
from microvllm.ops.cpu.operators import CpuOperators
from microvllm.ops.experts import ComposedExperts, ExpertBiases, ExpertWeights, SharedExpert, route
from microvllm.ops.operators import TorchOperators
from microvllm.ops.routing import Routing

COUNT, HIDDEN, WIDTH = 12, 64, 32
ROUTINGS = (
    Routing(num_chosen=3),
    Routing(num_chosen=1, normalized=False),
    Routing(num_chosen=4, sigmoid=True, scale=2.5),
    Routing(num_chosen=3, sigmoid=True, smallest_sum=0.5),
    Routing(num_chosen=3, sigmoid=True, num_groups=4, num_chosen_groups=2),
    Routing(num_chosen=5, num_groups=2, num_chosen_groups=1),
    Routing(num_chosen=2, num_groups=12, num_chosen_groups=5),
    Routing(num_chosen=12),
)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=[False, True], ids=["", "invariant"])
def operators(request: pytest.FixtureRequest) -> CpuOperators:
    return CpuOperators(load_kernels(), 3, is_invariant=request.param)


def both(kind: str, corrected: bool, seed: int) -> tuple[ExpertWeights, ExpertWeights]:
    """Weights of a kind, and the numbers that they stand for in float32."""
    router = random(COUNT, HIDDEN, seed=seed) * HIDDEN**-0.5
    correction = random(COUNT, seed=seed + 1) if corrected else None
    gate_up = random(COUNT * 2 * WIDTH, HIDDEN, seed=seed + 2) * HIDDEN**-0.5
    down = random(COUNT * HIDDEN, WIDTH, seed=seed + 3) * WIDTH**-0.5
    if kind in ("float32", "bfloat16"):
        dtype = getattr(torch, kind)
        gate_up, down = gate_up.to(dtype), down.to(dtype)
        exact = ExpertWeights(router, gate_up.float(), down.float(), correction)
        return ExpertWeights(router, gate_up, down, correction), exact
    number = gguf.GGMLQuantizationType[kind]
    packed = []
    for weight, rows in ((gate_up, WIDTH), (down, HIDDEN)):
        packed.append([(kind, gguf.quants.quantize(part.numpy(), number)) for part in weight.split(rows)])
    values = [torch.cat([dequantized(*part) for part in parts]) for parts in packed]
    kept = [quantized(*parts) for parts in packed]
    return ExpertWeights(router, *kept, correction), ExpertWeights(router, *values, correction)


@examples(60)
@given(
    st.sampled_from([1, 2, 5, 17, 70]),
    st.sampled_from(ROUTINGS),
    st.sampled_from(["float32", "bfloat16", "Q8_0", "Q4_0"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_experts_are_those_of_plain_torch(
    operators: CpuOperators,
    tokens: int,
    routing: Routing,
    kind: str,
    corrected: bool,
    normed: bool,
    seed: int,
) -> None:
    weights, exact = both(kind, corrected, seed)
    norm = (random(HIDDEN, seed=seed + 4) * 0.2 + 1, 1e-5) if normed else None
    x, residual = random(tokens, HIDDEN, seed=seed + 5), random(tokens, HIDDEN, seed=seed + 6)
    first, last = TorchOperators(torch.float32).experts(norm, exact, routing, "silu")
    assert isinstance(last, ComposedExperts)
    expected = last(first(x))
    first, ours = operators.experts(norm, weights, routing, "silu")
    assert isinstance(ours, CpuExperts)
    # The matrix unit, where there is one, takes bfloat16.
    tolerance = 2e-5 if kind == "float32" else 1e-2
    assert relative_error(ours(first(x)), expected) < tolerance
    assert relative_error(ours(first(x), residual.clone()), expected + residual) < tolerance
    itself = x.clone()
    assert ours(first(itself), itself) is itself
    assert relative_error(itself, expected + x) < tolerance


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "Q4_0"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_biases_and_the_clamped_unit(operators: CpuOperators, tokens: int, kind: str) -> None:
    """Of numbers on both sides of where it is cut off."""
    weights, exact = both(kind, False, 1)
    sizes = COUNT, COUNT * 2 * WIDTH, COUNT * HIDDEN
    biases = ExpertBiases(*(3 * random(size, seed=7 + i) for i, size in enumerate(sizes)))
    x = 5 * random(tokens, HIDDEN, seed=5)
    _, ours = operators.experts(None, weights._replace(biases=biases), ROUTINGS[0], CLAMPED)
    assert isinstance(ours, CpuExperts)
    gate_up = torch.stack([one.gate_up for one in exact.split()])
    inner = torch.einsum("nh,eih->nei", x, gate_up) + biases.gate_up.view(COUNT, -1)
    gate, up = inner.chunk(2, -1)
    assert (gate > 7).any() and (up > 7).any() and (up < -7).any()
    inner = gate.clamp(max=7) * (1.702 * gate.clamp(max=7)).sigmoid() * (up.clamp(-7, 7) + 1)
    down = torch.stack([one.down for one in exact.split()])
    outer = torch.einsum("nei,ehi->neh", inner, down) + biases.down.view(COUNT, HIDDEN)
    logits = x @ exact.router.t() + biases.router
    scores, chosen = logits.topk(3)
    scores = scores.softmax(-1)
    expected = (outer.gather(1, chosen[..., None].expand(-1, -1, HIDDEN)) * scores[..., None]).sum(1)
    assert relative_error(ours(x), expected) < (2e-5 if kind == "float32" else 1e-2)
    _, theirs = TorchOperators(torch.float32).experts(
        None, exact._replace(biases=biases), ROUTINGS[0], CLAMPED
    )
    assert relative_error(theirs(x), expected) < 2e-5


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "Q4_0"])
def test_a_row_keeps_its_bits_in_any_company(kind: str) -> None:
    weights, _ = both(kind, False, 1)
    _, experts = CpuOperators(load_kernels(), 2, is_invariant=True).experts(
        None, weights, ROUTINGS[0], "silu"
    )
    x = random(70, HIDDEN, seed=5)
    together = experts(x)
    for rows, first in itertools.product((1, 2, 7, 33), (0, 31)):
        assert torch.equal(experts(x[first : first + rows]), together[first : first + rows])


def test_no_tokens_and_what_is_not_a_number(operators: CpuOperators) -> None:
    weights, _ = both("float32", False, 1)
    _, experts = operators.experts(None, weights, ROUTINGS[0], "silu")
    x = random(3, HIDDEN, seed=5)
    assert experts(x[:0]).shape == (0, HIDDEN)
    alone = experts(x[:1])
    x[1] = torch.nan
    found = experts(x)
    assert torch.equal(found[0], alone[0]) or relative_error(found[0], alone[0]) < 1e-6
    assert found[1].isnan().all() and found[2].isfinite().all()


def test_another_activation_is_composed(operators: CpuOperators) -> None:
    weights, exact = both("float32", False, 1)
    x = random(5, HIDDEN, seed=5)
    _, ours = operators.experts(None, weights, ROUTINGS[2], "gelu_tanh")
    _, theirs = TorchOperators(torch.float32).experts(None, exact, ROUTINGS[2], "gelu_tanh")
    assert relative_error(ours(x), theirs(x)) < 1e-5


def test_the_choice_is_that_of_transformers() -> None:
    """DeepSeek-V3's router: sigmoids, a correction, groups, a scale."""
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = deepseek.DeepseekV3Config(
        n_routed_experts=COUNT, num_experts_per_tok=3, n_group=4, topk_group=2, hidden_size=HIDDEN
    )
    router = deepseek.DeepseekV3TopkRouter(config)
    router.weight.data = random(COUNT, HIDDEN, seed=1)
    router.e_score_correction_bias.data = random(COUNT, seed=2)
    x = random(50, HIDDEN, seed=3)
    with torch.no_grad():
        logits, expected, numbers = router(x)
    routing = Routing(num_chosen=3, sigmoid=True, scale=2.5, num_groups=4, num_chosen_groups=2)
    weights, chosen = route(logits, routing, router.e_score_correction_bias)
    dense = [torch.zeros(50, COUNT).scatter_(1, at, w) for at, w in ((chosen, weights), (numbers, expected))]
    assert relative_error(*dense) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_shared_expert(operators: CpuOperators, gated: bool, backend: str) -> None:
    """Wider than the others."""
    used = operators if backend == "cpu" else TorchOperators(torch.float32)
    weights, _ = both("float32", False, 1)
    wide = 3 * WIDTH + 5
    gate_up, down = random(2 * wide, HIDDEN, seed=2) * 0.1, random(HIDDEN, wide, seed=3) * 0.1
    gate = random(1, HIDDEN, seed=4) if gated else None
    _, chosen = used.experts(None, weights, ROUTINGS[0], "silu")
    _, both_kinds = used.experts(
        None, weights._replace(shared=SharedExpert(gate_up, down, gate)), ROUTINGS[0], "silu"
    )
    x, residual = random(21, HIDDEN, seed=5), random(21, HIDDEN, seed=6)
    expected = (torch.nn.functional.silu(x @ gate_up[:wide].t()) * (x @ gate_up[wide:].t())) @ down.t()
    expected = expected * (1.0 if gate is None else (x @ gate.t()).sigmoid()) + chosen(x)
    assert relative_error(both_kinds(x), expected) < 1e-5
    assert relative_error(both_kinds(x, residual.clone()), expected + residual) < 1e-5
