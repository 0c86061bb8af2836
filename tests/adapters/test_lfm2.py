"""LFM2's keys, and its routing, beside transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import generate_ids, make_engine, make_prompts, variant_folder
from tiny_models import TOKENIZER_SIZE, make_hf_folder, reference, write_gguf

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.layers.short_conv import ShortConv
from microvllm.adapters.registry import load_spec
from microvllm.adapters.spec import Attention
from microvllm.ops.experts import route
from microvllm.ops.routing import Routing
from microvllm.runtime.errors import ConfigError

PROMPTS = make_prompts(3, TOKENIZER_SIZE, longest=40)


def spec_of(tmp_path: Path, name: str, drop: tuple[str, ...] = (), **keys: Any) -> Any:
    config = json.loads((variant_folder(name) / "config.json").read_text())
    config = {key: value for key, value in {**config, **keys}.items() if key not in drop}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_spec(tmp_path)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"block_auto_adjust_ff_dim": False},
        {"block_ff_dim": 500, "block_multiple_of": 64},
        {"block_ffn_dim_multiplier": 0.7},
    ],
)
def test_the_width_of_mlps_is_that_of_transformers(tmp_path: Path, keys: dict[str, Any]) -> None:
    from transformers.models.lfm2.configuration_lfm2 import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

    spec = spec_of(tmp_path, "lfm2", **keys)
    values = json.loads((tmp_path / "config.json").read_text())
    theirs = Lfm2MLP(Lfm2Config(**values)).w1.out_features
    assert {layer.mlp for layer in spec.layers} == {MLP(size=theirs)}


def test_without_a_factor_a_width_is_not_rounded_up(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "lfm2", block_ffn_dim_multiplier=None)
    assert spec.layers[0].mlp == MLP(size=2 * 170 // 3)


def test_what_layers_keep(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "lfm2")
    conv, attention = spec.layers[0].mixer, spec.layers[1].mixer
    assert conv == ShortConv(channels=144, conv_size=4, bias=True)
    assert attention.qk_norm and attention.rope.theta == 1e6
    assert spec.state_bytes(2) == 2 * 3 * 144 * 2 and 2 * spec.cache_plan.page_size == 2 * 2 * 3 * 32 * 2


def test_layers_with_attention_by_their_numbers(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "lfm2", ("layer_types",), full_attn_idxs=[1, 2])
    assert [isinstance(layer.mixer, Attention) for layer in spec.layers] == [False, True, True, False]
    spec = spec_of(tmp_path, "lfm2", ("layer_types", "full_attn_idxs"))
    assert all(isinstance(layer.mixer, Attention) for layer in spec.layers)


def test_embeddings_are_tied_by_either_key(tmp_path: Path) -> None:
    assert spec_of(tmp_path, "lfm2", tie_embedding=True).tie_embeddings
    assert not spec_of(tmp_path, "lfm2-moe", tie_embedding=False).tie_embeddings
    assert spec_of(tmp_path, "lfm2", ("tie_word_embeddings",)).tie_embeddings


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("lfm2", "layer_types", ["conv"] * 4, "has no full_attention"),
        ("lfm2", "layer_types", ["conv"], "must list one kind for each of the 4 layers"),
        ("lfm2", "layer_types", ["sliding_attention"] * 4, "names 'sliding_attention'"),
        ("lfm2", "conv_L_cache", 1, "must be an integer of at least 2"),
        ("lfm2", "conv_L_cache", 3, "has shape"),
        ("lfm2", "conv_bias", False, "are there, but not used"),
        ("lfm2", "conv_dim", 72, "is 72, but hidden_size is 144"),
        ("lfm2", "conv_dim_out", 72, "is 72, but hidden_size is 144"),
        ("lfm2", "block_use_swiglu", False, "is false, which is not supported"),
        ("lfm2", "use_pos_enc", False, "is false, which is not supported"),
        ("lfm2", "num_experts", 4, "has no experts here"),
        ("lfm2", "block_multiple_of", 0, "must be a positive integer"),
        ("lfm2-moe", "num_dense_layers", -1, "must be an integer of at least 0"),
        ("lfm2-moe", "num_experts_per_tok", 9, "is 9, but there are 7 experts"),
        ("lfm2-moe", "use_expert_bias", False, "are there, but not used"),
        ("lfm2-moe", "scoring_func", "sigmoid", "not supported"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, name: str, key: str, value: Any, said: str) -> None:
    source = variant_folder(name)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises((ModelFileError, ConfigError), match=said) as caught:
        make_engine(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "key", "value", "said"),
    [
        ("lfm2", "attention.head_count_kv", 3, "must list a number for each of the 2 layers"),
        ("lfm2", "shortconv.l_cache", 1, "must be an integer of at least 2"),
        ("lfm2", "shortconv.l_cache", 5, "has shape"),
        ("lfm2", "expert_count", 4, "which only lfm2moe models may have"),
        ("lfm2moe", "expert_gating_func", 1, "must be 2, for sigmoids"),
        ("lfm2moe", "expert_used_count", 6, "is 6, but there are 5 experts"),
        ("lfm2moe", "leading_dense_block_count", 2, "blk.1.ffn_gate.weight"),
    ],
)
def test_a_bad_key_of_a_gguf_file_is_named(
    tmp_path: Path, family: str, key: str, value: int, said: str
) -> None:
    keys: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    if family == "lfm2":
        folder = make_hf_folder(tmp_path / "hf", family, **keys, block_auto_adjust_ff_dim=False)
    else:
        keys |= {
            "num_dense_layers": 1,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        }
        folder = make_hf_folder(tmp_path / "hf", "lfm2_moe", **keys)
    file = write_gguf(tmp_path / "model.gguf", folder, extra_metadata={f"{family}.{key}": value})
    with pytest.raises((ModelFileError, ConfigError), match=said):
        make_engine(file)


@pytest.mark.parametrize("indices", [[], [4], ["0"], 3])
def test_bad_numbers_of_layers(tmp_path: Path, indices: Any) -> None:
    with pytest.raises(ModelFileError, match="full_attn_idxs"):
        spec_of(tmp_path, "lfm2", ("layer_types",), full_attn_idxs=indices)


def test_experts_without_a_correction_and_not_normalised(tmp_path: Path) -> None:
    kinds = ["conv", "full_attention"]
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1}
    keys = {"use_expert_bias": False, "norm_topk_prob": False, "num_hidden_layers": 2, "layer_types": kinds}
    folder = make_hf_folder(tmp_path, "lfm2_moe", tie=True, **experts, **keys)
    model = reference(folder)
    for prompt, found in zip(PROMPTS, generate_ids(make_engine(folder), PROMPTS, 8), strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert ids[0, len(prompt) :].tolist() == found


def test_small_scores_are_normalised_as_by_transformers() -> None:
    """1e-6 is added to their sum, which is most of it here."""
    from transformers.models.lfm2_moe.configuration_lfm2_moe import Lfm2MoeConfig
    from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter

    router = Lfm2MoeTopKRouter(Lfm2MoeConfig(hidden_size=6, num_experts=6, num_experts_per_tok=2))
    logits = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)) - 14
    with torch.no_grad():
        router.weight.copy_(torch.eye(6))
        _, expected, theirs = router(logits, torch.zeros(6))
    weights, chosen = route(logits, Routing(num_chosen=2, sigmoid=True, smallest_sum=1e-6))
    assert chosen.equal(theirs) and weights.allclose(expected) and (weights.sum(1) < 0.95).all()
