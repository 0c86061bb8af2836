"""Hybrids, latent attention and experts from GGUF files in the layouts of llama.cpp's converter."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_layouts import write
from model_tools import VARIANTS, generate_ids, make_engine, make_prompts
from tiny_models import TOKENIZER_SIZE, make_hf_folder

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.registry import load_spec
from microvllm.adapters.weights import load_weights
from microvllm.ops.coded import CodedTensor

PROMPTS = make_prompts(3, TOKENIZER_SIZE, longest=50)
# As far as the configurations of `VARIANTS` have no keys in GGUF files, and with rows in whole blocks.
BLOCKS: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 6}
HEADS = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "num_hidden_layers": 4}
OLMO_ROPE = VARIANTS["olmo3"]["rope_parameters"]
LN_8 = {"attention_factor": 1 + 0.1 * math.log(8)}  # llama.cpp computes it from yarn's factor
DEEPSEEK_ROPE = VARIANTS["deepseek-v3"]["rope_parameters"]
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3.5": {**HEADS, "attention_bias": True},
    "qwen3.5-moe": {**HEADS, "shared_expert_intermediate_size": 32},
    "qwen3-next": {**HEADS, "moe_intermediate_size": 32, "mlp_only_layers": []},
    "glm4-moe": {"moe_intermediate_size": 32},
    "deepseek-v3": {
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 32),
        "num_key_value_heads": 6,
        "moe_intermediate_size": 32,
        "rope_parameters": {**DEEPSEEK_ROPE, "mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "glm4-moe-lite": {
        **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 32),
        "num_key_value_heads": 6,
        "moe_intermediate_size": 32,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rms_norm_eps": 1e-6,
    },
    "minimax-m2": {"intermediate_size": 32},
    "ernie-moe": {"moe_intermediate_size": 32},
    "olmoe": {"intermediate_size": 32},
    "olmo3": {"rope_parameters": {**OLMO_ROPE, "full_attention": {**OLMO_ROPE["full_attention"], **LN_8}}},
    "gemma2": {"query_pre_attn_scalar": 32},
    "ministral3": {},
}


def folder_of(path: Path, variant: str, **options: Any) -> Path:
    return make_hf_folder(path, **{**VARIANTS[variant], **BLOCKS, **CHANGES[variant], **options})


@pytest.mark.parametrize("variant", CHANGES)
def test_the_tokens_of_a_file_are_those_of_its_folder(tmp_path: Path, variant: str) -> None:
    folder = folder_of(tmp_path / "hf", variant)
    file = write(tmp_path / "model.gguf", folder)
    expected = generate_ids(make_engine(folder), PROMPTS, 12)
    assert generate_ids(make_engine(file), PROMPTS, 12) == expected


@pytest.mark.parametrize("variant", ["qwen3.5", "qwen3-next", "deepseek-v3", "minimax-m2"])
def test_blocks_stay_packed_and_stand_for_their_values(tmp_path: Path, variant: str) -> None:
    file = write(tmp_path / "model.gguf", folder_of(tmp_path / "hf", variant), "Q8_0")
    kept, widened = (
        make_engine(file, gguf_weights=weights, attention_backend="cpu")
        for weights in ("auto", "dequantized")
    )
    assert generate_ids(kept, PROMPTS, 8) == generate_ids(widened, PROMPTS, 8)


def test_codes_of_a_gpu_are_the_values_of_blocks(tmp_path: Path) -> None:
    """Of heads of values that change places, too."""
    sizes = {"linear_value_head_dim": 64, "num_hidden_layers": 2}
    kinds = ["linear_attention", "full_attention"]
    folder = folder_of(tmp_path / "hf", "qwen3.5", **sizes, layer_types=kinds)
    file = write(tmp_path / "model.gguf", folder, "Q8_0")
    spec = load_spec(file)
    plain = load_weights(file, spec, "auto", torch.float32)
    coded = load_weights(file, spec, "auto", torch.float32, packed=(CodedTensor,))
    assert isinstance(coded["layers.0.delta_qkvz"], CodedTensor)
    assert isinstance(coded["layers.0.delta_out"], CodedTensor)
    for name, weight in coded.items():
        values = weight.dequantized(torch.float32) if isinstance(weight, CodedTensor) else weight
        assert values.equal(plain[name]), name


@pytest.mark.parametrize("variant", ["qwen3.5", "glm4-moe"])
def test_layers_for_drafts_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, variant: str
) -> None:
    folder = folder_of(tmp_path / "hf", variant)
    count = load_spec(folder).num_layers
    changes = {"block_count": count + 1, "nextn_predict_layers": 1}
    extra = {f"blk.{count}.nextn.eh_proj.weight": np.ones((96, 192))}
    file = write(tmp_path / "model.gguf", folder, changes=changes, tensors=extra)
    with caplog.at_level(logging.WARNING):
        assert generate_ids(make_engine(file), PROMPTS, 4) == generate_ids(make_engine(folder), PROMPTS, 4)
    assert f"tensor blk.{count}.nextn.eh_proj.weight is left out on purpose" in caplog.text
    other = write(tmp_path / "other.gguf", folder, changes={"block_count": count}, tensors=extra)
    with pytest.raises(ModelFileError, match=r"nextn\.eh_proj\.weight is there, but not used"):
        load_weights(other, load_spec(other), "auto", torch.float32)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3.5", {"ssm.group_count": None}, "qwen35.ssm.group_count is missing"),
    ("qwen3.5", {"ssm.group_count": 4}, "qwen35.ssm.time_step_rank 6 is not a multiple of ssm.group_count 4"),
    ("qwen3.5", {"ssm.inner_size": 191}, "ssm.inner_size 191 is not a multiple of ssm.time_step_rank"),
    ("qwen3.5", {"ssm.conv_kernel": 1}, "qwen35.ssm.conv_kernel must be at least 2, got 1"),
    ("qwen3.5", {"attention.recurrent_layers": [True]}, "recurrent_layers must list true or false"),
    ("qwen3.5", {"attention.recurrent_layers": [True] * 4}, "leaves no layer with attention"),
    ("qwen3.5", {"attention.recurrent_layers": None, "full_attention_interval": 5}, "leaves no layer"),
    ("qwen3.5", {"nextn_predict_layers": 4}, "nextn_predict_layers must be a number below block_count 4"),
    ("qwen3.5", {"expert_count": 4}, "qwen35.expert_count is set, which only"),
    ("qwen3.5-moe", {"expert_count": None}, "qwen35moe.expert_count is missing"),
    ("qwen3.5-moe", {"expert_gating_func": 2}, "qwen35moe.expert_gating_func must be 1, for a softmax"),
    ("qwen3.5-moe", {"expert_weights_norm": False}, "qwen35moe.expert_weights_norm must be true"),
    ("qwen3.5-moe", {"expert_shared_feed_forward_length": None}, "shared_feed_forward_length is missing"),
    ("glm4-moe", {"expert_gating_func": 4}, "glm4moe.expert_gating_func 4 is not supported"),
    ("glm4-moe", {"expert_used_count": 7}, "glm4moe.expert_used_count is 7, but there are 6 experts"),
    ("glm4-moe", {"expert_group_count": 5}, "glm4moe.expert_group_count 5 does not divide the 12 experts"),
    ("glm4-moe", {"expert_group_used_count": 5}, "expert_group_used_count is 5, but there are 4 groups"),
    ("glm4-moe", {"expert_gating_func": 1}, "expert_group_count is above 1, which is supported for sigmoids"),
    ("glm4-moe", {"leading_dense_block_count": True}, "leading_dense_block_count must be an integer"),
    ("deepseek-v3", {"attention.key_length_mla": None}, "deepseek2.attention.key_length_mla is missing"),
    ("deepseek-v3", {"attention.key_length_mla": 12}, "key_length_mla must be above rope.dimension_count 12"),
    ("deepseek-v3", {"attention.key_length": 48}, "attention.key_length must be 44 for latent keys"),
    ("deepseek-v3", {"attention.head_count_kv": 6}, "attention.head_count_kv must be 1 for latent keys"),
    ("deepseek-v3", {"rope.dimension_count": 11}, "rope.dimension_count must be even"),
    ("deepseek-v3", {"rope.scaling.yarn_log_multiplier": None}, "yarn_log_multiplier is missing"),
    ("deepseek-v3", {"rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor other than 1"),
    ("deepseek-v3", {"attention.temperature_scale": 0.1}, "attention.temperature_scale is set"),
    ("minimax-m2", {"expert_feed_forward_length": None}, "expert_feed_forward_length is missing"),
    ("ernie-moe", {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step must be a positive integer"),
    ("ernie-moe", {"expert_gating_func": 2}, "ernie4_5-moe.expert_gating_func must be 1, for a softmax"),
    ("olmoe", {"expert_weights_norm": True}, "olmoe.expert_weights_norm must be false"),
    ("olmo3", {"attention.sliding_window_pattern": [True]}, "sliding_window_pattern must list each of the 4"),
    ("olmo3", {"rope.scaling.yarn_attn_factor": 1.1}, "must be 1 or 1.20794, got 1.1"),
    ("ministral3", {"rope.scaling.original_context_length": None}, "original_context_length is missing"),
    ("gemma2", {"attn_logit_softcapping": None}, "gemma2.attn_logit_softcapping is missing"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "gemma2.final_logit_softcapping must be a finite number"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = dict.fromkeys(variant for variant, _, _ in BAD)
    return {name: folder_of(tmp_path_factory.mktemp("hf"), name) for name in names}


@pytest.mark.parametrize(("variant", "changes", "said"), BAD)
def test_a_bad_key_is_named(
    tmp_path: Path, folders: dict[str, Path], variant: str, changes: dict[str, Any], said: str
) -> None:
    file = write(tmp_path / "model.gguf", folders[variant], changes=changes)
    with pytest.raises(ModelFileError) as caught:
        load_spec(file)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "tensors", "said"),
    [
        ("qwen3.5", {"blk.0.ssm_a": np.zeros(6)}, "tensor blk.0.ssm_a has decays that are not below 0"),
        ("qwen3.5", {"blk.0.ssm_in.weight": np.ones((8, 8))}, "blk.0.ssm_in.weight is there, but not used"),
        ("deepseek-v3", {"blk.0.attn_kv_b.weight": [1]}, "blk.0.attn_kv_b.weight is there, but not used"),
    ],
)
def test_a_bad_tensor_is_named(
    tmp_path: Path, folders: dict[str, Path], variant: str, tensors: dict[str, Any], said: str
) -> None:
    file = write(tmp_path / "model.gguf", folders[variant], tensors=tensors)
    with pytest.raises(ModelFileError) as caught:
        load_weights(file, load_spec(file), "auto", torch.float32)
    assert said in str(caught.value)


def test_a_softmax_chooses_in_files_that_do_not_say(tmp_path: Path, folders: dict[str, Path]) -> None:
    """As in DeepSeek-V2's."""
    absent = dict.fromkeys(("expert_gating_func", "expert_group_count", "expert_group_used_count"))
    spec = load_spec(write(tmp_path / "model.gguf", folders["deepseek-v3"], changes=absent))
    found = [layer.mlp.routing.sigmoid for layer in spec.layers if isinstance(layer.mlp, Experts)]
    assert found == [False, False]
