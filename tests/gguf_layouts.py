"""Writes folders of small random models as the GGUF files that llama.cpp's converter makes of them.

Names of tensors are those of gguf's own tables; what the converter changes beside them is here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from safetensors.numpy import load_file
from tiny_models import add_tokenizer

Config = dict[str, Any]
Tensors = Iterator[tuple[str, Any]]


class Layout(NamedTuple):
    """How the files of a family differ from its folders.

    metadata: the keys beside `common`, without the architecture; tensors: a stored tensor of a folder -> what
    takes its place, under names of the folder's kind.
    """

    architecture: gguf.MODEL_ARCH
    metadata: Callable[[Config], Config]
    tensors: Callable[[Config, str, Any], Tensors]


def write(
    path: Path,
    folder: Path,
    quantization: str = "F32",
    changes: Config | None = None,
    tensors: Config | None = None,
) -> Path:
    """Write the file of a folder. `changes` replace metadata, None leaves a key out; `tensors` are added."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    layout = LAYOUTS[config["model_type"]]
    architecture = gguf.MODEL_ARCH_NAMES[layout.architecture]
    # One more layer than the model has, which predicts further tokens.
    names = gguf.get_tensor_name_map(layout.architecture, config["num_hidden_layers"] + 1)
    writer = gguf.GGUFWriter(path, architecture)
    add_tokenizer(writer, config["vocab_size"])
    for key, value in {**common(config), **layout.metadata(config), **(changes or {})}.items():
        if value is not None:
            _add(writer, f"{architecture}.{key}", value)
    kind = gguf.GGMLQuantizationType[quantization]
    weights = stacked(load_file(folder / "model.safetensors"))
    for stored, values in weights.items():
        for new, each in layout.tensors(config, stored, values):
            stem, _, suffix = new.rpartition(".") if new.endswith((".weight", ".bias")) else (new, "", "")
            stem = names.get_name(stem) or stem
            whole = each.ndim < 2 or each.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] or "_inp" in stem
            wide = gguf.GGMLQuantizationType.F32 if whole or "conv1d" in stem else kind
            each = np.ascontiguousarray(each)
            full = f"{stem}.{suffix}" if suffix else stem
            if full not in (tensors or {}):
                writer.add_tensor(full, gguf.quants.quantize(each, wide), raw_dtype=wide)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    for kind, add in (
        (bool, writer.add_bool),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (list, writer.add_array),
    ):
        if isinstance(value, kind):
            add(key, value)
            return
    raise TypeError(f"no way to write {key}")


def stacked(weights: dict[str, Any]) -> dict[str, Any]:
    """The matrices of a layer's experts as one, under the name without the expert's number."""
    found: dict[str, dict[int, Any]] = {}
    plain = {}
    for name, values in weights.items():
        before, is_of_experts, rest = name.partition(".experts.")
        number, _, role = rest.partition(".")
        if is_of_experts and number.isdecimal():
            found.setdefault(f"{before}.experts.{role}", {})[int(number)] = values
        else:
            plain[name] = values
    return plain | {name: np.stack([of[i] for i in range(len(of))]) for name, of in found.items()}


def common(config: Config) -> Config:
    """What all files have."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config.get("intermediate_size"),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }
    if rope["rope_type"] == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    return found


def unchanged(config: Config, name: str, values: Any) -> Tensors:
    yield name, values


# ---- hybrids ----------------------------------------------------------------------------------------


def hybrid(config: Config) -> Config:
    """Qwen3.5 and Qwen3-Next."""
    found = {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": config["linear_num_value_heads"],
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config["layer_types"]],
        "full_attention_interval": 4,
        "rope.dimension_sections": [11, 11, 10, 0],
    }
    if "num_experts" in config:
        found |= routed(config) | {
            "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        }
    return found


def routed(config: Config) -> Config:
    return {
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }


def in_turns(config: Config, values: Any, length: int) -> Any:
    """Rows of heads of values, which lie together by key head: one of each, then the next of each."""
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    rest = values.shape[1:]
    return values.reshape(keys, heads // keys, length, *rest).swapaxes(0, 1).reshape(values.shape)


def delta(config: Config, name: str, values: Any) -> Tensors:
    """Norms have their 1, heads of values are in turns."""
    first = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    length = config["linear_value_head_dim"]
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        values = values.reshape(len(values), -1)
        values = np.concatenate((values[:first], in_turns(config, values[first:], length)))
    elif name.endswith("in_proj_z.weight"):
        values = in_turns(config, values, length)
    elif name.endswith(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")):
        values = in_turns(config, values, 1)
    elif name.endswith("out_proj.weight"):
        values = in_turns(config, values.T, length).T
    yield from grouped_delta(config, name, values)


def grouped_delta(config: Config, name: str, values: Any) -> Tensors:
    """Norms have their 1, and of Qwen3-Next q, k, v and z are apart, of all heads."""
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        yield name, values + np.float32(1)
    elif name.endswith("A_log"):
        yield name, -np.exp(values)
    elif name.endswith("dt_bias"):
        yield name.replace("dt_bias", "dt_proj.bias"), values
    elif name.endswith("conv1d.weight"):
        yield name, values.reshape(len(values), -1)
    elif name.endswith("shared_expert_gate.weight"):
        yield name, values[0]
    elif name.endswith("in_proj_qkvz.weight"):
        keys, group = config["linear_num_key_heads"], config["linear_num_value_heads"]
        width = group // keys * config["linear_value_head_dim"]
        rows = values.reshape(keys, -1, values.shape[1])
        ends = np.cumsum([config["linear_key_head_dim"], config["linear_key_head_dim"], width])
        q, k, v, z = (each.reshape(-1, values.shape[1]) for each in np.split(rows, ends, 1))
        yield name.replace("in_proj_qkvz", "in_proj_qkv"), np.concatenate((q, k, v))
        yield name.replace("in_proj_qkvz", "in_proj_z"), z
    else:
        yield from apart(config, name, values)


def apart(config: Config, name: str, values: Any) -> Tensors:
    """Experts' gate and up, which folders may have in one matrix."""
    if "experts.gate_up_proj" in name:
        name = name.removesuffix(".weight") + ".weight"
        for part, rows in zip(("gate", "up"), np.split(values, 2, 1), strict=True):
            yield name.replace("gate_up", part), rows
    else:
        yield name + ".weight" * name.endswith("experts.down_proj"), values


# ---- experts ----------------------------------------------------------------------------------------


def deepseek_experts(config: Config) -> Config:
    return {
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_gating_func": 2,
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": config["norm_topk_prob"],
        "leading_dense_block_count": config.get("mlp_layer_types", []).count("dense")
        or config["first_k_dense_replace"],
    }


def latent(config: Config) -> Config:
    """DeepSeek's, of one head of keys and values for all of queries."""
    rank, rope_dim = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return deepseek_experts(config) | {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rope_dim,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope_dim,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "attention.q_lora_rank": config["q_lora_rank"],
        "rope.dimension_count": rope_dim,
        "rope.scaling.yarn_log_multiplier": 0.1 * config["rope_parameters"].get("mscale_all_dim", 0.0),
    }


def corrected(config: Config, name: str, values: Any) -> Tensors:
    """The correction of a choice is a bias of its own."""
    if name.endswith("e_score_correction_bias"):
        yield name.replace("_bias", ".bias"), values
    elif name.endswith("bias"):
        yield name, values
    else:
        yield from apart(config, name, values)


def split_latent(config: Config, name: str, values: Any) -> Tensors:
    """What makes keys and values of latents is two matrices, that of the keys by columns."""
    if not name.endswith("kv_b_proj.weight"):
        yield from corrected(config, name, values)
        return
    nope = config["qk_nope_head_dim"]
    heads = values.reshape(config["num_attention_heads"], -1, values.shape[1])
    yield name.replace("kv_b_proj", "k_b_proj"), heads[:, :nope].swapaxes(1, 2)
    yield name.replace("kv_b_proj", "v_b_proj"), heads[:, nope:]


def minimax(config: Config) -> Config:
    return {
        "expert_count": config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_gating_func": 2,
        "rope.dimension_count": config["rotary_dim"],
    }


def ernie(config: Config) -> Config:
    return {
        "expert_count": config["moe_num_experts"],
        "expert_used_count": config["moe_k"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["moe_num_shared_experts"],
        "expert_shared_feed_forward_length": config["moe_intermediate_size"]
        * config["moe_num_shared_experts"],
        "interleave_moe_layer_step": config["moe_layer_interval"],
        "leading_dense_block_count": config["moe_layer_start_index"],
    }


def olmoe(config: Config) -> Config:
    return {"expert_count": config["num_experts"], "expert_used_count": config["num_experts_per_tok"]}


# ---- dense ------------------------------------------------------------------------------------------


def olmo(config: Config) -> Config:
    return {
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
        "rope.freq_base_swa": float(config["rope_parameters"]["sliding_attention"]["rope_theta"]),
    }


def gemma2(config: Config) -> Config:
    return {
        "attention.sliding_window": config["sliding_window"],
        "attn_logit_softcapping": config["attn_logit_softcapping"],
        "final_logit_softcapping": config["final_logit_softcapping"],
    }


def ministral(config: Config) -> Config:
    rope = config["rope_parameters"]
    return {
        "rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"],
        "attention.temperature_scale": rope["llama_4_scaling_beta"],
    }


def one_more(config: Config, name: str, values: Any) -> Tensors:
    """Norms of Gemma have the 1 that is added to them."""
    yield name, values + np.float32(1) if name.endswith("norm.weight") else values


def neighbours(config: Config, name: str, values: Any) -> Tensors:
    """Rows of q and k that are rotated against each other are neighbours, as in Llama's files."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = values.reshape(-1, 2, config["head_dim"] // 2, values.shape[1])
        values = heads.swapaxes(1, 2).reshape(values.shape)
    yield name, values


ARCH = gguf.MODEL_ARCH
LAYOUTS = {
    "qwen3_5_text": Layout(ARCH.QWEN35, hybrid, delta),
    "qwen3_5_moe_text": Layout(ARCH.QWEN35MOE, hybrid, delta),
    "qwen3_next": Layout(ARCH.QWEN3NEXT, hybrid, grouped_delta),
    "glm4_moe": Layout(ARCH.GLM4_MOE, deepseek_experts, corrected),
    "deepseek_v3": Layout(ARCH.DEEPSEEK2, latent, split_latent),
    "glm4_moe_lite": Layout(ARCH.DEEPSEEK2, latent, split_latent),
    "minimax_m2": Layout(ARCH.MINIMAXM2, minimax, corrected),
    "ernie4_5_moe": Layout(ARCH.ERNIE4_5_MOE, ernie, corrected),
    "olmoe": Layout(ARCH.OLMOE, olmoe, unchanged),
    "olmo3": Layout(ARCH.OLMO2, olmo, unchanged),
    "gemma2": Layout(ARCH.GEMMA2, gemma2, one_more),
    "ministral3": Layout(ARCH.MISTRAL3, ministral, neighbours),
}
