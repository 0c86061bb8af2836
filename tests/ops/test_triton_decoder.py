"""Whole decoders of the GPU's operators: a cache of e4m3, packed codes, experts; interpreted without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_tools import load_script
from mxfp4_folder import to_mxfp4
from tiny_models import TOKENIZER_SIZE, make_hf_folder
from torch import Tensor

from triton_interpreter import DEVICE  # isort: skip  (first, as it chooses how kernels run)

from attention_case import segment_table

from microvllm.adapters.decoder import DecoderModel
from microvllm.adapters.registry import load_spec
from microvllm.adapters.weights import load_weights
from microvllm.ops.attention import AttentionBatch
from microvllm.ops.coded import CodedTensor
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.mxfp4 import Mxfp4Tensor
from microvllm.ops.operators import Operators, TorchOperators
from microvllm.ops.scaled import ScaledTensor

BLOCK, BLOCKS = 16, 8


def logits(model: DecoderModel, device: torch.device, cache: torch.dtype) -> Tensor:
    """Of a prompt of 21 tokens in two chunks, then of two decodes."""
    groups = len(model.spec.cache_plan.windows)
    attention = model.attention(BLOCKS * groups, BLOCK, 64, cache, device, 2)
    found, done = [], 0
    ids = torch.arange(3, 26)
    for count in (13, 8, 1, 1):
        at = torch.arange(done, done + count)
        done += count
        decodes, batches = int(count == 1), []
        for group in range(groups):
            table = [5 + BLOCKS * group, 2 + BLOCKS * group]
            slots = torch.tensor(table)[at // BLOCK] * BLOCK + at % BLOCK
            blocks = torch.tensor([table] * decodes, dtype=torch.int64).view(decodes, 2)
            segments = segment_table([(count, done, table)] * (1 - decodes), device)
            batches.append(
                AttentionBatch(
                    at.to(device),
                    slots.to(device),
                    decodes,
                    blocks.to(device),
                    torch.full((decodes,), done, device=device),
                    None if decodes else segments,
                    torch.ones(1, dtype=torch.int64, device=device),
                )
            )
        batch = replace(batches[0], others=tuple(batches[1:]))
        hidden = model.forward(ids[at].to(device), attention.begin_step(batch))
        found.append(model.logits(hidden).cpu())
    return torch.cat(found)


@pytest.mark.parametrize("form", [None, "awq", "gptq-8"])
def test_logits_are_those_of_the_torch_operators(tmp_path: Path, form: str | None) -> None:
    plain = make_hf_folder(
        tmp_path / "plain", "qwen3", hidden_size=96, intermediate_size=64, num_hidden_layers=2, head_dim=32
    )
    folder = plain
    if form is not None:
        folder = tmp_path / form
        load_script("quantize_checkpoint").quantize_folder(plain, folder, form, 32)
    spec = load_spec(folder)

    def model(operators: Operators, device: str) -> DecoderModel:
        weights = load_weights(folder, spec, "auto", torch.float32, device=device, packed=operators.packed)
        coded = sum(isinstance(weight, CodedTensor) for weight in weights.values())
        assert coded == (8 if form is not None and operators.packed else 0)
        return DecoderModel(spec, weights, operators)

    expected = logits(model(TorchOperators(torch.float32), "cpu"), torch.device("cpu"), torch.float8_e4m3fn)
    gpu = GpuOperators(torch.float32, DEVICE, "triton")
    found = logits(model(gpu, DEVICE.type), DEVICE, torch.float8_e4m3fn)
    # A key between two numbers of e4m3 may be rounded to either.
    assert (found - expected).norm() / expected.norm() < 5e-3
    assert found.argmax(1).equal(expected.argmax(1))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
DENSE = {
    # Neighbours, and a part of each head.
    "glm4": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 5.0},
    "olmo3": {"sliding_window": 7, "num_key_value_heads": 9},
    "gemma4": {
        "family": "gemma4_text",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 7,
        "global_head_dim": 48,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 24,
        "vocab_size_per_layer_input": TOKENIZER_SIZE,
    },
    "gemma4-moe": {
        "family": "gemma4_text",
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "global_head_dim": 48,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "ministral3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5}},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_bias": True, "conv_L_cache": 4},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 24,
        "mamba_d_state": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
        "residual_multiplier": 0.3,
    },
    "nemotron_h": {  # whose experts have no gate
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": None,
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "ssm_state_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
    },
}


@pytest.mark.parametrize("family", DENSE)
def test_logits_of_dense_families(tmp_path: Path, family: str) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    folder = make_hf_folder(tmp_path, **{"family": family, **sizes, **DENSE[family]})
    spec = load_spec(folder)

    def model(operators: Operators, device: str) -> DecoderModel:
        return DecoderModel(spec, load_weights(folder, spec, "auto", torch.float32, device=device), operators)

    expected = logits(model(TorchOperators(torch.float32), "cpu"), torch.device("cpu"), torch.float32)
    gpu = GpuOperators(torch.float32, DEVICE, "triton")
    found = logits(model(gpu, DEVICE.type), DEVICE, torch.float32)
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert found.argmax(1).equal(expected.argmax(1))


SPARSE = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "glm4_moe": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 3,
        "topk_group": 2,
        "moe_intermediate_size": 32,
        "use_qk_norm": True,
    },
    "lfm2_moe": {
        "layer_types": ["full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "minimax_m2": {"num_local_experts": 5, "num_experts_per_tok": 2, "rotary_dim": 16},
    "deepseek_v3": {
        "num_key_value_heads": 9,
        "head_dim": 12,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 12,
        "qk_nope_head_dim": 20,
        "v_head_dim": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 3,
        "topk_group": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}


@pytest.mark.parametrize(
    ("family", "form"),
    [*((family, form) for family in SPARSE for form in (None, "fp8")), ("qwen2_moe", "awq")],
)
def test_logits_of_mixtures_of_experts(tmp_path: Path, family: str, form: str | None) -> None:
    """With a cache of float32 nothing is rounded. Of codes every matrix but routers stays packed."""
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    plain = make_hf_folder(tmp_path / "plain", family, **{**sizes, **SPARSE[family]})
    folder = plain
    if form is not None:
        folder = tmp_path / form
        load_script("quantize_checkpoint").quantize_folder(plain, folder, form, 32)
    spec = load_spec(folder)

    def model(operators: Operators, device: str) -> DecoderModel:
        weights = load_weights(folder, spec, "auto", torch.float32, device=device, packed=operators.packed)
        kept = isinstance(weights["layers.1.experts_down"], (ScaledTensor, CodedTensor))
        assert kept == (form is not None and ScaledTensor in operators.packed)
        return DecoderModel(spec, weights, operators)

    expected = logits(model(TorchOperators(torch.float32), "cpu"), torch.device("cpu"), torch.float32)
    gpu = GpuOperators(torch.float32, DEVICE, "triton")
    found = logits(model(gpu, DEVICE.type), DEVICE, torch.float32)
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert found.argmax(1).equal(expected.argmax(1))


@pytest.mark.parametrize(("packed", "cache"), [(True, torch.float32), (False, torch.float8_e4m3fn)], ids=str)
def test_logits_of_gpt_oss(tmp_path: Path, packed: bool, cache: torch.dtype) -> None:
    """Sinks, a window shorter than the prompt, biases, and experts in MXFP4, packed or not."""
    folder = make_hf_folder(
        tmp_path,
        "gpt_oss",
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        head_dim=32,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=7,
    )
    to_mxfp4(folder)
    spec = load_spec(folder)

    def model(operators: Operators, device: str) -> DecoderModel:
        kinds = operators.packed if packed else ()
        weights = load_weights(folder, spec, "auto", torch.float32, device=device, packed=kinds)
        found = sum(isinstance(weight, Mxfp4Tensor) for weight in weights.values())
        assert found == (4 if kinds else 0)
        return DecoderModel(spec, weights, operators)

    expected = logits(model(TorchOperators(torch.float32), "cpu"), torch.device("cpu"), cache)
    found = logits(model(GpuOperators(torch.float32, DEVICE, "triton"), DEVICE.type), DEVICE, cache)
    assert (found - expected).norm() / expected.norm() < (1e-4 if cache == torch.float32 else 2e-2)
    assert found.argmax(1).equal(expected.argmax(1))
