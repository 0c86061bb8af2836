"""`load_spec` of families that are Llama but for a few keys: real configurations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import VARIANTS, generate_ids, make_engine, make_prompts
from safetensors.torch import load_file, save_file
from tiny_models import TOKENIZER_SIZE, make_hf_folder, write_gguf

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.layers.mamba2 import Mamba2
from microvllm.adapters.registry import load_spec
from microvllm.adapters.rope_spec import RopeSpec
from microvllm.adapters.spec import ModelSpec

COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 12800,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 49159,
}
# Of the makers' files, what is not in `COMMON` and changes the model.
SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_hidden_layers": 36,
    "rope_theta": 5e6,
    "sliding_window": None,
    "use_sliding_window": False,
}
GRANITE = {
    "architectures": ["GraniteForCausalLM"],
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "logits_scaling": 16.0,
    "max_position_embeddings": 131072,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1e7,
    "tie_word_embeddings": True,
}
GRANITE_4 = {
    **GRANITE,
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "layer_types": ["attention"] * 40,
    "num_local_experts": 0,
    "position_embedding_type": "rope",
    "shared_intermediate_size": 8192,
}
GRANITE_4H = {
    **GRANITE_4,
    "intermediate_size": 8192,
    "hidden_size": 2048,
    "layer_types": ["mamba"] * 39 + ["attention"],
    "mamba_d_head": 64,
    "mamba_n_heads": 64,
}
SEED_OSS = {
    "architectures": ["SeedOssForCausalLM"],
    "attention_bias": True,
    "attention_out_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "num_attention_heads": 80,
    "residual_dropout": 0.1,
    "rope_scaling": {"rope_type": "default"},
    "rope_theta": 1e7,
}
GLM4 = {
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [49151, 49155, 49158],
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
}
OLMO3 = {
    "architectures": ["Olmo3ForCausalLM"],
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 10,
    "max_position_embeddings": 65536,
    "num_key_value_heads": 32,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
}
MINISTRAL3: dict[str, Any] = {
    "architectures": ["Ministral3ForCausalLM"],
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "sliding_window": None,
}
PHI4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    "sliding_window": 262144,
}


def folder(path: Path, config: dict[str, Any], **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**COMMON, **config, **changes}), "utf-8")
    return path


def spec_of(path: Path, config: dict[str, Any], **changes: Any) -> ModelSpec:
    return load_spec(folder(path, config, **changes))


def test_smollm3(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, SMOLLM3)
    assert [layer.mixer.rope.rotary_dim for layer in spec.layers] == [None, None, None, 0] * 9
    assert {mixer.rope.theta for mixer in spec.mixers} == {5e6} and spec.tie_embeddings
    implied = spec_of(tmp_path, {**SMOLLM3, "no_rope_layers": None})
    assert implied == spec
    windows = {"use_sliding_window": True, "sliding_window": 100, "layer_types": None}
    spec = spec_of(tmp_path, {**SMOLLM3, **windows})
    assert [layer.mixer.window for layer in spec.layers] == [None, None, None, 100] * 9


def test_granite(tmp_path: Path) -> None:
    """Hidden states are kept divided by the residual multiplier: so are the embeddings, and the epsilon."""
    spec = spec_of(tmp_path, GRANITE)
    assert spec.embedding_scale == pytest.approx(12 / 0.22)
    assert spec.rms_norm_eps == pytest.approx(1e-5 / 0.22**2)
    assert (spec.logits_scale, spec.layers[0].mixer.scale) == (1 / 16, 1 / 128)


def test_dense_granite_4(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GRANITE_4)
    assert {layer.mlp.size for layer in spec.layers} == {8192}
    assert spec.mixers == spec_of(tmp_path, GRANITE).mixers
    (mixer,) = spec_of(tmp_path, GRANITE_4, position_embedding_type="nope").mixers
    assert mixer.rope.rotary_dim == 0


def test_granite_4_with_mamba(tmp_path: Path) -> None:
    """The norm inside of a mixer is over numbers that no multiplier divides."""
    spec = spec_of(tmp_path, GRANITE_4H, num_local_experts=8, mamba_d_head="auto", mamba_d_state=128)
    layer, last = spec.layers[0], spec.layers[-1]
    assert layer.mixer == Mamba2(
        num_heads=64, head_dim=64, num_groups=1, state_size=128, conv_size=4, eps=1e-5
    )
    assert (layer.mlp.count, layer.mlp.size, layer.mlp.shared_size) == (8, 8192, 8192)
    assert last.mlp == layer.mlp and last.mixer == spec.mixers[0] and last.mixer.scale == 1 / 128
    assert spec.rms_norm_eps == pytest.approx(1e-5 / 0.22**2)


def test_seed_oss(tmp_path: Path) -> None:
    mixer = spec_of(tmp_path, SEED_OSS).layers[0].mixer
    assert (mixer.qkv_bias, mixer.o_bias, mixer.head_dim, mixer.q_size) == (True, False, 128, 10240)


def test_glm_4(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GLM4)
    mixer, layer = spec.layers[0].mixer, spec.layers[0]
    assert mixer.rope == RopeSpec(theta=10000.0, rotary_dim=64, interleaved=True)
    assert (layer.pre_norms, layer.post_norms, mixer.qkv_bias, mixer.o_bias) == (True, True, False, False)
    order = [j for start, stop in mixer.rope.order(128) for j in range(start, stop)]
    assert sorted(order) == list(range(128))
    # What is rotated against each other lies half a head apart.
    assert [(order[j], order[j + 64]) for j in range(32)] == [(2 * j, 2 * j + 1) for j in range(32)]


def test_olmo_3(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, OLMO3)
    local, full = spec.mixers
    assert [layer.mixer for layer in spec.layers] == [local, local, local, full] * 10
    assert (local.window, full.window, spec.max_position, spec.rms_norm_eps) == (4096, None, 65536, 1e-5)
    assert local.rope == RopeSpec(theta=5e5)
    assert (full.rope.scaling, full.rope.attention_factor) == ("yarn", 1.2079441541679836)
    assert local.whole_qk_norm and full.whole_qk_norm
    assert {(layer.pre_norms, layer.post_norms) for layer in spec.layers} == {(False, True)}
    assert spec_of(tmp_path, OLMO3, layer_types=None) == spec


def test_ministral_3(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, MINISTRAL3)
    (mixer,) = spec.mixers
    assert (mixer.temperature, mixer.rope.scaling, spec.max_position) == ((0.1, 16384), "yarn", 262144)
    assert mixer.rope.attention_factor == 1.0
    (implied,) = spec_of(tmp_path, MINISTRAL3, rope_parameters=None).mixers
    assert implied == mixer
    cold = {**MINISTRAL3["rope_parameters"], "llama_4_scaling_beta": 0}
    assert spec_of(tmp_path, MINISTRAL3, rope_parameters=cold).mixers[0].temperature is None


def test_phi_4_mini(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, PHI4_MINI)
    rope = spec.layers[0].mixer.rope
    assert (rope.rotary_dim, rope.scaling, spec.default_length) == (96, "longrope", 4096)
    assert rope.attention_factor == pytest.approx(1.1902380714238083)  # of 32 times the context


YARN_OF_BASE_1 = {
    "granite.rope.scaling.type": "yarn",
    "granite.rope.scaling.factor": 4.0,
    "granite.rope.freq_base": 1.0,
}
SLIDING_SMOLLM3 = {**SMOLLM3, "sliding_window": 512, "layer_types": ["sliding_attention"] * 36}
BAD = [
    (SMOLLM3, "no_rope_layers", [1, 0], "must list 0 or 1 for each of the 36 layers"),
    (SMOLLM3, "no_rope_layers", [2] * 36, "must list 0 or 1 for each of the 36 layers"),
    (SMOLLM3, "layer_types", ["linear_attention"] * 36, "names 'linear_attention'"),
    (GRANITE, "residual_multiplier", 0, "must be a finite number above 0"),
    (GRANITE, "logits_scaling", "16", "must be a finite number above 0"),
    (GRANITE, "partial_rotary_factor", 0.5, "other than 1 is not supported"),
    (GRANITE_4, "layer_types", ["mamba"] * 40, "has no attention"),
    (GRANITE_4, "layer_types", ["mamba2"] * 40, "names 'mamba2', which is not supported"),
    (GRANITE_4, "layer_types", None, "must list one kind for each of the 40 layers"),
    (GRANITE_4, "layer_types", ["attention"], "must list one kind for each of the 40 layers"),
    (GRANITE_4, "num_local_experts", "x", "num_local_experts must be a positive integer"),
    (GRANITE_4H, "mamba_d_head", 48, "of 48 with mamba_n_heads 64 do not make up mamba_expand times"),
    (GRANITE_4H, "mamba_n_heads", 60, "do not make up mamba_expand times hidden_size, 4096"),
    (GRANITE_4H, "mamba_n_groups", 3, "mamba_n_heads 64 is not a multiple of mamba_n_groups 3"),
    (GRANITE_4H, "time_step_limit", [0.0, 1.0], "other than"),
    (GRANITE_4, "position_embedding_type", "alibi", "must be rope or nope"),
    (SEED_OSS, "attention_out_bias", 1, "must be true or false"),
    (SLIDING_SMOLLM3, "use_sliding_window", False, "is false, but layer_types names sliding_attention"),
    (GLM4, "partial_rotary_factor", 1.5, "must be a finite number"),
    (GLM4, "partial_rotary_factor", 0.01, "of a head of 128 is not an even number of elements"),
    (GLM4, "rope_parameters", {"mrope_section": [8, 12, 12]}, "is not a key of rotary scaling"),
    (GLM4, "num_experts", 8, "has no experts here"),
    (OLMO3, "rope_parameters", {"rope_type": "default"}, "rope_type must be one of full_attention"),
    (OLMO3, "rope_parameters", {"full_attention": {}}, "is not supported beside rope_parameters"),
    (OLMO3, "sliding_window", 0, "must be a positive integer"),
    (MINISTRAL3, "layer_types", ["full_attention"] * 40, "is not supported"),
    (MINISTRAL3, "rope_parameters", {"llama_4_scaling_beta": -1}, "must be a finite number above 0"),
    (PHI4_MINI, "partial_rotary_factor", 0.5, "must list 32 numbers above 0"),
]


@pytest.mark.parametrize(("config", "key", "value", "said"), BAD)
def test_a_bad_key_is_named(tmp_path: Path, config: dict[str, Any], key: str, value: Any, said: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        spec_of(tmp_path, config, **{key: value})
    message = str(caught.value)
    assert said in message and "\n" not in message
    assert key in message or "rope_scaling.short_factor" in message


@pytest.mark.parametrize(
    ("family", "metadata", "said"),
    [
        ("glm4", {"glm4.rope.dimension_sections": 3}, "glm4.rope.dimension_sections is not supported"),
        ("glm4", {"glm4.rope.dimension_count": 33}, "differs from the head size 32"),
        ("glm4", {"glm4.rope.dimension_count": 15}, "differs from the head size 32"),
        ("seed_oss", {"seed_oss.rope.dimension_count": 16}, "differs from the head size 32"),
        ("granite", YARN_OF_BASE_1, "granite.rope.freq_base must be above 1 for yarn"),
        ("granite", {"granite.residual_scale": -1.0}, "granite.residual_scale must be a finite number"),
    ],
)
def test_a_bad_key_of_a_gguf_file_is_named(
    tmp_path: Path, family: str, metadata: dict[str, Any], said: str
) -> None:
    source = make_hf_folder(tmp_path / "hf", family, num_hidden_layers=1)
    with pytest.raises(ModelFileError) as caught:
        load_spec(write_gguf(tmp_path / "model.gguf", source, extra_metadata=metadata))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_multipliers_of_a_gguf_file_that_are_0_are_none(tmp_path: Path) -> None:
    source = make_hf_folder(tmp_path / "hf", "granite", num_hidden_layers=1)
    keys = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    nothing = {f"granite.{key}": 0.0 for key in keys}
    spec = load_spec(write_gguf(tmp_path / "model.gguf", source, extra_metadata=nothing))
    assert (spec.embedding_scale, spec.logits_scale) == (1.0, 1.0)
    assert spec.layers[0].attention.scale == 32**-0.5


def test_ministral_3_as_it_is_published(tmp_path: Path) -> None:
    """Its tensors and its configuration lie inside of a model that also reads images, which are left out."""
    options = {key: value for key, value in VARIANTS["ministral3"].items() if key != "family"}
    plain = make_hf_folder(tmp_path / "plain", "ministral3", **options)
    whole = tmp_path / "whole"
    whole.mkdir()
    for file in plain.iterdir():
        (whole / file.name).write_bytes(file.read_bytes())
    stored = load_file(plain / "model.safetensors")
    tensors = {f"language_model.{name}": each for name, each in stored.items()}
    tensors["vision_tower.patch_conv.weight"] = torch.ones(2)
    save_file(tensors, whole / "model.safetensors")
    text = json.loads((plain / "config.json").read_text("utf-8"))
    config: dict[str, Any] = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {**text, "architectures": None},
        "vision_config": {"model_type": "pixtral"},
    }
    (whole / "config.json").write_text(json.dumps(config), "utf-8")
    assert load_spec(whole).layers == load_spec(plain).layers
    prompts = make_prompts(4, TOKENIZER_SIZE)
    assert generate_ids(make_engine(whole), prompts) == generate_ids(make_engine(plain), prompts)
    config["text_config"]["model_type"] = "llama"
    (whole / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ModelFileError, match=r"text_config\.model_type must be one of mistral, ministral3"):
        load_spec(whole)


def test_mistral_small_3_1(tmp_path: Path) -> None:
    text = {**COMMON, "model_type": "mistral", "head_dim": 128, "sliding_window": None, "rope_theta": 1e9}
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    spec = load_spec(tmp_path)
    (mixer,) = spec.mixers
    assert (spec.architecture, mixer.window, mixer.temperature, mixer.rope.theta) == (
        "mistral3",
        None,
        None,
        1e9,
    )
