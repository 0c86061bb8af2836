"""Products with activations rounded to 8 bits, beyond those of test_quantized.py: limits, and the option."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import BY_VECTORS, LEVELS, library_of
from model_tools import generate_ids, make_engine, make_prompts
from quantized_case import (
    FACTORS,
    assert_products,
    dequantized,
    formats,
    quantized,
    random,
    random_blocks,
    rounded,
    seeds,
)
from tiny_models import TOKENIZER_SIZE, make_hf_folder, write_gguf

from microvllm.ops.cpu.build import load_kernels
from microvllm.ops.cpu.operators import CpuOperators
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError


@pytest.fixture(scope="module")
def operators() -> CpuOperators:
    return CpuOperators(load_kernels(), 3, True, BY_VECTORS)


@pytest.fixture(scope="module", params=LEVELS, ids=lambda level: level.name)
def of_each_level(request: pytest.FixtureRequest) -> CpuOperators:
    return CpuOperators(library_of(request.param), 2, True, BY_VECTORS)


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_no_sum_overflows(of_each_level: CpuOperators, name: str) -> None:
    """Every byte of the quants at a limit, every activation at a limit: all of one sign, or alternating."""
    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        raw = np.full((17 * 256 // block, block_bytes), fill, np.uint8)
        for at in FACTORS[name]:
            raw[:, at : at + 2] = np.array([0.5], "<f2").view(np.uint8)
        if name == "MXFP4":
            raw[:, 0] = 126
        raw = raw.reshape(17, -1)
        ones = torch.ones(256)
        signs = torch.tensor([1.0, -1.0]).repeat(128)
        x = torch.stack([ones, -ones, signs, -signs, torch.where(torch.arange(256) % 4 < 2, 1.0, -1.0)])
        weight = dequantized(name, raw)
        assert_products(of_each_level.linear(quantized((name, raw)))(x), rounded(x), weight)


def test_every_level_computes_the_same(of_each_level: CpuOperators) -> None:
    for name in FACTORS:
        raw = random_blocks(name, 23, 2, 5)
        weight = dequantized(name, raw)
        x = random(7, weight.shape[1], seed=6) * torch.logspace(-15, 15, 7)[:, None]
        assert_products(of_each_level.linear(quantized((name, raw)))(x), rounded(x), weight)


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q6_K"])
def test_what_is_no_number_shows_and_stays_in_its_row(of_each_level: CpuOperators, name: str) -> None:
    raw = random_blocks(name, 20, 512 // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0], 1)
    product, x = of_each_level.linear(quantized((name, raw))), random(6, 512, seed=2)
    spoilt = x.clone()
    spoilt[1, 40], spoilt[2, 511], spoilt[3, 0] = math.nan, math.inf, -math.inf
    spoilt[4] = 0.0
    spoilt[5] = 1e-40
    y = product(spoilt)
    assert y[1:4].isnan().all()
    assert torch.equal(y[0], product(x)[0])
    assert (y[4:] == 0).all(), "no numbers as small as these are told from 0"


@settings(max_examples=20)
@given(formats, st.integers(2, 130), seeds)
def test_a_row_does_not_depend_on_the_others(operators: CpuOperators, name: str, m: int, seed: int) -> None:
    raw = random_blocks(name, 40, 2, seed)
    product = operators.linear(quantized((name, raw)))
    x = random(m, dequantized(name, raw).shape[1], seed=seed)
    assert torch.equal(product(x)[m - 1 :], product(x[m - 1 :]))


def test_plain_weights_are_multiplied_exactly(operators: CpuOperators) -> None:
    x, weight = random(3, 64, seed=1), random(9, 64, seed=2)
    assert_products(operators.linear(weight)(x), x, weight)


# ---- the option -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    make_hf_folder(folder / "hf", "llama", hidden_size=288, intermediate_size=320)
    write_gguf(folder / "plain.gguf", folder / "hf", quantization="F32")
    return write_gguf(folder / "model.gguf", folder / "hf", quantization="Q4_1")


def test_tokens_alone_and_in_a_batch(model: Path) -> None:
    prompts = make_prompts(4, TOKENIZER_SIZE)
    exact = make_engine(model, attention_backend="cpu")
    engine = make_engine(model, attention_backend="cpu", cpu_activations="int8")
    assert engine.config.int8_activations and not exact.config.int8_activations
    tokens = generate_ids(engine, prompts, 30)
    assert [generate_ids(engine, [prompt], 30)[0] for prompt in prompts] == tokens


def test_the_option(model: Path) -> None:
    def resolved(path: Path, **options: Any) -> bool:
        return EngineArgs(model=str(path), device="cpu", **options).resolve().int8_activations

    assert not resolved(model)
    assert resolved(model, cpu_activations="int8")
    assert resolved(model, cpu_activations="int8", gguf_weights="packed")
    for path, options, problem in (
        (model, {"cpu_activations": "int4"}, "--cpu-activations must be one of float32, int8, got int4"),
        (model, {"attention_backend": "torch"}, "--cpu-activations int8: .* torch does not"),
        (model, {"gguf_weights": "dequantized"}, "--cpu-activations int8: --gguf-weights dequantized"),
        (model.parent / "hf", {}, "--cpu-activations int8: .* is not read from a GGUF file"),
    ):
        with pytest.raises(ConfigError, match=problem):
            resolved(path, **{"cpu_activations": "int8", **options})
    with pytest.raises(ConfigError, match=r"--cpu-activations int8: .*plain\.gguf has no quantised matrices"):
        make_engine(model.parent / "plain.gguf", attention_backend="cpu", cpu_activations="int8")
