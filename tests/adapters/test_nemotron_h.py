"""Nemotron-H's keys, and what batching, chunks, preemption and prefix hits must not change in its layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_tools import generate_ids, make_engine, make_prompts, variant_folder
from tiny_models import TOKENIZER_SIZE

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.mamba2 import Mamba2
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.layers.nothing import Nothing
from microvllm.adapters.registry import load_spec
from microvllm.adapters.spec import Attention
from microvllm.runtime.errors import ConfigError


def rewritten(tmp_path: Path, name: str, drop: str = "", **keys: Any) -> Path:
    """The variant's folder with other values in config.json."""
    for file in variant_folder(name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | keys
    config.pop(drop, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_kinds_of_layers_by_every_spelling(tmp_path: Path) -> None:
    spec = load_spec(variant_folder("nemotron-h-moe"))
    kinds = [(type(layer.mixer), type(layer.mlp)) for layer in spec.layers]
    mamba, moe = (Mamba2, Nothing), (Nothing, Experts)
    assert kinds == [mamba, moe, mamba, (Attention, Nothing), moe]
    (attention,) = spec.mixers
    assert attention.rope.rotary_dim == 0
    # Two layers of 10 heads of 12 x 24 in float32, and 3 tokens of 120 + 2 * 2 * 24 channels in 16 bits.
    assert spec.state_bytes(2) == 2 * (10 * 12 * 24 * 4 + 3 * 216 * 2)
    older = ["mamba", "moe", "mamba", "attention", "moe"]
    for keys in (
        {"hybrid_override_pattern": "MEM*E", "num_hidden_layers": 5},
        {"layers_block_type": older},
        {"layer_types": older},
    ):
        drop = "" if "layers_block_type" in keys else "layers_block_type"
        assert load_spec(rewritten(tmp_path, "nemotron-h-moe", drop, **keys)) == spec
    dense = load_spec(rewritten(tmp_path, "nemotron-h", "layers_block_type", hybrid_override_pattern="*--"))
    assert [layer.mlp for layer in dense.layers[1:]] == 2 * [
        MLP(size=160, activation="relu2", gated=False, bias=True)
    ]


@pytest.mark.parametrize(
    ("name", "backend"), [("nemotron-h-moe", "torch"), ("nemotron-h-moe", "cpu"), ("granite4-mamba", "cpu")]
)
def test_chunks_preemption_and_prefix_hits_change_no_token(name: str, backend: str) -> None:
    """Prompts of more than a chunk of the scan, cut at odd places, in a pool too small for all."""
    prompts = make_prompts(6, TOKENIZER_SIZE, seed=4, longest=100)
    model: dict[str, Any] = {"model": variant_folder(name), "attention_backend": backend}
    plain = make_engine(**model, enable_prefix_caching=False)
    expected = [generate_ids(plain, [prompt], 20)[0] for prompt in prompts]
    pool = {"max_model_len": 128, "block_size": 4, "num_gpu_blocks_override": 36}
    tight = make_engine(**model, **pool, max_num_batched_tokens=29, max_num_seqs=6)
    assert generate_ids(tight, prompts, 20) == expected
    for _ in range(2):
        assert generate_ids(tight, prompts[-1:], 20) == expected[-1:]
    stats = tight.core.stats()
    assert stats.preemptions > 0 and stats.prefix_hits > 0


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("nemotron-h", "layers_block_type", ["mamba", "mlp"], "has no attention"),
        ("nemotron-h", "layers_block_type", ["mamba", "sliding_attention"], "names 'sliding_attention'"),
        ("nemotron-h", "layers_block_type", "M*", "must list the kind of each layer"),
        ("nemotron-h", "layers_block_type", None, "hybrid_override_pattern is missing"),
        ("nemotron-h", "hybrid_override_pattern", "M-*M", "names other layers than layers_block_type"),
        ("nemotron-h", "num_hidden_layers", 4, "is 4, but 5 layers are listed"),
        ("nemotron-h", "attention_bias", True, "is set, which is not supported"),
        ("nemotron-h", "sliding_window", 8, "is set, which is not supported"),
        ("nemotron-h", "attention_head_dim", 16, "is 16, head_dim 32"),
        ("nemotron-h", "mamba_num_heads", 7, "7 is not a multiple of n_groups 3"),
        ("nemotron-h", "mamba_head_dim", 16, "has shape"),
        ("nemotron-h", "conv_kernel", 1, "must be an integer of at least 2"),
        ("nemotron-h", "use_conv_bias", False, "there, but not used"),
        ("nemotron-h", "use_bias", False, "there, but not used"),
        ("nemotron-h", "mamba_conv_bias", False, "is set, which is not supported"),
        ("nemotron-h", "mamba_hidden_act", "gelu", "must be silu"),
        ("nemotron-h", "mlp_hidden_act", "gelu", "must be relu2"),
        ("nemotron-h", "time_step_limit", [0.0, 0.1], "is not supported"),
        ("nemotron-h", "time_step_limit", [0.001, float("inf")], "is not supported"),
        ("nemotron-h", "time_step_min", 0.01, "must be at most 0.001"),
        ("nemotron-h-moe", "moe_latent_size", 32, "is set, which is not supported"),
        ("nemotron-h-moe", "mlp_bias", True, "is not supported for experts"),
        ("nemotron-h-moe", "n_shared_experts", 2, "must be 1, got 2"),
        ("nemotron-h-moe", "n_routed_experts", 12, "asks for 12 experts"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, name: str, key: str, value: Any, said: str) -> None:
    with pytest.raises((ModelFileError, ConfigError), match=said) as caught:
        make_engine(rewritten(tmp_path, name, **{key: value}))
    assert "\n" not in str(caught.value)


def test_groups_that_shards_would_have_to_divide(tmp_path: Path) -> None:
    spec = load_spec(variant_folder("nemotron-h"))
    with pytest.raises(ValueError, match="3 groups of heads of Mamba-2 do not divide into 2 shards"):
        spec.sharded(2)
