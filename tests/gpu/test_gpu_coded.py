"""Checkpoints in 4 and 8 bits on a GPU: their matrices stay packed, and tokens are those of the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import generate_ids, load_script, make_engine, make_prompts
from quantized_case import random_blocks
from tiny_models import TOKENIZER_SIZE, make_hf_folder, write_gguf

from microvllm.ops.coded import CodedTensor
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.worker.model_runner import ModelGraphRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
quantize_checkpoint = load_script("quantize_checkpoint")
PROMPTS = make_prompts(6, 300, seed=1, longest=90)
SIZES = {"hidden_size": 288, "intermediate_size": 320, "num_hidden_layers": 2}


def packed_matrices(engine: InferenceEngine) -> int:
    """How many products of the decoder are of packed codes."""
    runner = engine.core._runner
    assert isinstance(runner, ModelGraphRunner)
    layers = runner.model._layers._layers
    weights = (getattr(product, "_weight", None) for layer in layers for product in layer)
    return sum(isinstance(weight, CodedTensor) for weight in weights)


def check(model: Path, prompts: list[list[int]]) -> None:
    """In float32 every token; in bfloat16, whose tensor cores unpack by other instructions, nearly every."""
    expected = generate_ids(make_engine(model, attention_backend="torch"), prompts, 24)
    on_gpu = {"device": "cuda", "num_gpu_blocks_override": 512, "block_size": 16, "max_num_seqs": 16}
    engine = make_engine(model, dtype="float32", **on_gpu)
    assert packed_matrices(engine) == 8
    assert generate_ids(engine, prompts, 24) == expected
    assert [generate_ids(engine, [prompt], 24)[0] for prompt in prompts] == expected
    same = 0
    for dtype in ("bfloat16", "float16"):
        tokens = generate_ids(make_engine(model, dtype=dtype, **on_gpu), prompts, 24)
        same += sum(a[:4] == b[:4] for a, b in zip(tokens, expected, strict=True))
    assert same >= len(prompts), "half of the beginnings"


@pytest.mark.parametrize("form", ["gptq-4", "gptq-4-asymmetric", "gptq-8", "awq", "w4a16", "w8a16"])
def test_folders(tmp_path: Path, form: str) -> None:
    folder = make_hf_folder(tmp_path / "plain", "qwen2", **SIZES)
    quantize_checkpoint.quantize_folder(folder, tmp_path / form, form, 32)
    check(tmp_path / form, PROMPTS)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_files(tmp_path: Path, quantization: str) -> None:
    folder = make_hf_folder(tmp_path / "plain", "qwen3", **SIZES)
    file = write_gguf(tmp_path / "model.gguf", folder, quantization=quantization)
    check(file, make_prompts(6, TOKENIZER_SIZE, longest=90))


@pytest.mark.parametrize(
    ("most", "value"),
    [("Q2_K", "Q2_K"), ("Q3_K", "Q3_K"), ("Q4_K", "Q6_K"), ("Q5_K", "Q6_K"), ("Q6_K", "Q6_K")],
)
def test_gguf_files_of_large_blocks(tmp_path: Path, most: str, value: str) -> None:
    """Also with two types in one product, as files of Q4_K_M have them."""
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 512}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    folder = make_hf_folder(tmp_path / "plain", "qwen3", **sizes)

    def blocks(name: str, values: Any) -> tuple[str, Any] | None:
        if values.ndim == 1 or "token_embd" in name:
            return None
        kind = value if "attn_v" in name else most
        return kind, random_blocks(kind, len(values), values.shape[1] // 256, len(name), largest=1e-3)

    file = write_gguf(tmp_path / "model.gguf", folder, blocks=blocks)
    check(file, make_prompts(6, TOKENIZER_SIZE, longest=90))


EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "hidden_size": 96,
}


@pytest.mark.parametrize("form", ["gptq-4", "gptq-8", "awq", "w4a16", "Q4_0", "Q8_0"])
def test_experts(tmp_path: Path, form: str) -> None:
    """In codes; in float32 every token is that of a CPU, alone and in a batch."""
    model = make_hf_folder(tmp_path / "plain", "qwen3_moe", **EXPERTS)
    if form.startswith("Q"):
        model = write_gguf(tmp_path / "model.gguf", model, quantization=form)
    else:
        quantize_checkpoint.quantize_folder(model, tmp_path / form, form, 32)
        model = tmp_path / form
    prompts = make_prompts(6, TOKENIZER_SIZE, seed=1, longest=90)
    expected = generate_ids(make_engine(model, attention_backend="torch"), prompts, 24)
    on_gpu = {"device": "cuda", "num_gpu_blocks_override": 512, "block_size": 16, "max_num_seqs": 16}
    engine = make_engine(model, dtype="float32", **on_gpu)
    runner = engine.core._runner
    assert isinstance(runner, ModelGraphRunner)
    found = [part for layer in runner.model._layers._layers for part in layer if hasattr(part, "_gate_up")]
    assert found and all(isinstance(part._gate_up.matrix, CodedTensor) for part in found)
    assert generate_ids(engine, prompts, 24) == expected
    assert [generate_ids(engine, [prompt], 24)[0] for prompt in prompts] == expected
