"""The operators against their definitions and against transformers' own layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_tools import BACKENDS
from torch import Tensor

from microvllm.adapters.rope_spec import RopeSpec
from microvllm.adapters.rotary import inverse_frequencies
from microvllm.ops.backends import make_operators
from microvllm.ops.linear import Linear
from microvllm.ops.norm import rms_norm
from microvllm.ops.operators import Operators
from microvllm.ops.rotary import RotaryTable, apply_rotary


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Operators:
    """The operators for a model in float32."""
    return separate(request.param, torch.float32)


def separate(name: str, dtype: torch.dtype) -> Operators:
    """The named operators for a model in `dtype`, each of which can be called by itself."""
    operators = make_operators(name, dtype, 2)
    assert isinstance(operators, Operators)
    return operators


# ---- matrix products ------------------------------------------------------------------------------


def test_on_a_cpu_torch_weights_are_packed() -> None:
    """Otherwise the tests of the torch operators below would not test the packed product."""
    assert Linear(random(8, 8))._packed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (48, 33), (129, 257), (320, 144)], ids=str)
def test_a_product_of_any_number_of_rows(ops: Operators, shape: tuple[int, int], bias: bool) -> None:
    weight = random(*shape, seed=1)
    offset = random(shape[0], seed=2) if bias else None
    layer = ops.linear(weight.clone(), offset)
    for rows in range(1, 41):
        x, residual = random(rows, shape[1], seed=rows), random(rows, shape[0], seed=rows + 100)
        exact = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        tolerance = {"rtol": 1e-5, "atol": 1e-5 * math.sqrt(shape[1])}
        torch.testing.assert_close(layer(x), exact.float(), **tolerance)
        torch.testing.assert_close(layer(x, residual.clone()), (exact + residual).float(), **tolerance)


def test_a_row_hardly_depends_on_its_company(ops: Operators) -> None:
    """The order of the sums may change with the number of rows, and nothing else."""
    layer = ops.linear(random(77, 130, seed=1), None)
    x = random(40, 130, seed=2)
    together = layer(x)
    for rows in range(1, 40):
        torch.testing.assert_close(layer(x[:rows].clone()), together[:rows], rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 40])
def test_a_product_with_bfloat16_weights(name: str, rows: int) -> None:
    operators = make_operators(name, torch.bfloat16, 2)
    weight, offset = random(37, 96, seed=1, dtype=torch.bfloat16), random(37, seed=2, dtype=torch.bfloat16)
    x = random(rows, 96, seed=3, dtype=torch.bfloat16).to(operators.activation_dtype)
    y = operators.linear(weight.clone(), offset.clone())(x)
    assert y.dtype == operators.activation_dtype
    exact = x.double() @ weight.double().T + offset.double()
    # At most one rounding of the result to 8 bits, and a little for the order of the sums.
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2e-2)


# ---- norm and activation --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8), (5, 144), (7, 9, 32), (300, 133)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_rms_norm_is_that_of_the_reference_models(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    operators = separate(name, dtype)
    dtype = operators.activation_dtype
    x, weight = random(*shape, seed=1, dtype=dtype) * 5, random(shape[-1], seed=2, dtype=dtype)
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    norm.weight.data.copy_(weight)
    before = x.clone()
    ours = operators.rms_norm(x, weight, 1e-5)
    assert ours.dtype == dtype and torch.equal(x, before)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(ours, norm(x).detach(), rtol=rtol, atol=1e-6)


def test_rms_norm_of_a_part_of_each_row(ops: Operators) -> None:
    """As the heads of q are normalised, inside of qkv."""
    wide, weight = random(5, 12, 16), random(16, seed=2)
    part = wide[:, 2:9]
    torch.testing.assert_close(ops.rms_norm(part, weight, 1e-5), ops.rms_norm(part.clone(), weight, 1e-5))


def test_rms_norm_of_tiny_and_huge_rows(ops: Operators) -> None:
    weight = torch.ones(20)
    assert torch.equal(ops.rms_norm(torch.zeros(2, 20), weight, 1e-6), torch.zeros(2, 20))
    row = torch.tensor([[1.0, -1.0] * 10])
    torch.testing.assert_close(ops.rms_norm(row * 1e15, weight, 1e-6), row)
    torch.testing.assert_close(ops.rms_norm(row * 1e-3, weight, 1e-6), row / math.sqrt(2))


@pytest.mark.parametrize("width", [1, 11, 16, 160, 333])
def test_silu_and_mul(ops: Operators, width: int) -> None:
    x = random(6, 2 * width) * 4
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = 100.0, -100.0, 0.0, -88.5
    before = x.clone()
    gate, up = x.double()[:, :width], x.double()[:, width:]
    torch.testing.assert_close(
        ops.silu_and_mul(x), (gate / (1 + (-gate).exp()) * up).float(), rtol=2e-6, atol=1e-30
    )
    assert torch.equal(x, before)
    x[1, 0] = torch.nan
    assert ops.silu_and_mul(x)[1, 0].isnan()


# ---- what a decoder calls ---------------------------------------------------------------------------


def test_norm_then_product(ops: Operators) -> None:
    x, norm, weight, bias = random(5, 48), random(48, seed=1), random(33, 48, seed=2), random(33, seed=3)
    before = x.clone()
    y = ops.norm_linear(norm, 1e-3, weight.clone(), bias.clone())(x)
    torch.testing.assert_close(y, rms_norm(x, norm, 1e-3) @ weight.T + bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("with_bias", [False, True])
def test_norm_then_product_then_swiglu(ops: Operators, with_bias: bool) -> None:
    x, norm, weight = random(5, 48), random(48, seed=1), random(2 * 33, 48, seed=2)
    bias = random(2 * 33, seed=3) if with_bias else None
    y = ops.norm_gate_up(norm, 1e-3, weight.clone(), bias)(x)
    gate, up = torch.nn.functional.linear(rms_norm(x, norm, 1e-3), weight, bias).chunk(2, -1)
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_embedding_rows(name: str, dtype: torch.dtype) -> None:
    operators = make_operators(name, dtype, 2)
    weight, ids = random(7, 17, dtype=dtype), [6, 0, 6, 3] * 9
    rows = operators.embedding(weight)(torch.tensor(ids))
    assert rows.dtype == operators.activation_dtype
    assert torch.equal(rows.to(dtype), weight[ids])


# ---- rotary ---------------------------------------------------------------------------------------

ROPES: dict[str, tuple[RopeSpec, dict[str, Any]]] = {
    "default": (RopeSpec(theta=1e6), {"rope_type": "default", "rope_theta": 1e6}),
    "linear": (
        RopeSpec(theta=1e4, scaling="linear", factor=2.5),
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    ),
    "llama3": (
        RopeSpec(
            theta=5e5,
            scaling="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=8192,
        ),
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_is_that_of_transformers(name: str, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    spec, parameters = ROPES[name]
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    theirs = LlamaRotaryEmbedding(config)
    frequencies = inverse_frequencies(spec, head_dim)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)

    positions = torch.tensor([0, 1, 2, 63, 64, 1000, 8191, 8192, 20_000])
    x = random(len(positions), 5, head_dim)
    cos, sin = RotaryTable(frequencies, 20_001, torch.float32).at(positions)
    ours = apply_rotary(x, cos, sin)
    batched = x.transpose(0, 1).unsqueeze(0)
    expected, _ = apply_rotary_pos_emb(batched, batched, *theirs(batched, positions.unsqueeze(0)))
    # An angle of 20,000 is known to 2^-10 only in float32, and both round it in their own way.
    torch.testing.assert_close(ours, expected[0].transpose(0, 1), rtol=0, atol=5e-3)
    torch.testing.assert_close(ours[:6], expected[0].transpose(0, 1)[:6], rtol=0, atol=3e-4)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    table = RotaryTable(inverse_frequencies(RopeSpec(), 32), 200, torch.float32)
    q, k = random(1, 1, 32, seed=1), random(1, 1, 32, seed=2)

    def score(at_q: int, at_k: int) -> float:
        turned = [apply_rotary(x, *table.at(torch.tensor([p]))) for x, p in ((q, at_q), (k, at_k))]
        assert abs(float(turned[0].norm() / q.norm()) - 1) < 1e-5
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)
