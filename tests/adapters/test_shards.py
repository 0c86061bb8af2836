"""Two shards of a model, run in one process and connected there, give the logits of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf_layouts
import numpy as np
import pytest
import torch
from model_tools import DELTA, relative_error
from rank_threads import Threads
from tiny_models import TOKENIZER_SIZE, make_hf_folder, write_gguf

from microvllm.adapters.decoder import DecoderModel
from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import load_spec
from microvllm.adapters.tensors import WHOLE, Shard
from microvllm.adapters.weights import load_weights
from microvllm.ops.backends import make_operators
from microvllm.ops.quantized import QuantizedTensor
from microvllm.ops.sharding import Ranks
from microvllm.runtime.worker.step_inputs import HostInputs, StepArrays

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3.5": {"family": "qwen3_5_text", **DELTA, "linear_num_key_heads": 2, "seed": 1},
    "qwen3-next": {
        "family": "qwen3_next",
        **DELTA,
        "linear_num_key_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 16,
    },
    "lfm2": {"family": "lfm2", "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True},
    "nemotron-h": {
        "family": "nemotron_h",
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"],
        "num_hidden_layers": None,
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "n_groups": 4,
        "ssm_state_size": 8,
        "use_bias": True,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
    },
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"family": "qwen2", "tie": True},
    "qwen3": {"family": "qwen3"},
    "one-kv-head": {"family": "llama", "num_key_value_heads": 1},
    "odd-vocabulary": {"family": "qwen3", "vocab_size": TOKENIZER_SIZE + 1},
    "phi3": {"family": "phi3"},
    "latents": {
        "family": "deepseek_v3",
        "num_key_value_heads": 8,
        "head_dim": 12,
        "q_lora_rank": 20,
        "kv_lora_rank": 24,
        "qk_rope_head_dim": 12,
        "qk_nope_head_dim": 16,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "attention_bias": True,
    },
    "whole-norms": {
        "family": "minimax_m2",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rotary_dim": 16,
        "intermediate_size": 48,
    },
    "glm4-moe": {
        "family": "glm4_moe",
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "use_qk_norm": True,
    },
    "qwen3-moe": {
        "family": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    },
    "qwen2-moe": {
        "family": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "gpt-oss": {
        "family": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "sliding_window": 7,
    },
    "gemma3": {
        "family": "gemma3_text",
        "tie": True,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
}
BLOCK, LENGTHS = 4, (7, 11)


def logits(
    model: Path, backend: str, shard: Shard, ranks: Ranks | None, keep_quantized: bool
) -> torch.Tensor:
    """Of every position of two prompts, and of one token behind each, on a sharded model: [n, vocab]."""
    spec = load_spec(model)
    operators = make_operators(backend, torch.float32, 1)
    packed = operators.packed if keep_quantized else ()
    weights = load_weights(model, spec, "auto", torch.float32, packed=packed, shard=shard)
    decoder = DecoderModel(spec.sharded(shard.size), weights, operators, ranks)
    assert not weights
    groups = len(decoder.spec.cache_plan.windows)
    attention = decoder.attention(8 * groups, BLOCK, 32, torch.float32, torch.device("cpu"), 2)
    tables = np.arange(8 * groups).reshape(groups, 2, 4)
    inputs = HostInputs(2, BLOCK)
    found = []
    for starts, lengths in (((0, 0), LENGTHS), (LENGTHS, (1, 1))):
        rows = np.repeat(np.arange(2), lengths)
        positions = np.concatenate([start + np.arange(n) for start, n in zip(starts, lengths, strict=True)])
        ids = (positions * 37 + rows * 11) % TOKENIZER_SIZE
        slots = tables[:, rows, positions // BLOCK] * BLOCK + positions % BLOCK
        context = np.array(starts) + np.array(lengths)
        decodes = sum(n == 1 for n in lengths)
        arrays = StepArrays(ids, rows, positions, slots, np.arange(2), np.array(lengths), context, decodes)
        input_ids, batch = inputs.make(arrays, tables)
        found.append(decoder.logits(decoder.forward(input_ids, attention.begin_step(batch))))
    return torch.cat(found)


def assert_shards_agree(model: Path, backend: str, *, keep_quantized: bool = False) -> None:
    whole = logits(model, backend, WHOLE, None, keep_quantized)
    threads = Threads(2)

    def shard(rank: int) -> torch.Tensor:
        return logits(model, backend, Shard(rank, 2), threads.of(rank), keep_quantized)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(shard, range(2))
    assert first.equal(second)
    assert relative_error(first, whole) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", VARIANTS)
def test_two_shards_give_the_logits_of_the_whole_model(tmp_path: Path, name: str, backend: str) -> None:
    options = {**SIZES, **VARIANTS[name]}
    assert_shards_agree(make_hf_folder(tmp_path, options.pop("family"), **options), backend)


@pytest.mark.parametrize("keep_quantized", [False, True])
def test_shards_of_quantised_weights(tmp_path: Path, keep_quantized: bool) -> None:
    """Rows of q and k are also put in another order; columns of o and down are cut between blocks."""
    folder = make_hf_folder(tmp_path / "hf", "llama", **SIZES, intermediate_size=192)
    file = write_gguf(tmp_path / "model.gguf", folder, quantization="Q4_1")
    assert_shards_agree(file, "cpu", keep_quantized=keep_quantized)


@pytest.mark.parametrize("name", ["qwen3.5", "latents"])
@pytest.mark.parametrize("keep_quantized", [False, True])
def test_shards_of_hybrids_and_latents_in_blocks(tmp_path: Path, name: str, keep_quantized: bool) -> None:
    """Columns behind a delta rule are cut in several runs, as heads of values lie in turns."""
    heads = {"linear_num_value_heads": 6, "linear_value_head_dim": 32}
    ranks = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 32)
    changes = heads if name == "qwen3.5" else {**ranks, "attention_bias": False, "moe_intermediate_size": 64}
    options = {**SIZES, **VARIANTS[name], **changes, "intermediate_size": 192}
    folder = make_hf_folder(tmp_path / "hf", options.pop("family"), **options)
    file = gguf_layouts.write(tmp_path / "model.gguf", folder, "Q8_0")
    assert_shards_agree(file, "cpu", keep_quantized=keep_quantized)


def test_a_cut_through_a_block_is_refused(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "hf", "llama", **SIZES, intermediate_size=96)
    file = write_gguf(tmp_path / "model.gguf", folder, quantization="Q8_0")
    spec = load_spec(file)
    with pytest.raises(ModelFileError, match=r"blk\.0\.ffn_down\.weight in blocks of 32 .* column 48"):
        load_weights(file, spec, "auto", torch.float32, packed=(QuantizedTensor,), shard=Shard(1, 2))


def test_shards_hold_different_halves(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path, "llama", **SIZES)

    def load(shard: Shard) -> Callable[[str], torch.Tensor]:
        return load_weights(folder, load_spec(folder), "auto", torch.float32, shard=shard).__getitem__

    whole, *halves = (load(shard) for shard in (WHOLE, Shard(0, 2), Shard(1, 2)))
    for name, dimension in (("o", 1), ("down", 1)):
        parts = [half(f"layers.1.{name}") for half in halves]
        assert torch.cat(parts, dimension).equal(whole(f"layers.1.{name}"))
    gate_up = [half("layers.1.gate_up").chunk(2) for half in halves]
    assert torch.cat([pair[i] for i in range(2) for pair in gate_up]).equal(whole("layers.1.gate_up"))
    for name in ("embed", "lm_head"):
        assert torch.cat([half(name) for half in halves]).equal(whole(name))


def test_shards_beyond_the_heads_of_keys_share_them(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path, "llama", **{**SIZES, "num_key_value_heads": 2})
    spec = load_spec(folder)
    heads, size = [], spec.layers[0].mixer.head_dim
    for rank in range(4):
        weights = load_weights(folder, spec, "auto", torch.float32, shard=Shard(rank, 4))
        heads.append(weights["layers.0.qkv"][2 * size : 3 * size])
    assert heads[0].equal(heads[1]) and heads[2].equal(heads[3]) and not heads[0].equal(heads[2])


def test_random_weights_of_shards_are_those_of_the_whole_model(tmp_path: Path) -> None:
    spec = load_spec(make_hf_folder(tmp_path, "llama", **SIZES, attention_bias=True))
    whole, *halves = (
        load_weights(tmp_path, spec, "dummy", torch.float32, shard=shard)
        for shard in (WHOLE, Shard(0, 2), Shard(1, 2))
    )
    assert torch.cat([half["layers.1.down"] for half in halves], 1).equal(whole["layers.1.down"])
    assert torch.cat([half["lm_head"] for half in halves]).equal(whole["lm_head"])
    assert halves[0]["layers.2.o_bias"].equal(whole["layers.2.o_bias"]) and "layers.2.o_bias" not in halves[1]


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    spec = load_spec(make_hf_folder(tmp_path, "llama"))
    with pytest.raises(ValueError, match="9 heads do not divide into 2 shards"):
        spec.sharded(2)
    spec = load_spec(make_hf_folder(tmp_path / "kv", "llama", num_attention_heads=6, hidden_size=96))
    with pytest.raises(ValueError, match="3 heads of keys and values do not divide into 2 shards"):
        spec.sharded(2)
    spec = load_spec(make_hf_folder(tmp_path / "mlp", "llama", **SIZES, intermediate_size=161))
    with pytest.raises(ValueError, match="width of 161 does not divide into 2 shards"):
        spec.sharded(2)
