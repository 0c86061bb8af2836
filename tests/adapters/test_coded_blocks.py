"""Blocks of a GGUF file that a GPU multiplies as they are: `CodedTensor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from quantized_case import random_blocks
from tiny_models import make_hf_folder, write_gguf

from microvllm.adapters.registry import load_spec
from microvllm.adapters.tensors import WHOLE, Shard
from microvllm.adapters.weights import load_weights
from microvllm.ops.coded import CodedTensor


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1", "IQ4_NL"])
@pytest.mark.parametrize("rank", [None, 1])
def test_blocks_as_codes_are_the_same_values(
    tmp_path: Path, quantization: str, rank: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of q and k change places, parts are joined, shards cut; other types become plain, with a line."""
    folder = make_hf_folder(tmp_path / "hf", "llama", hidden_size=288, intermediate_size=384)

    def blocks(name: str, values: Any) -> tuple[str, Any] | None:
        """Of a type that gguf cannot write."""
        if quantization != "IQ4_NL" or values.ndim == 1 or "token_embd" in name:
            return None
        return quantization, random_blocks(quantization, len(values), values.shape[1] // 32, len(name))

    written = "F32" if quantization == "IQ4_NL" else quantization
    file = write_gguf(tmp_path / "model.gguf", folder, quantization=written, blocks=blocks)
    spec, shard = load_spec(file), WHOLE if rank is None else Shard(rank, 3)
    plain = load_weights(file, spec, "auto", torch.float32, shard=shard)
    kept = load_weights(file, spec, "auto", torch.float32, packed=(CodedTensor,), shard=shard)
    coded = {name for name, tensor in kept.items() if isinstance(tensor, CodedTensor)}
    for name, tensor in kept.items():
        found = tensor.dequantized(torch.float32) if isinstance(tensor, CodedTensor) else tensor
        assert found.equal(plain[name]), name
    layers = {
        f"layers.{i}.{name}" for i in range(spec.num_layers) for name in ("qkv", "o", "gate_up", "down")
    }
    if quantization == "IQ4_NL":
        assert not coded and "matrices in IQ4_NL become float32 as they are loaded" in caplog.text
    else:
        assert coded - {"lm_head"} == layers


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("most", "value"),
    [
        *((name, name) for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")),
        ("Q4_K", "Q6_K"),  # as in Q4_K_M
        ("Q3_K", "Q5_K"),  # as in Q3_K_M
        ("Q2_K", "Q3_K"),
        ("Q5_0", "Q6_K"),
        ("Q4_0", "Q4_1"),
        ("Q4_0", "Q8_0"),
    ],
)
def test_blocks_of_any_types_are_the_same_values(tmp_path: Path, most: str, value: str) -> None:
    """With any bits in their scales; also where one slot has matrices of two types."""
    folder = make_hf_folder(tmp_path / "hf", "qwen2", **SIZES)

    def blocks(name: str, values: Any) -> tuple[str, Any] | None:
        if values.ndim == 1 or "token_embd" in name:
            return None
        kind = value if "attn_v" in name else most
        width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        return kind, random_blocks(kind, values.shape[0], values.shape[1] // width, seed=len(name))

    file = write_gguf(tmp_path / "model.gguf", folder, blocks=blocks)
    spec = load_spec(file)
    plain = load_weights(file, spec, "auto", torch.float32)
    kept = load_weights(file, spec, "auto", torch.float32, packed=(CodedTensor,))
    coded = {name.rpartition(".")[2] for name, tensor in kept.items() if isinstance(tensor, CodedTensor)}
    assert coded - {"lm_head"} == {"qkv", "o", "gate_up", "down"}
    for name, tensor in kept.items():
        if not isinstance(tensor, CodedTensor):
            assert tensor.equal(plain[name]), name
            continue
        found = tensor.dequantized(torch.float32)
        # An offset is added to a product that was rounded, whichever of the two formulas the type has.
        bound = 2e-7 * plain[name].abs().max() if tensor.has_offsets else 0.0
        assert (found - plain[name]).abs().max() <= bound, name


@pytest.mark.parametrize(("most", "last"), [("Q4_0", "Q4_0"), ("Q4_K", "Q6_K"), ("Q4_K", "IQ4_XS")])
def test_experts_in_blocks_are_the_same_values(tmp_path: Path, most: str, last: str) -> None:
    """Those of a layer are two tensors of the model; of a type that is not kept, one of the two is plain."""
    sizes = {
        **SIZES,
        "num_hidden_layers": 2,
        "moe_intermediate_size": 256,
        "num_experts": 3,
        "num_experts_per_tok": 2,
    }
    folder = make_hf_folder(tmp_path / "hf", "qwen3_moe", **sizes)

    def blocks(name: str, values: Any) -> tuple[str, Any] | None:
        if "_exps" not in name:
            return None
        kind = last if "down" in name else most
        width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        raw = random_blocks(kind, values.shape[0] * values.shape[1], values.shape[2] // width, len(name))
        return kind, raw.reshape(*values.shape[:2], -1)

    file = write_gguf(tmp_path / "model.gguf", folder, blocks=blocks)
    spec = load_spec(file)
    plain = load_weights(file, spec, "auto", torch.float32)
    kept = load_weights(file, spec, "auto", torch.float32, packed=(CodedTensor,))
    for layer in range(2):
        assert isinstance(kept[f"layers.{layer}.experts_gate_up"], CodedTensor)
        assert isinstance(kept[f"layers.{layer}.experts_down"], CodedTensor) == (last != "IQ4_XS")
    for name, tensor in kept.items():
        if not isinstance(tensor, CodedTensor):
            assert tensor.equal(plain[name]), name
            continue
        bound = 2e-7 * plain[name].abs().max() if tensor.has_offsets else 0.0
        assert (tensor.dequantized(torch.float32) - plain[name]).abs().max() <= bound, name
