"""Gemma 4 beyond what `VARIANTS` compare: models of several parts, shared keys and values, and bad input."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import (
    VARIANTS,
    fewest_blocks,
    generate_ids,
    load_script,
    make_engine,
    make_prompts,
    variant_folder,
)
from safetensors.torch import load_file, save_file
from tiny_models import TOKENIZER_SIZE, make_hf_folder, randomize, reference, write_tokenizer

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import load_spec
from microvllm.runtime.errors import ConfigError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
PROMPTS = make_prompts(6, TOKENIZER_SIZE, longest=70)
# As published, beside the parts for images and audio.
E2B = {
    "attention_k_eq_v": False,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1536,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 6144,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_text",
    "num_attention_heads": 8,
    "num_global_key_value_heads": None,
    "num_hidden_layers": 35,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 512,
    "use_bidirectional_attention": None,
    "use_double_wide_mlp": True,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}


def write_parts(path: Path, model_type: str, text: dict[str, Any]) -> Path:
    """A model of several parts, as it lies on the hub: the language model's tensors under a prefix."""
    import transformers

    config = transformers.AutoConfig.for_model(
        model_type,
        text_config=text,
        vision_config=None if "unified" in model_type else SMALL | {"num_key_value_heads": 2, "head_dim": 16},
        audio_config=None,
        eos_token_id=text["eos_token_id"],
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, 1)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.mark.parametrize(
    ("model_type", "variant"), [("gemma4", "gemma4-shared"), ("gemma4_unified", "gemma4")]
)
def test_the_text_part_of_a_model_of_several(tmp_path: Path, model_type: str, variant: str) -> None:
    text = json.loads((variant_folder(variant) / "config.json").read_text("utf-8"))
    text["model_type"] = f"{model_type}_text"
    folder = write_parts(tmp_path / "parts", model_type, text)
    stored = load_file(folder / "model.safetensors")
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in stored
    tokens = generate_ids(make_engine(folder), PROMPTS, 12)
    model = reference(folder)
    for prompt, found in zip(PROMPTS, tokens, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + found])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == found


@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize("variant", ["gemma4", "gemma4-shared", "gemma4-moe"])
def test_other_sizes_in_chunks_preempted_and_on_prefix_hits(tmp_path: Path, variant: str, seed: int) -> None:
    """Prompts longer than a window and than a chunk, against transformers; the second time from the cache."""
    sizes = {"hidden_size": 92, "intermediate_size": 70, "num_attention_heads": 5, "num_key_value_heads": 1}
    options = {**VARIANTS[variant], **sizes, "head_dim": 22, "global_head_dim": 30, "seed": seed}
    folder = make_hf_folder(tmp_path / "hf", **options)
    blocks = fewest_blocks(folder, 104, 8, 13) + 1
    pool = {"num_gpu_blocks_override": blocks, "block_size": 8, "max_model_len": 104, "max_num_seqs": 6}
    engine = make_engine(folder, max_num_batched_tokens=13, **pool)
    prompts = make_prompts(8, TOKENIZER_SIZE, seed=seed, longest=80)
    tokens = generate_ids(engine, prompts, 20)
    assert generate_ids(engine, prompts[-1:], 20) == generate_ids(engine, prompts[-1:], 20) == tokens[-1:]
    stats = engine.core.stats()
    assert stats.preemptions > 0 and stats.prefix_hits > 0
    model = reference(folder)
    for prompt, found in zip(prompts, tokens, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + found])).logits[0, len(prompt) - 1 : -1]
        margins = logits.max(-1).values - logits.gather(1, torch.tensor(found)[:, None])[:, 0]
        assert float(margins.max()) < 1e-3


def test_keys_and_values_that_shared_layers_do_not_need_may_be_stored(tmp_path: Path) -> None:
    """As published checkpoints have them. Others that no layer needs stay an error."""
    folder = variant_folder("gemma4-shared")
    tensors = load_file(folder / "model.safetensors")
    assert "model.layers.4.self_attn.k_proj.weight" not in tensors
    for part in ("k_proj", "v_proj", "k_norm"):
        name = f"model.layers.{{}}.self_attn.{part}.weight"
        tensors[name.format(4)] = torch.full_like(tensors[name.format(1)], torch.nan)
    other = make_copy(folder, tmp_path / "other", tensors)
    assert generate_ids(make_engine(other), PROMPTS, 8) == generate_ids(make_engine(folder), PROMPTS, 8)
    save_file({**tensors, "model.layers.4.self_attn.x.weight": torch.ones(1)}, other / "model.safetensors")
    with pytest.raises(ConfigError, match=r"self_attn\.x\.weight is there, but not used"):
        make_engine(other)


def test_shared_layers_have_no_cache() -> None:
    engine = make_engine(variant_folder("gemma4-shared"))
    mixers = [layer.mixer for layer in engine.config.spec.layers]
    assert [mixer.source for mixer in mixers] == [None, None, None, 1, 2]
    sizes = tuple(2 * mixer.num_kv_heads * mixer.head_dim for mixer in mixers[:3])
    plan = engine.config.spec.cache_plan
    assert [plan.slots[plan.groups[index]] for index in range(3)] == list(sizes)
    assert plan.groups[3:] == (0, 0) and plan.page_size * len(plan.windows) < 2 * sum(sizes)


@pytest.mark.parametrize("form", ["fp8", "awq"])
def test_a_quantised_folder_keeps_stacked_experts_as_they_are(tmp_path: Path, form: str) -> None:
    """A matrix that is no module's weight is quantised by no writer."""
    script, plain = load_script("quantize_checkpoint"), variant_folder("gemma4-moe")
    values = script.quantize_folder(plain, tmp_path / "quantised", form, 8)
    assert not [name for name in values if "expert" in name or "router" in name]
    tensors = load_file(plain / "model.safetensors")
    make_copy(plain, tmp_path / "same", {**tensors, **values})
    expected = generate_ids(make_engine(tmp_path / "same"), PROMPTS, 8)
    assert generate_ids(make_engine(tmp_path / "quantised"), PROMPTS, 8) == expected
    assert expected != generate_ids(make_engine(plain), PROMPTS, 8)
    stored = {**load_file(tmp_path / "quantised" / "model.safetensors")}
    name = "model.layers.1.experts.down_proj"
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    make_copy(tmp_path / "quantised", tmp_path / "other", stored)
    with pytest.raises(
        ConfigError, match=r"experts\.down_proj is stored as F8_E4M3, although quantization_config"
    ):
        make_engine(tmp_path / "other")


def make_copy(folder: Path, path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same model with these tensors."""
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, path / "model.safetensors")
    return path


def write_config(path: Path, **changes: Any) -> Path:
    text = {key: value for key, value in {**E2B, **changes}.items() if value != "absent"}
    config = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "eos_token_id": [1, 106],
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": {"model_type": "gemma4_vision"},
    }
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return path


def test_a_published_configuration(tmp_path: Path) -> None:
    spec = load_spec(write_config(tmp_path))
    assert (spec.num_layers, spec.max_position, spec.dtype, spec.eos_token_ids) == (
        35,
        131072,
        "bfloat16",
        (1,),
    )
    full, local = spec.layers[4].mixer, spec.layers[0].mixer
    assert (full.head_dim, full.window, full.rope.proportion) == (512, None, 0.25)
    assert (local.head_dim, local.window, local.rope.scaling) == (256, 512, "none")
    assert {layer.mixer.source for layer in spec.layers[15:]} == {13, 14}
    assert [spec.layers[index].mlp.size for index in (14, 15)] == [6144, 12288]
    # Of 15 layers with keys and values of their own 3 are full.
    plan = spec.cache_plan
    assert plan.windows == (None, 512, 512) and plan.slots == (1024, 512, 512)
    assert len(plan.windows) * plan.page_size == 2 * (12 * 256 + 3 * 512)
    defaults = load_spec(write_config(tmp_path, rope_parameters="absent", global_head_dim="absent"))
    assert defaults.layers == spec.layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bidirectional_attention": "all"}, "text_config.use_bidirectional_attention other than vision"),
        (
            {"num_kv_shared_layers": 35},
            "text_config.num_kv_shared_layers must be an integer of at least 0 and at most 34",
        ),
        ({"num_kv_shared_layers": 32}, "text_config.num_kv_shared_layers leaves no full_attention"),
        ({"num_kv_shared_layers": -1}, "text_config.num_kv_shared_layers"),
        ({"vocab_size_per_layer_input": 1000}, "vocab_size_per_layer_input other than vocab_size 262144"),
        ({"global_head_dim": 511}, "text_config.global_head_dim gives layer 4 1 heads of 511"),
        ({"per_layer_config": {"35": {"head_dim": 16}}}, "text_config.per_layer_config.35 is no layer"),
        (
            {"per_layer_config": {"3": {"sliding_window": 16}}},
            "per_layer_config.3.sliding_window is not supp",
        ),
        (
            {"per_layer_config": {"19": {"head_dim": 64}}},
            "num_kv_shared_layers shares keys between full_attention",
        ),
        ({"per_layer_config": {"4": {"num_key_value_heads": 3}}}, "per_layer_config gives layer 4 3 heads"),
        ({"hidden_activation": "silu"}, "text_config.hidden_activation must be gelu_pytorch_tanh"),
        ({"layer_types": ["chunked_attention"] * 35}, "text_config.layer_types names 'chunked_attention'"),
        ({"rope_parameters": {"other": {}}}, "text_config.rope_parameters.other must be one of"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "has nothing about sliding_attention",
        ),
        ({"sliding_window": 0}, "text_config.sliding_window must be a positive integer"),
        ({"enable_moe_block": True}, "text_config.num_experts is missing"),
        ({**EXPERTS, "top_k_experts": 9}, "text_config.top_k_experts is 9, but there are 8 experts"),
        ({**EXPERTS, "moe_intermediate_size": None}, "text_config.moe_intermediate_size is missing"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError) as error:
        load_spec(write_config(tmp_path, **changes))
    assert message in str(error.value)


def test_a_configuration_without_its_text_part(tmp_path: Path) -> None:
    config = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4"}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ModelFileError, match="text_config is missing"):
        load_spec(tmp_path)


def test_the_variants_differ_from_models_without_their_parts() -> None:
    """Scales, inputs and windows change the text of the variants, so that comparing it tests them."""
    assert {"gemma4", "gemma4-shared", "gemma4-moe"} <= VARIANTS.keys()
    folder = variant_folder("gemma4-shared")
    model, prompt = reference(folder), torch.tensor([PROMPTS[-1]])
    with torch.inference_mode():
        logits = [model(prompt).logits]
        model.model.layers[2].layer_scalar.mul_(0.5)
        logits.append(model(prompt).logits)
        model.model.embed_tokens_per_layer.weight.zero_()
        logits.append(model(prompt).logits)
        model.model.layers[1].self_attn.k_norm.weight.mul_(0.5)
        logits.append(model(prompt).logits)
    for first, second in pairwise(logits):
        assert (first - second).abs().max() > 0.01 * first.abs().max()
