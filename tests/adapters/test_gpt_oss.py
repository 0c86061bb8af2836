"""gpt-oss in files: its keys, its experts in bfloat16's layout, in MXFP4 and in GGUF, and bad ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from model_tools import generate_ids, make_engine, make_prompts
from mxfp4_folder import edit_config, edit_tensors, to_mxfp4
from refusals import refusal
from safetensors.torch import load_file
from test_shards import assert_shards_agree
from tiny_models import TOKENIZER_SIZE, make_hf_folder, write_gguf

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import load_spec
from microvllm.adapters.tensors import WHOLE, Shard
from microvllm.adapters.weights import load_weights
from microvllm.ops.mxfp4 import BLOCK, Mxfp4Tensor, quantize, values
from microvllm.ops.quantized import QuantizedTensor

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 9,
}
EXPERTS = "model.layers.1.mlp.experts"
PROMPTS = make_prompts(5, TOKENIZER_SIZE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("gpt-oss") / "hf", "gpt_oss", **SIZES)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


@pytest.fixture
def packed(folder: Path) -> Path:
    to_mxfp4(folder)
    return folder


def problem(model: Path) -> str:
    return refusal(lambda: load_weights(model, load_spec(model), "auto", torch.float32))


# ---- config.json ----------------------------------------------------------------------------------

BAD_KEYS: list[tuple[str, Any, str]] = [
    ("swiglu_limit", 5.0, "other than 7 is not supported"),
    ("swiglu_alpha", 1.0, "other than 1.702 is not supported"),
    ("sliding_window", None, "is null, but every second layer has one"),
    ("sliding_window", 0, "must be a positive integer"),
    ("num_experts_per_tok", 4, "is 4, but there are 3 experts"),
    ("attention_bias", 1, "must be true or false"),
    ("attention_bias", None, "must be true or false, got None"),
    ("rope_parameters", {}, "is empty"),
    ("hidden_act", "gelu", "must be silu"),
    ("layer_types", ["full_attention"], "must list one kind for each of the 2 layers"),
    ("quantization_config", {"quant_method": "mxfp8"}, "is not supported: .*mxfp4"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_KEYS)
def test_a_bad_key_is_named(folder: Path, key: str, value: Any, message: str) -> None:
    edit_config(folder, **{key: value})
    with pytest.raises(
        ModelFileError, match=rf"config\.json: (quantization_config\.quant_method|{key}) .*{message}"
    ):
        load_spec(folder)


def test_what_older_files_leave_out_and_what_the_authors_write(folder: Path) -> None:
    """Of the configurations of both sizes: a scaling beside its base, keys of another name, and no kinds."""
    spec = load_spec(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rotary = config.pop("rope_parameters")
    for key in ("layer_types", "swiglu_limit", "swiglu_alpha", "attention_bias"):
        config.pop(key, None)
    theta = rotary.pop("rope_theta")
    more = {"initial_context_length": 4096, "experts_per_token": 2, "swiglu_limit": 7.0}
    path.write_text(json.dumps({**config, **more, "rope_scaling": rotary, "rope_theta": theta}))
    assert load_spec(folder) == spec
    path.write_text(json.dumps(config))
    assert load_spec(folder) == spec
    assert [layer.mixer.window for layer in spec.layers] == [9, None]
    assert not spec.layers[0].mixer.rope.truncate and spec.max_position == config["max_position_embeddings"]


# ---- MXFP4 ----------------------------------------------------------------------------------------


def test_values_are_those_of_transformers_and_of_ggml() -> None:
    """All codes with scales from the smallest to the largest that give numbers of float32."""
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.tensor([0, 1, 2, 3, 60, 104, 119, 126, 127, 128, 129, 140, 200, 250, 251, 251])
    scales = scales.to(torch.uint8).view(16, 1)
    ours = values(codes, scales, torch.float32)
    theirs = integration._convert_moe_packed_tensors(
        codes.view(1, 16, 1, 16), scales.view(1, 16, 1), dtype=torch.float32
    )
    assert torch.equal(ours, theirs[0].T)
    halves = codes.int()
    nibbles = torch.stack((halves & 15, halves >> 4), -1).view(16, 32)
    blocks = torch.cat((scales, (nibbles[:, :16] | nibbles[:, 16:] << 4).to(torch.uint8)), 1)
    ggml = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(ours, torch.from_numpy(ggml))
    assert values(codes[:1], torch.tensor([[255]]), torch.float32).isnan().all()


def test_rounding_gives_the_nearest_numbers() -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[2], weight[3, :32] = 0, 1e-40
    codes, scales = quantize(weight)
    assert codes.shape == (7, 48) and scales.shape == (7, 3)
    rounded = values(codes, scales, torch.float32)
    step = 2.0 ** (scales.float() - 127).repeat_interleave(BLOCK, 1)
    # Numbers above 5 are 2 apart, and the largest is below 8.
    assert ((rounded - weight).abs() <= torch.where(weight.abs() > 5 * step, 2 * step, step)).all()
    again = quantize(rounded)
    assert torch.equal(values(*again, torch.float32), rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_mxfp4_are_the_values_of_transformers(folder: Path, dtype: torch.dtype) -> None:
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    rounded = to_mxfp4(folder)
    stored = load_file(folder / "model.safetensors")
    weights = load_weights(folder, load_spec(folder), "auto", dtype)
    for role, slot in (("gate_up_proj", "experts_gate_up"), ("down_proj", "experts_down")):
        name = f"{EXPERTS}.{role}"
        theirs = integration._convert_moe_packed_tensors(
            stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.float32
        )
        assert torch.equal(theirs, rounded[name])
        rows = theirs.transpose(1, 2)
        if role == "gate_up_proj":
            rows = torch.cat((rows[:, ::2], rows[:, 1::2]), 1)
        assert torch.equal(weights[f"layers.1.{slot}"], rows.flatten(0, 1).to(dtype))


@pytest.mark.parametrize("shard", [WHOLE, Shard(1, 2)])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 288, "num_local_experts": 2}])
def test_packed_experts_stand_for_the_same_values(
    tmp_path: Path, sizes: dict[str, int], shard: Shard
) -> None:
    """Rows that end within a run of words, and rows and columns of a shard."""
    folder = make_hf_folder(tmp_path, "gpt_oss", **{**SIZES, **sizes, "num_attention_heads": 4})
    to_mxfp4(folder)
    spec = load_spec(folder)
    packed = load_weights(folder, spec, "auto", torch.bfloat16, packed=(Mxfp4Tensor,), shard=shard)
    plain = load_weights(folder, spec, "auto", torch.bfloat16, shard=shard)
    for name, weight in packed.items():
        if "experts" in name and "bias" not in name:
            assert isinstance(weight, Mxfp4Tensor)
            assert weight.dequantized(torch.bfloat16).equal(plain[name])
        else:
            assert weight.equal(plain[name])
    made = load_weights(folder, spec, "dummy", torch.bfloat16, packed=(Mxfp4Tensor,), shard=shard)
    dense = load_weights(folder, spec, "dummy", torch.bfloat16, shard=shard)
    weight = made["layers.1.experts_down"]
    assert isinstance(weight, Mxfp4Tensor)
    assert weight.dequantized(torch.bfloat16).equal(dense["layers.1.experts_down"])


def test_what_is_not_packed(packed: Path, tmp_path: Path) -> None:
    """A scale above 2, rows that are no whole blocks, and a shard that cuts a block's columns."""
    path = packed / "model.safetensors"
    scales = load_file(path)[f"{EXPERTS}.down_proj_scales"]
    scales[0, 3, 1] = 129
    edit_tensors(packed, **{f"{EXPERTS}.down_proj_scales": scales})

    def kinds(folder: Path, shard: Shard = WHOLE) -> list[bool]:
        weights = load_weights(
            folder, load_spec(folder), "auto", torch.float32, packed=(Mxfp4Tensor,), shard=shard
        )
        names = (f"layers.{i}.experts_{role}" for i in range(2) for role in ("gate_up", "down"))
        return [isinstance(weights[name], Mxfp4Tensor) for name in names]

    assert kinds(packed) == [True, True, True, False]
    odd = make_hf_folder(tmp_path / "odd", "gpt_oss", **{**SIZES, "intermediate_size": 96})
    to_mxfp4(odd)
    assert kinds(odd, Shard(0, 2)) == [True, False] * 2


@pytest.mark.parametrize("plain_layers", [(), (1,)])
def test_mxfp4_gives_the_tokens_of_its_values(
    folder: Path, tmp_path: Path, plain_layers: tuple[int, ...]
) -> None:
    """Also where a layer's experts are not quantised (`modules_to_not_convert`)."""
    dense = Path(shutil.copytree(folder, tmp_path / "dense"))
    rounded = to_mxfp4(folder, plain_layers=plain_layers)
    edit_tensors(dense, **rounded)
    expected = generate_ids(make_engine(dense), PROMPTS)
    assert len({tuple(tokens) for tokens in expected}) > 3
    for backend in ("torch", "cpu"):
        assert generate_ids(make_engine(folder, attention_backend=backend), PROMPTS) == expected
    assert generate_ids(make_engine(folder, quantization="mxfp4"), PROMPTS[:1]) == expected[:1]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_shards_of_mxfp4(tmp_path: Path, backend: str) -> None:
    """The columns of `down` are cut through a block, too."""
    folder = make_hf_folder(tmp_path, "gpt_oss", **{**SIZES, "hidden_size": 128, "intermediate_size": 96})
    to_mxfp4(folder)
    assert_shards_agree(folder, backend)


def test_a_bad_tensor_is_named(packed: Path) -> None:
    path = packed / "model.safetensors"
    good = load_file(path)
    blocks, scales = (good[f"{EXPERTS}.down_proj_{kind}"] for kind in ("blocks", "scales"))
    nan, large = scales.clone(), scales.clone()
    nan[1, 2, 0], large[2, 5, 1] = 255, 253
    cases: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({f"{EXPERTS}.down_proj_scales": nan}, "down_proj_scales has a scale that is no number"),
        ({f"{EXPERTS}.down_proj_scales": large}, r"down_proj_scales has a scale of 2 \*\* 126, too large"),
        ({f"{EXPERTS}.down_proj_scales": None}, "tensor .*down_proj_scales is missing"),
        ({f"{EXPERTS}.down_proj_scales": scales[:, :, :1]}, r"down_proj_scales has shape \[3, 96, 1\], but"),
        (
            {f"{EXPERTS}.down_proj_scales": scales.int()},
            "down_proj_scales is stored as I32, but .* asks for U8",
        ),
        ({f"{EXPERTS}.down_proj_blocks": blocks[:2]}, r"down_proj_blocks has shape \[2, 96, 2, 16\], but"),
        (
            {f"{EXPERTS}.down_proj": torch.zeros(3, 64, 96)},
            "down_proj is there, although quantization_config",
        ),
        ({f"{EXPERTS}.down_proj_bias": None}, "tensor .*down_proj_bias is missing"),
        ({"model.layers.0.self_attn.sinks": None}, "tensor .*sinks is missing"),
        ({"model.layers.0.self_attn.sinks": torch.zeros(5)}, r"sinks has shape \[5\], but"),
    ]
    for changes, message in cases:
        edit_tensors(packed, **changes)
        with pytest.raises(ModelFileError, match=message):
            load_weights(packed, load_spec(packed), "auto", torch.float32)
        edit_tensors(packed, **{name: good.get(name) for name in changes})
    load_weights(packed, load_spec(packed), "auto", torch.float32)


def test_codes_without_a_configuration_and_rows_of_no_whole_blocks(packed: Path, tmp_path: Path) -> None:
    edit_config(packed, quantization_config=None)
    assert "gate_up_proj" in problem(packed)
    odd = make_hf_folder(tmp_path / "odd", "gpt_oss", **{**SIZES, "hidden_size": 80})
    edit_config(odd, quantization_config={"quant_method": "mxfp4"})
    assert "rows of 80 weights are not whole blocks of 32" in problem(odd)


def test_another_number_of_experts_than_configured(folder: Path) -> None:
    edit_config(folder, num_local_experts=4)
    assert "has shape [3," in problem(folder)


# ---- GGUF -----------------------------------------------------------------------------------------


def test_a_gguf_file_gives_the_tokens_of_its_folder(folder: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", folder)
    expected = generate_ids(make_engine(folder), PROMPTS)
    for backend in ("torch", "cpu"):
        assert generate_ids(make_engine(file, attention_backend=backend), PROMPTS) == expected


def test_a_gguf_file_in_mxfp4_gives_the_tokens_of_its_folder(folder: Path, tmp_path: Path) -> None:
    """Experts in the file's blocks by the CPU's kernels, and dequantised."""

    def blocks(name: str, weights: Any) -> tuple[str, Any] | None:
        if not name.endswith("_exps.weight"):
            return None
        return "MXFP4", gguf.quants.quantize(weights, gguf.GGMLQuantizationType.MXFP4)

    file = write_gguf(tmp_path / "model.gguf", folder, blocks=blocks)
    to_mxfp4(folder)
    expected = generate_ids(make_engine(folder, attention_backend="torch"), PROMPTS)
    for options in ({"attention_backend": "torch"}, {"gguf_weights": "dequantized"}, {}):
        assert generate_ids(make_engine(file, **options), PROMPTS) == expected
    weights = load_weights(file, load_spec(file), "auto", torch.float32, packed=(QuantizedTensor,))
    assert isinstance(weights["layers.1.experts_down"], QuantizedTensor)


def test_a_cpu_keeps_the_blocks(packed: Path) -> None:
    """The bytes that ggml has for the same numbers, gate before up."""
    weights = load_weights(packed, load_spec(packed), "auto", torch.bfloat16, packed=(QuantizedTensor,))
    plain = load_weights(packed, load_spec(packed), "auto", torch.float32)
    for role, parts in (("gate_up", 6), ("down", 3)):
        kept = weights[f"layers.1.experts_{role}"]
        assert isinstance(kept, QuantizedTensor) and len(kept.parts) == parts
        raw = kept.as_subclass(torch.Tensor).numpy().reshape(-1, kept.columns // 32 * 17)
        found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
        assert torch.from_numpy(found).equal(plain[f"layers.1.experts_{role}"])


def test_random_weights_have_sinks_and_biases(folder: Path) -> None:
    weights = load_weights(folder, load_spec(folder), "dummy", torch.float32)
    assert weights["layers.0.sinks"].shape == (4,) and weights["layers.1.experts_down_bias"].shape == (
        3 * 96,
    )
    assert generate_ids(make_engine(folder, load_format="dummy"), PROMPTS[:1], 4)
    assert np.isfinite(weights["layers.0.sinks"].numpy()).all()
