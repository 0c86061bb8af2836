"""Weights kept in ggml's block formats: the kernels against gguf's dequantisation, and whole models.

Products are checked with exact activations and with those that are rounded to 8 bits; see test_int8.py, too.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import BY_VECTORS
from model_tools import generate_ids, make_engine, make_prompts
from quantized_case import (
    FACTORS,
    Bytes,
    assert_products,
    dequantized,
    formats,
    quantized,
    random,
    random_blocks,
    seeds,
    seen,
)
from tiny_models import TOKENIZER_SIZE, make_hf_folder, write_gguf
from torch.nn.functional import silu

from microvllm.adapters.files.gguf_file import TENSOR_TYPES
from microvllm.adapters.registry import load_spec
from microvllm.adapters.weights import load_weights
from microvllm.ops.cpu.build import load_kernels
from microvllm.ops.cpu.isa import VARIABLE, levels
from microvllm.ops.cpu.operators import CpuOperators
from microvllm.ops.operators import DecoderLayers
from microvllm.ops.quantized import QuantizedTensor
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError


@pytest.fixture(scope="module", params=[False, True], ids=["exact", "int8"])
def operators(request: pytest.FixtureRequest) -> CpuOperators:
    return CpuOperators(load_kernels(), 3, request.param, BY_VECTORS)


def rows_of(name: str, rows: int, columns: int, seed: int) -> Bytes:
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return random_blocks(name, rows, columns // block, seed)


def test_every_quantised_type_has_a_kernel(operators: CpuOperators) -> None:
    assert {name for name, block, _ in TENSOR_TYPES.values() if block > 1} == set(FACTORS)
    sizes = [operators.kernels.library.packed_bytes(number, 16, 256) for number in range(40)]
    known = {number for number, size in enumerate(sizes) if size > 0}
    assert known == {0, 30, *(int(gguf.GGMLQuantizationType[name]) for name in FACTORS)}


@settings(max_examples=100)
@given(
    formats, st.integers(1, 150), st.integers(1, 70), st.integers(1, 4), st.booleans(), st.booleans(), seeds
)
def test_linear_and_embedding(
    operators: CpuOperators, name: str, m: int, n: int, blocks: int, bias: bool, residual: bool, seed: int
) -> None:
    raw = random_blocks(name, n, blocks, seed)
    weight, packed = dequantized(name, raw), quantized((name, raw))
    x = random(m, weight.shape[1], seed=seed)
    b = random(n, seed=seed + 1) if bias else None
    r = random(m, n, seed=seed + 2) if residual else None
    added = torch.zeros(m, n) + (0 if b is None else b) + (0 if r is None else r)
    actual = operators.linear(packed, b)(x, None if r is None else r.clone())
    assert_products(actual, seen(operators, x), weight, added)
    # A tied matrix: the same packed tensor gives rows, which are exactly the file's.
    ids = torch.randint(0, n, (m,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(operators.embedding(packed)(ids), weight[ids])


@settings(max_examples=30)
@given(
    st.lists(st.tuples(formats, st.integers(1, 70)), min_size=2, max_size=4),
    st.integers(1, 40),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_parts_of_different_formats(
    operators: CpuOperators,
    parts: list[tuple[str, int]],
    m: int,
    blocks: int,
    with_norm: bool,
    with_bias: bool,
    seed: int,
) -> None:
    raws = [(name, rows_of(name, rows, 256 * blocks, seed + i)) for i, (name, rows) in enumerate(parts)]
    weight = torch.cat([dequantized(*one) for one in raws])
    n, k = weight.shape
    x, residual, norm = random(m, k, seed=seed), random(m, n, seed=seed + 1), random(k, seed=seed + 2)
    bias = random(n, seed=seed + 3) if with_bias else None
    added = torch.zeros(m, n) if bias is None else bias.expand(m, n)
    if with_norm:
        normed = operators.rms_norm(x, norm, 1e-5)
        actual = operators.norm_linear(norm, 1e-5, quantized(*raws), bias)(x)
        assert_products(actual, seen(operators, normed), weight, added)
    else:
        actual = operators.linear(quantized(*raws), bias)(x, residual.clone())
        assert_products(actual, seen(operators, x), weight, added + residual)


@settings(max_examples=40)
@given(formats, formats, st.integers(1, 30), st.integers(1, 70), st.booleans(), seeds)
def test_norm_and_gate(
    operators: CpuOperators, gate: str, up: str, m: int, n: int, with_bias: bool, seed: int
) -> None:
    raws = [(name, rows_of(name, n, 512, seed + i)) for i, name in enumerate((gate, up))]
    x, norm = random(m, 512, seed=seed), random(512, seed=seed + 1)
    bias = random(2 * n, seed=seed + 2) if with_bias else None
    actual = operators.norm_gate_up(norm, 1e-5, quantized(*raws), bias)(x)
    normed = seen(operators, operators.rms_norm(x, norm, 1e-5)).double()
    added = torch.zeros(2 * n) if bias is None else bias
    weight = torch.cat([dequantized(*one) for one in raws]).double()
    gates, ups = (normed @ weight.t() + added).chunk(2, -1)
    gate_terms, up_terms = (normed.abs() @ weight.abs().t() + added.abs()).chunk(2, -1)
    scale = gate_terms * up_terms + 1e-30
    assert float(((actual - silu(gates) * ups).abs() / scale).max()) < 1e-5


def test_a_gate_without_an_equal_up_is_refused(operators: CpuOperators) -> None:
    raws = [("Q8_0", random_blocks("Q8_0", rows, 1, 0)) for rows in (4, 5)]
    for parts in (raws, raws[:1]):
        with pytest.raises(ValueError, match="gate and up have to be two parts of as many rows"):
            operators.norm_gate_up(torch.ones(32), 1e-5, quantized(*parts))


@settings(max_examples=40)
@given(formats, st.integers(1, 9), st.integers(1, 40), seeds)
def test_whatever_bytes_spoil_no_other_row(
    operators: CpuOperators, name: str, m: int, n: int, seed: int
) -> None:
    raw = random_blocks(name, n, 2, seed, any_factor=True)
    weight, packed = dequantized(name, raw), quantized((name, raw))
    x = random(m, weight.shape[1], seed=seed)
    fine = weight.isfinite().all(1)
    assert_products(operators.linear(packed)(x)[:, fine], seen(operators, x), weight[fine])
    rows = operators.embedding(packed)(torch.arange(n))
    assert torch.equal(rows[fine], weight[fine])
    assert torch.equal(rows.isfinite(), weight.isfinite())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other levels are of x86-64")
def test_without_the_vectors_of_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable level has vectors of another width, and converts float16 by itself."""
    monkeypatch.setenv(VARIABLE, levels()[-1].name)
    portable = CpuOperators(load_kernels(), 2)
    for name in FACTORS:
        raw = random_blocks(name, 23, 2, 5, any_factor=True)
        weight, packed = dequantized(name, raw), quantized((name, raw))
        fine = weight.isfinite().all(1)
        x = random(7, weight.shape[1], seed=6)
        assert_products(portable.linear(packed)(x)[:, fine], x, weight[fine])
        assert torch.equal(portable.embedding(packed)(torch.arange(23))[fine], weight[fine])


# ---- whole models -----------------------------------------------------------------------------------

K_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}


# Of random bytes: how wide the weights are with a factor of 1, and the second factor that centres them on 0.
SPREAD = {"Q4_K": (240, 7.5), "Q6_K": (1370,)}


def model_blocks(name: str, shape: tuple[int, int], seed: int) -> Bytes:
    """Random blocks with weights as large as those of a model: 1.5 / sqrt(columns) wide."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = random_blocks(name, shape[0], shape[1] // block, seed).reshape(-1, block_bytes)
    width, *centre = SPREAD[name]
    for at, share in zip(FACTORS[name], (1.0, *centre), strict=True):
        factor = np.array([1.5 / shape[1] ** 0.5 / width * share], "<f2")
        raw[:, at : at + 2] = factor.view(np.uint8)
    return raw.reshape(shape[0], -1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like those called Q4_K_M: v, down and the tied embedding in Q6_K, the rest in Q4_K."""
    folder = tmp_path_factory.mktemp("mixed")
    make_hf_folder(folder / "hf", "llama", tie=True, **K_SIZES)

    def blocks(name: str, values: Any) -> tuple[str, Bytes] | None:
        if values.ndim == 1:
            return None
        large = any(part in name for part in ("attn_v", "ffn_down", "token_embd"))
        kind = "Q6_K" if large else "Q4_K"
        return kind, model_blocks(kind, values.shape, len(name))

    return write_gguf(folder / "model.gguf", folder / "hf", blocks=blocks)


def test_kept_rows_are_those_that_dequantise_to_the_plain_weights(mixed: Path) -> None:
    spec = load_spec(mixed)
    plain = load_weights(mixed, spec, "gguf", torch.float32)
    kept = load_weights(mixed, spec, "gguf", torch.bfloat16, packed=(QuantizedTensor,))
    assert plain.keys() == kept.keys()
    kinds = set()
    for name, expected in plain.items():
        tensor = kept[name]
        if expected.ndim == 1:
            assert torch.equal(tensor, expected), name
            continue
        assert isinstance(tensor, QuantizedTensor)
        kinds |= {tuple(part.format for part in tensor.parts)}
        rows = [
            dequantized(gguf.GGMLQuantizationType(part.format).name, data.numpy().reshape(part.rows, -1))
            for part, data in zip(tensor.parts, tensor.split_parts(), strict=True)
        ]
        assert torch.equal(torch.cat(rows), expected), name
    assert kinds == {(12,), (14,), (12, 12), (12, 12, 14)}


def test_tokens_of_mixed_formats(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_prompts(6, TOKENIZER_SIZE)
    expected = generate_ids(make_engine(mixed, attention_backend="torch"), prompts, 60)
    engine = make_engine(mixed, attention_backend="cpu", gguf_weights="packed")
    assert engine.config.packed_weights
    one_at_a_time = []
    monkeypatch.setattr(DecoderLayers, "__call__", lambda *args: one_at_a_time.append(args))
    assert generate_ids(engine, prompts, 60) == expected
    assert [generate_ids(engine, [prompt], 60)[0] for prompt in prompts] == expected
    assert not one_at_a_time, "not all layers ran in one call"
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), "the model says always the same"


@pytest.mark.parametrize(("family", "quantization"), [("qwen2", "Q5_1"), ("qwen3", "Q4_0")])
def test_tokens_of_other_families(tmp_path: Path, family: str, quantization: str) -> None:
    sizes = {"hidden_size": 288, "intermediate_size": 320}
    folder = make_hf_folder(tmp_path / "hf", family, **sizes)
    file = write_gguf(tmp_path / "model.gguf", folder, quantization=quantization)
    prompts = make_prompts(4, TOKENIZER_SIZE)
    expected = generate_ids(make_engine(file, attention_backend="torch"), prompts, 40)
    assert generate_ids(make_engine(file, attention_backend="cpu"), prompts, 40) == expected


# ---- the option -------------------------------------------------------------------------------------


def test_the_option(mixed: Path) -> None:
    def packed(model: Path, **options: Any) -> bool:
        return EngineArgs(model=str(model), device="cpu", **options).resolve().packed_weights

    assert packed(mixed)
    assert packed(mixed, gguf_weights="packed")
    assert not packed(mixed, gguf_weights="dequantized")
    assert not packed(mixed, attention_backend="torch")
    assert not packed(mixed.parent / "hf")
    for model, options, problem in (
        (
            mixed,
            {"gguf_weights": "4bit"},
            "--gguf-weights must be one of auto, packed, dequantized, got 4bit",
        ),
        (mixed, {"gguf_weights": "packed", "attention_backend": "torch"}, "torch does not"),
        (mixed.parent / "hf", {"gguf_weights": "packed"}, "is not read from a GGUF file"),
    ):
        with pytest.raises(ConfigError, match=problem):
            packed(model, **options)
