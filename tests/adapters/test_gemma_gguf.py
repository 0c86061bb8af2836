"""Gemma 3 and 4 from GGUF files, named by gguf's own tables, give the tokens of their folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from model_tools import VARIANTS, generate_ids, make_engine, make_prompts
from safetensors.numpy import load_file
from tiny_models import QUANTIZABLE, TOKENIZER_SIZE, add_tokenizer, make_hf_folder

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import load_spec

PROMPTS = make_prompts(5, TOKENIZER_SIZE, longest=70)


def folder_of(path: Path, variant: str) -> Path:
    return make_hf_folder(path, **{**VARIANTS[variant], **QUANTIZABLE, "dtype": "float32"})


def write(path: Path, folder: Path, quantization: str = "F32", **changes: Any) -> Path:
    """The file that llama.cpp's converter makes of a folder; `changes` replace metadata."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    name, layers = config["model_type"].removesuffix("_text"), config["num_hidden_layers"]
    architecture = gguf.MODEL_ARCH.GEMMA4 if name == "gemma4" else gguf.MODEL_ARCH.GEMMA3
    names = gguf.get_tensor_name_map(architecture, layers)
    writer = gguf.GGUFWriter(path, name)
    add_tokenizer(writer, config["vocab_size"])
    for key, value in {**metadata(config), **changes}.items():
        if isinstance(value, list):
            writer.add_array(f"{name}.{key}", value)
        else:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{name}.{key}", value)
    kind = gguf.GGMLQuantizationType[quantization]
    for stored, values in tensors(config, load_file(folder / "model.safetensors")):
        suffix = ".scale" if stored.endswith("scale") else ".weight"
        stem = stored.removesuffix(".weight").replace("router.scale", "router.proj")
        stem = names.get_name(stem.replace("router.per_expert_scale", "experts.down_proj")) or stem
        wide = kind if values.ndim > 1 and "inp" not in stem else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stem + suffix, gguf.quants.quantize(values, wide), raw_dtype=wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(config: dict[str, Any], weights: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Norms of Gemma 3 have the 1 that is added to them; Gemma 4 has divisors, 1e30 of what does not turn."""
    for name, values in weights.items():
        is_norm = config["model_type"] == "gemma3_text" and name.endswith("norm.weight")
        yield name, values + np.float32(1) if is_norm else values
    if config["model_type"] == "gemma4_text":
        turning = int(
            config["rope_parameters"]["full_attention"]["partial_rotary_factor"] * full_dim(config) // 2
        )
        divisors = [1.0] * turning + [1e30] * (full_dim(config) // 2 - turning)
        yield "rope_freqs.weight", np.array(divisors, dtype=np.float32)


def full_dim(config: dict[str, Any]) -> int:
    return int(next(iter(config["per_layer_config"].values()))["head_dim"])


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What both architectures have, and of Gemma 4 what differs between layers."""
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    rope = config["rope_parameters"]
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": slides,
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
    }
    if config["final_logit_softcapping"]:
        found["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    if config["model_type"] == "gemma3_text":
        return found
    sizes = {"head_dim": config["head_dim"], "num_key_value_heads": config["num_key_value_heads"]}
    own = [{**sizes, **config["per_layer_config"].get(str(i), {})} for i in range(len(slides))]
    first, wide = len(slides) - config["num_kv_shared_layers"], config["use_double_wide_mlp"]
    found |= {
        "attention.head_count_kv": [each["num_key_value_heads"] for each in own],
        "feed_forward_length": [
            config["intermediate_size"] * (2 if wide and index >= first else 1)
            for index in range(len(slides))
        ],
        "attention.key_length": full_dim(config),
        "attention.value_length": full_dim(config),
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "rope.dimension_count": full_dim(config),
        "rope.dimension_count_swa": config["head_dim"],
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
    }
    if config["enable_moe_block"]:
        found |= {
            "expert_count": config["num_experts"],
            "expert_used_count": config["top_k_experts"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
    return found


@pytest.mark.parametrize("variant", ["gemma3", "gemma4", "gemma4-shared", "gemma4-moe"])
def test_the_tokens_of_a_file_are_those_of_its_folder(tmp_path: Path, variant: str) -> None:
    changes: dict[str, Any] = {}
    options = {**VARIANTS[variant], **QUANTIZABLE}
    if (
        variant == "gemma3"
    ):  # whose files scale by the head size, and whose linear factor only full layers have
        options["query_pre_attn_scalar"] = 32
        changes = {"rope.scaling.factor": 8.0, "rope.scale_linear": 8.0}
    folder = make_hf_folder(tmp_path / "hf", **options)
    file = write(tmp_path / "model.gguf", folder, **changes)
    assert generate_ids(make_engine(file), PROMPTS, 16) == generate_ids(make_engine(folder), PROMPTS, 16)


@pytest.mark.parametrize(
    ("variant", "key", "size"),
    [("gemma4-shared", "hidden_size_per_layer_input", 32), ("gemma4-moe", "moe_intermediate_size", 64)],
)
def test_blocks_stand_for_the_values_that_they_are_dequantised_to(
    tmp_path: Path, variant: str, key: str, size: int
) -> None:
    """Of all matrices, as their rows are whole blocks."""
    options = {**VARIANTS[variant], **QUANTIZABLE, "global_head_dim": 64, key: size}
    file = write(tmp_path / "model.gguf", make_hf_folder(tmp_path / "hf", **options), "Q8_0")
    kept, widened = (make_engine(file, gguf_weights=weights) for weights in ("auto", "dequantized"))
    assert generate_ids(kept, PROMPTS, 12) == generate_ids(widened, PROMPTS, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention.sliding_window_pattern": [True]},
            "gemma4.attention.sliding_window_pattern must list each",
        ),
        (
            {"attention.head_count_kv": [3, 3]},
            "gemma4.attention.head_count_kv must be a size, or one for each",
        ),
        (
            {"attention.head_count_kv": [3, 3, 3, 1, 3]},
            "gemma4.attention.shared_kv_layers leaves no layer like 3",
        ),
        ({"attention.shared_kv_layers": 5}, "gemma4.attention.shared_kv_layers must be below block_count 5"),
        ({"attention.shared_kv_layers": 4}, "gemma4.attention.shared_kv_layers leaves no layer like"),
        (
            {"attention.value_length_swa": 16},
            "gemma4.attention.value_length_swa differs from the head size 32",
        ),
        ({"attention.key_length": 46}, "gemma4.attention.value_length differs from the head size 46"),
        (
            {"expert_count": 2, "expert_used_count": 3},
            "gemma4.expert_used_count is 3, but there are 2 experts",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "model.gguf", folder_of(tmp_path / "hf", "gemma4-shared"), **changes)
    with pytest.raises(ModelFileError) as error:
        load_spec(file)
    assert message in str(error.value)
