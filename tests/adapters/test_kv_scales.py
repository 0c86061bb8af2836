"""The scales of an FP8 KV cache in quantised folders, and the keys of config.json that announce them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import generate_ids, load_script, make_engine
from safetensors.torch import load_file, save_file
from tiny_models import make_hf_folder

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import load_spec
from microvllm.adapters.weights import load_weights
from microvllm.ops.attention.torch_backend import TorchAttention
from microvllm.runtime.worker.model_runner import ModelGraphRunner

quantize_checkpoint = load_script("quantize_checkpoint")
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
ATTENTION = "model.layers.{}.self_attn."
LLM_COMPRESSOR = (ATTENTION + "k_scale", ATTENTION + "v_scale")
MODELOPT = (ATTENTION + "k_proj.k_scale", ATTENTION + "v_proj.v_scale")
SCALES = [[0.5, 2.0], [0.25, 0.03125]]  # of the keys and the values of two layers


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    plain = make_hf_folder(folder / "plain", "llama", num_hidden_layers=2)
    quantize_checkpoint.quantize_folder(plain, folder / "fp8", "compressed-fp8-channel", 32)
    return folder / "fp8"


def with_scales(
    source: Path, target: Path, keys: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Load a copy whose configuration has these keys too, and whose file these tensors."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= keys
    (target / "config.json").write_text(json.dumps(config))
    return load_weights(target, load_spec(target), "auto", torch.float32)


def named(names: tuple[str, str], *, shape: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    return {
        name.format(layer): torch.full(shape, scale)
        for layer, scales in enumerate(SCALES)
        for name, scale in zip(names, scales, strict=True)
    }


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"kv_cache_scheme": SCHEME}, LLM_COMPRESSOR),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, MODELOPT),
        ({"kv_cache_quant_algo": "FP8"}, MODELOPT),
    ],
)
def test_scales_are_read_under_both_names(
    quantised: Path, tmp_path: Path, keys: dict[str, Any], names: tuple[str, str], shape: tuple[int, ...]
) -> None:
    weights = with_scales(quantised, tmp_path / "m", keys, named(names, shape=shape))
    assert [weights[f"layers.{i}.kv_scales"].tolist() for i in range(len(SCALES))] == SCALES


def test_scales_that_are_not_stored_are_one(
    quantised: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = with_scales(quantised, tmp_path / "m", {"kv_cache_scheme": SCHEME}, {})
    assert not any(name.endswith("kv_scales") for name in weights)
    assert "the scales of keys and values are not stored: they are 1" in caplog.text


@pytest.mark.parametrize(
    ("keys", "changes", "problem"),
    [
        ({}, {}, "k_scale, .* and 1 more are there, but not used"),
        ({"kv_cache_scheme": SCHEME}, {"1.v": None}, "tensor model.layers.1.self_attn.v_scale is missing"),
        ({"kv_cache_scheme": SCHEME}, {"0.k": torch.ones(3)}, r"k_scale has shape \[3\]"),
        ({"kv_cache_scheme": SCHEME}, {"0.k": torch.tensor(0.0)}, "k_scale is 0.0, not a scale above 0"),
        ({"kv_cache_scheme": SCHEME}, {"0.v": torch.tensor(float("nan"))}, "v_scale is nan"),
        ({"kv_cache_scheme": SCHEME}, {"0.v": torch.tensor(float("inf"))}, "v_scale is inf"),
        ({"kv_cache_scheme": SCHEME}, {"1.k": torch.tensor(1)}, "k_scale is not stored as a float"),
        ({"kv_cache_scheme": {**SCHEME, "num_bits": 4}}, {}, "kv_cache_scheme.num_bits must be 8, got 4"),
        ({"kv_cache_scheme": {**SCHEME, "type": "int"}}, {}, "kv_cache_scheme.type 'int' is not supported"),
        ({"kv_cache_scheme": {**SCHEME, "dynamic": True}}, {}, "kv_cache_scheme.dynamic is true"),
        ({"kv_cache_scheme": {**SCHEME, "symmetric": False}}, {}, "kv_cache_scheme.symmetric is false"),
        (
            {"kv_cache_scheme": {**SCHEME, "strategy": "attn_head"}},
            {},
            "kv_cache_scheme.strategy 'attn_head'",
        ),
        ({"kv_cache_scheme": "static"}, {}, "kv_cache_scheme must be an object"),
        ({"kv_cache_quant_algo": "NVFP4"}, {}, "kv_cache_quant_algo 'NVFP4' is not supported: FP8 is"),
    ],
)
def test_what_is_wrong_is_named(
    quantised: Path,
    tmp_path: Path,
    keys: dict[str, Any],
    changes: dict[str, torch.Tensor | None],
    problem: str,
) -> None:
    tensors: dict[str, torch.Tensor | None] = dict(named(LLM_COMPRESSOR))
    for place, tensor in changes.items():
        layer, letter = place.split(".")
        tensors[f"model.layers.{layer}.self_attn.{letter}_scale"] = tensor
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ModelFileError, match=problem):
        with_scales(quantised, tmp_path / "m", keys, kept)


def test_attention_divides_by_the_checkpoint_s_scales(quantised: Path, tmp_path: Path) -> None:
    """Such a checkpoint has such a cache without a flag; other scales, other numbers in it."""
    with_scales(quantised, tmp_path / "m", {"kv_cache_scheme": SCHEME}, named(LLM_COMPRESSOR))
    engine = make_engine(tmp_path / "m", attention_backend="torch")
    assert engine.config.kv_dtype == "float8_e4m3fn"
    runner = engine.core._runner
    assert isinstance(runner, ModelGraphRunner)
    backend = runner._device._attention
    assert isinstance(backend, TorchAttention)
    assert [list(scales) for scales in backend.scales] == SCALES
    generate_ids(engine, [[5, 6, 7]], 2)
    ones = make_engine(quantised, attention_backend="torch", kv_cache_dtype="fp8")
    plain = ones.core._runner
    assert isinstance(plain, ModelGraphRunner) and isinstance(plain._device._attention, TorchAttention)
    generate_ids(ones, [[5, 6, 7]], 2)
    kv_heads = backend.shape.num_kv_heads
    keys, of_ones = (each.cache[0, :kv_heads, :1].float() for each in (backend, plain._device._attention))
    assert of_ones.any()
    torch.testing.assert_close(keys, of_ones / SCALES[0][0], rtol=0.07, atol=1e-2)
