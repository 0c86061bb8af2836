"""Mixtures of experts in files: keys, tensors of each expert, GGUF's stacks, quantised and bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import generate_ids, load_script, make_engine, make_prompts
from refusals import refusal
from safetensors.torch import load_file, save_file
from tiny_models import TOKENIZER_SIZE, make_hf_folder, write_gguf

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.registry import load_spec
from microvllm.adapters.weights import load_weights
from microvllm.ops.quantized import QuantizedTensor
from microvllm.ops.scaled import ScaledTensor

QWEN3 = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
PROMPTS = make_prompts(6, TOKENIZER_SIZE)
EXPERT = "model.layers.1.mlp.experts"


def family(path: Path, name: str, **options: Any) -> Path:
    return make_hf_folder(
        path, name, **{"hidden_size": 96, **(QWEN3 if "qwen" in name else MIXTRAL), **options}
    )


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return family(tmp_path / "hf", "qwen3_moe")


def problem(model: Path) -> str:
    return refusal(lambda: load_weights(model, load_spec(model), "auto", torch.float32))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Tensors by name; None takes one away."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_mixtral_has_a_base_of_its_own(tmp_path: Path) -> None:
    path = family(tmp_path / "hf", "mixtral")
    edit_config(path, rope_parameters={})
    assert load_spec(path).mixers[0].rope.theta == 1e6


# ---- config.json ----------------------------------------------------------------------------------

BAD_KEYS: list[tuple[str, Any, str]] = [
    ("num_experts_per_tok", 5, "is 5, but there are 4 experts"),
    ("num_experts_per_tok", 0, "must be a positive integer"),
    ("num_local_experts", "4", "must be a positive integer"),
    ("num_local_experts", 1 << 20, "must be a positive integer and at most 16384"),
    ("moe_intermediate_size", -1, "must be a positive integer"),
    ("norm_topk_prob", 1, "must be true or false"),
    ("mlp_only_layers", [3], "must list layers from 0 to 2, got a list"),
    ("mlp_only_layers", 1, "must list layers"),
    ("decoder_sparse_step", 0, "must be a positive integer"),
    ("shared_expert_intermediate_size", 64, "is set: only Qwen2-MoE has shared experts"),
    ("n_shared_experts", 1, "is set: experts of that kind are not supported"),
    ("scoring_func", "sigmoid", "is set: experts of that kind"),
    ("routed_scaling_factor", 2.5, "is set: experts of that kind"),
    ("n_group", 8, "is set: experts of that kind"),
    ("hidden_act", "gelu", "must be silu"),
]


@pytest.mark.parametrize(("key", "value", "said"), BAD_KEYS)
def test_a_bad_key_is_named(qwen3: Path, key: str, value: Any, said: str) -> None:
    edit_config(qwen3, **{key: value})
    with pytest.raises(ModelFileError) as caught:
        load_spec(qwen3)
    assert str(caught.value).startswith(f"{qwen3 / 'config.json'}: {key} {said}")


def test_two_counts_that_differ(qwen3: Path) -> None:
    edit_config(qwen3, num_experts=4, num_local_experts=6)
    with pytest.raises(ModelFileError, match="num_local_experts is 6, but num_experts is 4"):
        load_spec(qwen3)


def test_experts_of_a_family_without_them(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path, "llama")
    edit_config(folder, num_local_experts=4)
    with pytest.raises(ModelFileError, match="num_local_experts is set, but this family has no experts here"):
        load_spec(folder)


def test_which_layers_have_experts(qwen3: Path) -> None:
    edit_config(qwen3, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    spec = load_spec(qwen3)
    assert [isinstance(layer.mlp, Experts) for layer in spec.layers] == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    assert spec.layers[0].mlp == MLP(size=160)


def test_work_counts_the_chosen_experts_alone(qwen3: Path) -> None:
    layer = load_spec(qwen3).layers[0].mlp
    assert layer.num_products(96) == 96 * (4 + 3 * 2 * 64)


# ---- tensors --------------------------------------------------------------------------------------


def test_a_missing_expert(qwen3: Path) -> None:
    edit_tensors(qwen3, **{f"{EXPERT}.2.up_proj.weight": None})
    assert f"tensor {EXPERT}.2.up_proj.weight is missing" in problem(qwen3)


def test_an_expert_of_another_shape(qwen3: Path) -> None:
    edit_tensors(qwen3, **{f"{EXPERT}.2.up_proj.weight": torch.zeros(32, 96)})
    assert f"tensor {EXPERT}.2.up_proj.weight has shape [32, 96], but" in problem(qwen3)


@pytest.mark.parametrize("count", [3, 6])
def test_another_number_of_experts_than_in_the_file(qwen3: Path, count: int) -> None:
    edit_config(qwen3, num_local_experts=count)
    message = problem(qwen3)
    assert f"asks for {count} experts (num_experts or num_local_experts or n_routed_experts" in message
    assert message.endswith("but the checkpoint has experts 0 to 3")


def test_an_expert_in_two_files(qwen3: Path) -> None:
    name = f"{EXPERT}.2.up_proj.weight"
    (qwen3 / "model.safetensors").rename(qwen3 / "a.safetensors")
    save_file({name: torch.zeros(64, 96)}, qwen3 / "b.safetensors")
    assert f"tensor '{name}' is also in a.safetensors" in problem(qwen3)


def test_the_experts_of_a_layer_lie_one_after_another(tmp_path: Path) -> None:
    folder = family(tmp_path, "qwen3_moe", num_experts=16, moe_intermediate_size=512, num_hidden_layers=2)
    spec = load_spec(folder)
    stacked = load_weights(folder, spec, "auto", torch.float32)["layers.0.experts_gate_up"]
    assert stacked.shape == (16 * 2 * 512, 96)
    stored = load_file(folder / "model.safetensors")
    for expert in (0, 7, 15):
        rows = stacked[expert * 1024 :][:1024]
        for role, part in zip(("gate", "up"), rows.chunk(2), strict=True):
            assert torch.equal(part, stored[f"model.layers.0.mlp.experts.{expert}.{role}_proj.weight"])


# ---- GGUF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_a_gguf_file_gives_the_tokens_of_its_folder(tmp_path: Path, name: str) -> None:
    options = {"norm_topk_prob": False, "shared_expert_intermediate_size": 96} if name == "qwen2_moe" else {}
    folder = family(tmp_path / "hf", name, **options)
    file = write_gguf(tmp_path / "model.gguf", folder)
    assert load_spec(file).layers[0].mlp == load_spec(folder).layers[0].mlp
    assert generate_ids(make_engine(file), PROMPTS) == generate_ids(make_engine(folder), PROMPTS)


@pytest.mark.parametrize(
    ("name", "quantization"), [("qwen3_moe", "Q8_0"), ("qwen3_moe", "Q4_0"), ("qwen2_moe", "Q8_0")]
)
def test_packed_experts_are_those_of_the_dequantised_file(
    tmp_path: Path, name: str, quantization: str
) -> None:
    """The experts stay in their blocks, and the router in float32."""
    options = {"shared_expert_intermediate_size": 96} if name == "qwen2_moe" else {}
    folder = family(tmp_path / "hf", name, **options)
    file = write_gguf(tmp_path / "model.gguf", folder, quantization=quantization)
    weights = load_weights(file, load_spec(file), "auto", torch.bfloat16, packed=(QuantizedTensor,))
    kept = weights["layers.1.experts_gate_up"]
    assert isinstance(kept, QuantizedTensor) and len(kept.parts) == 2 * len(weights["layers.1.router"])
    assert weights["layers.1.router"].dtype == torch.float32
    packed = generate_ids(make_engine(file, attention_backend="cpu"), PROMPTS)
    plain = make_engine(file, attention_backend="torch", gguf_weights="dequantized")
    assert packed == generate_ids(plain, PROMPTS)


BAD_METADATA: list[tuple[str, Any, str]] = [
    ("expert_used_count", 5, "is 5, but there are 4 experts"),
    ("expert_gating_func", 2, "2 is not supported"),
    ("expert_weights_scale", 2.5, "2.5 is not supported"),
    ("expert_shared_count", 1, "1 is not supported"),
    ("expert_group_count", 4, "4 is not supported"),
    ("leading_dense_block_count", 1, "1 is not supported"),
]


@pytest.mark.parametrize(("key", "value", "said"), BAD_METADATA)
def test_a_bad_key_of_a_gguf_file_is_named(
    qwen3: Path, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    file = write_gguf(tmp_path / "m.gguf", qwen3, extra_metadata={f"qwen3moe.{key}": value})
    with pytest.raises(ModelFileError) as caught:
        load_spec(file)
    assert str(caught.value).startswith(f"{file}: qwen3moe.{key} {said}")


def test_a_gguf_file_of_other_experts_than_it_says(qwen3: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", qwen3, extra_metadata={"qwen3moe.expert_count": 6})
    message = problem(file)
    assert "has shape [4, 96]" in message or "has shape [4, 64, 96]" in message


def test_experts_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "hf", "qwen3")
    file = write_gguf(tmp_path / "m.gguf", folder, extra_metadata={"qwen3.expert_count": 4})
    with pytest.raises(ModelFileError, match=r"qwen3\.expert_count is set, which only llama, qwen2moe"):
        load_spec(file)


# ---- quantised folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fp8", "fp8-block", "awq", "gptq-4", "compressed-fp8-channel", "w4a16"])
@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
def test_quantised_experts_are_dequantised_as_they_are_loaded(tmp_path: Path, name: str, form: str) -> None:
    """Each matrix is the one that its format stands for; routers stay plain."""
    shared = {"shared_expert_intermediate_size": 96} if name == "qwen2_moe" else {}
    folder = family(tmp_path / "hf", name, **shared)
    values = load_script("quantize_checkpoint").quantize_folder(folder, tmp_path / "quantised", form, 32)
    before = load_file(folder / "model.safetensors")
    weights = load_weights(tmp_path / "quantised", load_spec(tmp_path / "quantised"), "auto", torch.float32)
    block = "model.layers.1.mlp" if name == "qwen2_moe" else "model.layers.1.block_sparse_moe"
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if name == "qwen2_moe" else ("w1", "w3", "w2")
    for slot, roles in (("experts_gate_up", (gate, up)), ("experts_down", (down,))):
        parts = [values[f"{block}.experts.{e}.{role}.weight"] for e in range(4) for role in roles]
        assert weights[f"layers.1.{slot}"].equal(torch.cat(parts))
    assert weights["layers.1.router"].equal(before[f"{block}.gate.weight"])
    if shared:
        assert weights["layers.1.shared_down"].equal(values[f"{block}.shared_expert.down_proj.weight"])
        assert weights["layers.1.shared_scale"].equal(before[f"{block}.shared_expert_gate.weight"])
    assert all(generate_ids(make_engine(tmp_path / "quantised"), PROMPTS, 4))


@pytest.mark.parametrize("form", ["fp8", "fp8-block"])
def test_experts_in_fp8_stay_packed_where_the_device_multiplies_codes(tmp_path: Path, form: str) -> None:
    folder = family(tmp_path / "hf", "qwen3_moe", moe_intermediate_size=128, hidden_size=256)
    values = load_script("quantize_checkpoint").quantize_folder(folder, tmp_path / "fp8", form, 32)
    spec = load_spec(tmp_path / "fp8")
    weights = load_weights(tmp_path / "fp8", spec, "auto", torch.bfloat16, packed=(ScaledTensor,))
    down = weights["layers.1.experts_down"]
    assert isinstance(down, ScaledTensor) and weights["layers.1.router"].dtype == torch.bfloat16
    parts = [values[f"{EXPERT}.{e}.down_proj.weight"] for e in range(4)]
    assert down.dequantized(torch.float32).equal(torch.cat(parts))
