"""Blocks of a GGUF file that a GPU multiplies as they are: `CodedTensor`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_hf_folder, write_gguf

from microvllm.adapters.registry import load_spec
from microvllm.adapters.tensors import WHOLE, Shard
from microvllm.adapters.weights import load_weights
from microvllm.ops.coded import CodedTensor


@pytest.mark.parametrize("quantization", ["Q4_0", "Q8_0", "Q5_0"])
@pytest.mark.parametrize("rank", [None, 1])
def test_blocks_as_codes_are_the_same_values(
    tmp_path: Path, quantization: str, rank: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of q and k change places, parts are joined, shards cut; other types become plain, with a line."""
    folder = make_hf_folder(tmp_path / "hf", "llama", hidden_size=288, intermediate_size=384)
    file = write_gguf(tmp_path / "model.gguf", folder, quantization=quantization)
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
    if quantization == "Q5_0":
        assert not coded and "matrices in Q5_0 become float32 as they are loaded" in caplog.text
    else:
        assert coded - {"lm_head"} == layers
