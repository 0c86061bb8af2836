"""Models whose layers keep a state: their files, their keys, and what a row's state must never do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import (
    DELTA,
    drain,
    generate_ids,
    load_script,
    make_engine,
    make_prompts,
    make_request,
    run_requests,
    variant_folder,
)
from safetensors.torch import load_file, save_file
from tiny_models import TOKENIZER_SIZE, make_hf_folder

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.layers.delta_net import GatedDeltaNet
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.registry import load_spec
from microvllm.adapters.spec import Attention
from microvllm.ops.row_states import StatesByRow
from microvllm.runtime import kv_memory
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError

PROMPTS = make_prompts(4, TOKENIZER_SIZE, longest=80)


def rewritten(source: Path, path: Path, change: Any, **keys: Any) -> Path:
    """The same folder, with its tensors changed, by name, and with other values in config.json."""
    path.mkdir()
    save_file(change(load_file(source / "model.safetensors")), path / "model.safetensors")
    config = {**json.loads((source / "config.json").read_text()), **keys}
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((source / name).read_bytes())
    return path


def same_tokens(first: Path, second: Path) -> None:
    assert generate_ids(make_engine(first), PROMPTS, 8) == generate_ids(make_engine(second), PROMPTS, 8)


# ---- folders as they lie on the hub ----------------------------------------------------------------


def as_vision_model(source: Path, path: Path, hf_class: str, **text: Any) -> Path:
    """The text model inside of one that reads images, beside a vision tower and a head of further tokens."""

    def wrap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        wrapped = {
            name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()
        }
        return {
            **wrapped,
            "model.visual.blocks.0.mlp.weight": torch.zeros(3, 5),
            "mtp.layers.0.mlp.down_proj.weight": torch.zeros(2),
        }

    inner = {**json.loads((source / "config.json").read_text()), **text}
    family = inner["model_type"].removesuffix("_text")
    config = {
        "text_config": {key: value for key, value in inner.items() if key not in ("architectures", "dtype")},
        "vision_config": {"depth": 1, "model_type": family},
        "image_token_id": 300,
    }
    folder = rewritten(source, path, wrap, model_type=family, architectures=[hf_class])
    kept = {"model_type": family, "architectures": [hf_class], "dtype": inner["dtype"]}
    (folder / "config.json").write_text(json.dumps({**kept, **config}))
    return folder


@pytest.mark.parametrize(
    ("name", "hf_class"),
    [("qwen3.5", "Qwen3_5ForConditionalGeneration"), ("qwen3.5-moe", "Qwen3_5MoeForConditionalGeneration")],
)
def test_the_text_of_a_model_that_reads_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, hf_class: str
) -> None:
    source = variant_folder(name)
    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    rope |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    folder = as_vision_model(source, tmp_path / "vision", hf_class, rope_parameters=rope)
    same_tokens(source, folder)
    assert load_spec(folder).layers == load_spec(source).layers
    assert "visual.blocks.0.mlp.weight is outside of model.language_model.*" in caplog.text
    assert "mtp.layers.0.mlp.down_proj.weight is left out on purpose" in caplog.text


def test_the_head_of_further_tokens_is_left_out_by_name(tmp_path: Path) -> None:
    source = variant_folder("qwen3-next")

    def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "mtp.norm.weight": torch.zeros(4), "mtp.embed_tokens.weight": torch.zeros(2, 2)}

    same_tokens(source, rewritten(source, tmp_path / "mtp", with_head))

    def with_other(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "model.layers.0.linear_attn.in_proj_c.weight": torch.zeros(4)}

    with pytest.raises(ConfigError, match=r"in_proj_c\.weight is there, but not used by qwen3_next"):
        make_engine(rewritten(source, tmp_path / "other", with_other))


@pytest.mark.parametrize("name", ["qwen3.5-moe", "qwen3-next"])
def test_experts_in_one_tensor(tmp_path: Path, name: str) -> None:
    source = variant_folder(name)
    spec = load_spec(source)

    def stack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for index, layer in enumerate(spec.layers):
            if not isinstance(layer.mlp, Experts):
                continue
            stem = f"model.layers.{index}.mlp.experts"
            matrices = [
                [tensors.pop(f"{stem}.{e}.{part}_proj.weight") for e in range(layer.mlp.count)]
                for part in ("gate", "up", "down")
            ]
            gate, up, down = map(torch.stack, matrices)
            tensors |= {f"{stem}.gate_up_proj": torch.cat((gate, up), 1), f"{stem}.down_proj": down}
        return tensors

    folder = rewritten(source, tmp_path / "stacked", stack)
    same_tokens(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 5}))
    with pytest.raises(ConfigError, match=r"has shape .* but the configuration asks for"):
        make_engine(folder)


@pytest.mark.parametrize("form", ["fp8-block", "gptq-8", "awq"])
def test_quantised_projections(tmp_path: Path, form: str) -> None:
    """The tokens of the values that the codes stand for: q beside gates, and what a state is made of."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    heads = {"linear_num_key_heads": 1, "linear_num_value_heads": 8}
    dims = {"head_dim": 64, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    kinds = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    plain = make_hf_folder(tmp_path / "plain", "qwen3_5_text", **sizes, **heads, **dims, **kinds)
    values = load_script("quantize_checkpoint").quantize_folder(plain, tmp_path / form, form, 32)
    assert sum("linear_attn" in name for name in values) == 5

    def with_values(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, **{name: value.contiguous() for name, value in values.items()}}

    same_tokens(tmp_path / form, rewritten(plain, tmp_path / "values", with_values))


# ---- config.json -----------------------------------------------------------------------------------


def test_the_kinds_of_layers(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path, "qwen3_5_text", **DELTA, tokenizer=False)
    spec = load_spec(folder)
    assert [isinstance(layer.mixer, GatedDeltaNet) for layer in spec.layers] == [True, True, True, False]
    (attention,) = spec.mixers
    assert attention.gated and attention.qk_norm and attention.rope.rotary_dim == 8
    assert spec.norm_offset == 1.0 and 2 * spec.cache_plan.page_size == 2 * 3 * 32 * 2
    # Three layers of 6 heads of 12 x 8 in float32, and 3 tokens of 2 * 3 * 8 + 6 * 12 channels in 16 bits.
    assert spec.state_bytes(2) == 3 * (6 * 12 * 8 * 4 + 3 * 120 * 2)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"]
    path.write_text(json.dumps({**config, "full_attention_interval": 2}))
    assert [isinstance(layer.mixer, Attention) for layer in load_spec(folder).layers] == [False, True] * 2


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("layer_types", ["linear_attention"] * 4, "has no full_attention"),
        ("layer_types", ["linear_attention"], "must list one kind for each of the 4 layers"),
        ("layer_types", ["mamba", "full_attention"] * 2, "names 'mamba', which is not supported"),
        ("linear_num_value_heads", 7, "7 is not a multiple of linear_num_key_heads 3"),
        ("linear_conv_kernel_dim", 1, "must be an integer of at least 2"),
        ("attn_output_gate", False, "is false"),
        ("hidden_act", "gelu", "must be silu"),
        ("rope_parameters", {"rope_type": "default", "mrope": 1}, "mrope is not a key of rotary scaling"),
        ("linear_key_head_dim", 16, "has shape"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, key: str, value: Any, said: str) -> None:
    source = variant_folder("qwen3.5")
    folder = rewritten(source, tmp_path / "bad", lambda tensors: tensors, **{key: value})
    with pytest.raises((ModelFileError, ConfigError), match=said) as caught:
        make_engine(folder)
    assert "\n" not in str(caught.value)


def test_a_vision_model_without_a_language_model(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="text_config is missing"):
        load_spec(tmp_path)


# ---- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3.5", "lfm2"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_row_begins_from_nothing(backend: str, name: str) -> None:
    """Whatever is in a row when a request gets it, with a prompt of one token, a decode, or a longer one."""
    folder = variant_folder(name)
    engine = make_engine(folder, attention_backend=backend, max_num_seqs=3)
    requests = [make_request(i, prompt, 6) for i, prompt in enumerate(([5], [7, 8], list(range(40))))]
    expected = run_requests(engine, requests)
    attention = engine.core._runner._device._attention  # type: ignore[attr-defined]
    (states,) = (each for each in attention.backends if isinstance(each, StatesByRow))
    for state in states.states:
        state.fill_(torch.nan)
    engine.core.reset_prefix_cache()
    assert run_requests(engine, requests) == expected


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("name", "backend"), [("qwen3.5", "cpu"), ("qwen3.5", "torch"), ("lfm2-moe", "cpu")])
def test_the_second_turn_of_a_chat_goes_on_from_the_end_of_the_first(
    name: str, backend: str, asynchronous: bool
) -> None:
    """Four chats at once: all blocks but the last of each prompt and answer, which is computed again."""
    options: dict[str, Any] = {"attention_backend": backend, "async_scheduling": asynchronous}
    folder = variant_folder(name)
    engine = make_engine(folder, **options)
    plain = make_engine(folder, attention_backend=backend, enable_prefix_caching=False)
    prompts = make_prompts(4, TOKENIZER_SIZE, seed=5, longest=70)
    answers = generate_ids(engine, prompts, 37)
    assert answers == generate_ids(plain, prompts, 37) and not engine.core.stats().prefix_hits
    turns = [prompt + answer + [7, 8, 9] for prompt, answer in zip(prompts, answers, strict=True)]
    assert generate_ids(engine, turns, 20) == generate_ids(plain, turns, 20)
    hits = engine.core.stats().prefix_hits
    ends = [(len(prompt) + 36) // 16 * 16 for prompt in prompts]
    # With a step in flight the last of a text may be void, and with it what it kept.
    assert sum(ends) - (64 if asynchronous else 0) <= hits <= sum(ends) and hits > 0
    # The same prompts once more: up to their own ends.
    assert generate_ids(engine, prompts, 5) == [answer[:5] for answer in answers]
    again = engine.core.stats().prefix_hits - hits
    assert again == sum((len(prompt) - 1) // 16 * 16 for prompt in prompts)


def test_checkpoints_that_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of them for many prompts, some preempted: never a wrong token, and none is lost."""
    monkeypatch.setattr(kv_memory, "num_checkpoints", lambda _: 3)
    folder = variant_folder("qwen3.5")
    prompts = make_prompts(10, TOKENIZER_SIZE, seed=6, longest=60)
    expected = generate_ids(make_engine(folder, enable_prefix_caching=False), prompts, 30)
    tight = {"max_model_len": 104, "num_gpu_blocks_override": 20, "max_num_batched_tokens": 24}
    for asynchronous in (False, True):
        engine = make_engine(folder, max_num_seqs=6, async_scheduling=asynchronous, **tight)
        assert len(engine.core.kv.states.rows) == 3
        for _ in range(2):
            assert generate_ids(engine, prompts, 30) == expected
        assert engine.core.stats().preemptions > 0
        engine.core.reset_prefix_cache()
        engine.core.kv.check()
        assert generate_ids(engine, prompts[:2], 30) == expected[:2]


@pytest.mark.parametrize("budget", [2048, 40])
def test_prompts_that_part_share_their_beginning_from_the_third_on(
    budget: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The first leaves blocks, the second finds no state behind them and keeps one; blocks are of 16."""
    caplog.set_level("INFO", "microvllm.engine")
    folder = variant_folder("qwen3.5")
    engine = make_engine(folder, max_num_batched_tokens=budget)
    head, *ends = ([3 + i * seed % 250 for i in range(1, 101)] for seed in (1, 3, 5, 7, 9))
    prompts = [head[:70] + end[:length] for end, length in zip(ends, (60, 45, 33, 70), strict=True)]
    expected = generate_ids(make_engine(folder, enable_prefix_caching=False), prompts, 6)
    seen = []
    for prompt, answer in zip(prompts, expected, strict=True):
        assert generate_ids(engine, [prompt], 6) == [answer]
        stats = engine.core.stats()
        seen.append((stats.prefix_hits, stats.prefix_state_misses))
    # Chunks of 40 tokens end at no block but the prompt's last.
    assert seen == [(0, 0), (0, 64), (64, 64), (128, 64)]
    (line,) = [record.message for record in caplog.records if "no state was kept" in record.message]
    assert line.startswith("64 tokens of a prompt are in the prefix cache, but computed again")
    # All at once, and after the states, not the blocks, were forgotten.
    engine.core.kv.states.forget()
    assert generate_ids(engine, prompts, 6) == expected
    assert engine.core.stats().prefix_state_misses > 64
    engine.core.reset_prefix_cache()
    before = engine.core.stats().prefix_state_misses
    assert generate_ids(engine, prompts[:1], 6) == expected[:1]
    assert engine.core.stats().prefix_state_misses == before


def test_a_state_that_became_nan_is_not_gone_on_from() -> None:
    """It comes to light at the end of the prompt; the same prompt is then computed from its beginning."""
    engine = make_engine(variant_folder("qwen3.5"), max_num_batched_tokens=16, max_num_seqs=2)
    prompt = make_prompts(1, TOKENIZER_SIZE, longest=1)[0] * 70
    (expected,) = generate_ids(engine, [prompt], 4)
    engine.core.reset_prefix_cache()
    attention = engine.core._runner._device._attention  # type: ignore[attr-defined]
    states, *_ = (each for each in attention.backends if hasattr(each, "delta"))
    engine.core.add(make_request(0, prompt, 4))
    engine.core.step()
    states.delta[:, :2] = torch.nan  # of the rows of requests
    outputs = list(drain(engine))
    assert [output.error for output in outputs] == ["the model gave no finite logits for this request"]
    kept = states.delta[:, list(engine.core.kv.states.rows)]
    assert kept.isnan().any()  # some were kept while nobody could know
    for number in (1, 2):
        assert run_requests(engine, [make_request(number, prompt, 4)]) == [expected]


def test_samples_of_one_prompt_share_its_state() -> None:
    engine = make_engine(variant_folder("qwen3.5"))
    prompt = make_prompts(1, TOKENIZER_SIZE, longest=1)[0] * 50
    (expected,) = generate_ids(engine, [prompt], 8)
    engine.core.reset_prefix_cache()
    requests = [make_request(i, prompt, 8) for i in range(3)]
    assert run_requests(engine, requests) == [expected] * 3
    assert engine.core.stats().prefix_hits == 2 * 48


def test_states_that_are_too_large(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    args: dict[str, Any] = {"model": str(variant_folder("qwen3.5")), "device": "cpu"}
    args |= {"attention_backend": "torch", "dtype": "float32", "num_gpu_blocks_override": 64}
    row = load_spec(Path(args["model"])).state_bytes(4)
    monkeypatch.setattr(kv_memory, "available_memory", lambda: 100 * row)
    monkeypatch.setattr("microvllm.runtime.config.size_cache", lambda *_, **__: (64, 512))
    plain = {**args, "enable_prefix_caching": False}
    assert EngineArgs(**plain).resolve().max_num_seqs == 20
    assert "20 requests run at once instead of 256" in caplog.text
    assert EngineArgs(**plain, max_num_seqs=100).resolve().max_num_seqs == 100
    with pytest.raises(ConfigError, match="--max-num-seqs 101: each request holds a state, of") as caught:
        EngineArgs(**plain, max_num_seqs=101).resolve()
    assert caught.value.remedy == "lower --max-num-seqs to 100"
    # With a checkpoint for each four of them, and 16 at least.
    assert EngineArgs(**args).resolve().max_num_seqs == 4
    assert EngineArgs(**args, max_num_seqs=80).resolve().max_num_seqs == 80
    with pytest.raises(ConfigError, match=r"--max-num-seqs 81: .* checkpoints for the prefix cache"):
        EngineArgs(**args, max_num_seqs=81).resolve()
    with pytest.raises(ConfigError, match=r"--max-num-seqs 1000000000000: ") as caught:  # at once
        EngineArgs(**args, max_num_seqs=10**12).resolve()
    assert caught.value.remedy == "lower --max-num-seqs to 80"


def test_batch_invariance_is_refused_on_a_gpu_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microvllm.runtime.config.choose_device", lambda _: "cuda")
    args = EngineArgs(model=str(variant_folder("qwen3.5")), attention_backend="triton", batch_invariant=True)
    with pytest.raises(ConfigError, match=r"--batch-invariant .*a GPU computes states in chunks"):
        args.resolve()
