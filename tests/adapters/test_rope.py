"""Rotary scaling: frequencies and logits are those of transformers, beyond the original context too."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import generate_ids, make_engine, recorded_logits, relative_error
from tiny_models import TOKENIZER_SIZE, make_hf_folder, reference, write_gguf

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import load_spec
from microvllm.adapters.rotary import inverse_frequencies
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError

HEAD_DIM, TRAINED, ORIGINAL = 32, 256, 64
ORIGINAL_KEY = "original_max_position_embeddings"
SHORT = [1.0 + index / 20 for index in range(HEAD_DIM // 2)]
LONG = [1.0 + index / 2 for index in range(HEAD_DIM // 2)]
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn by its lengths": {"rope_type": "yarn", "factor": None},
    "yarn, tempered by hand": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
    "yarn, other ramp": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 12.0, "beta_slow": 0.5},
    "yarn, not truncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    "yarn of DeepSeek": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn without DeepSeek's": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    "longrope with a factor": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "factor": 8.0,
    },
    "longrope, tempered by hand": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "attention_factor": 1.5,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
}


def parameters(name: str) -> dict[str, Any]:
    found = {"rope_theta": 10000.0, **SCALINGS[name]}
    return found if found["rope_type"] in ("linear", "dynamic") else {ORIGINAL_KEY: ORIGINAL, **found}


def trained(name: str) -> int:
    """Linear and dynamic scaling multiply the trained context."""
    return ORIGINAL if SCALINGS[name]["rope_type"] in ("linear", "dynamic") else TRAINED


def folder(path: Path, scaling: dict[str, Any], max_position: int = TRAINED, **changes: Any) -> Path:
    """A folder with only a config.json, as its key says: rope_parameters, or rope_scaling with `type`."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4 * HEAD_DIM,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": 320,
        "max_position_embeddings": max_position,
        "rope_scaling": scaling,
        **changes,
    }
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return path


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "su and original beside it"])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(tmp_path: Path, name: str, spelling: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = parameters(name)
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=trained(name),
        rope_parameters=dict(given),
    )
    changes: dict[str, Any] = {}
    if spelling == "rope_parameters":
        changes = {"rope_parameters": given, "rope_scaling": None}
    else:
        old = {key: value for key, value in given.items() if key not in ("rope_type", "rope_theta")}
        kind = given["rope_type"]
        if spelling.startswith("su"):
            kind = "su" if kind == "longrope" else kind
            changes.update({ORIGINAL_KEY: old.pop(ORIGINAL_KEY)} if ORIGINAL_KEY in old else {})
        changes.update(rope_scaling={"type": kind, **old}, rope_theta=given["rope_theta"])
    spec = load_spec(folder(tmp_path, {}, trained(name), **changes))
    for length in (ORIGINAL // 2, ORIGINAL, ORIGINAL + 1, TRAINED):
        expected, attention = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, "cpu", seq_len=length)
        ours = inverse_frequencies(spec.layers[0].mixer.rope.at_length(length, HEAD_DIM), HEAD_DIM)
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0)
        assert spec.layers[0].mixer.rope.attention_factor == pytest.approx(attention, rel=1e-9)


@pytest.mark.parametrize("name", SCALINGS)
def test_the_context_is_that_of_vllm(tmp_path: Path, name: str) -> None:
    spec = load_spec(folder(tmp_path, parameters(name), trained(name)))
    expected = 2 * ORIGINAL if name == "dynamic" else TRAINED
    assert spec.max_position == expected
    assert spec.default_length == (ORIGINAL if name.startswith("longrope") else expected)


# Name, context asked for, tokens of the text.
TEXTS = [
    ("yarn", None, 200),
    ("yarn of DeepSeek", None, 200),
    ("yarn", None, 40),
    ("longrope", None, 60),  # the original context by default
    ("longrope", 256, 200),
    ("longrope with a factor", 256, 200),
    # The frequencies are those for a text that fills the context.
    ("dynamic", None, 128),
    ("dynamic", 100, 100),
    ("dynamic", 64, 50),
]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("name", "context", "length"), TEXTS)
def test_logits_are_those_of_transformers(
    tmp_path: Path, name: str, context: int | None, length: int, backend: str
) -> None:
    folder = make_hf_folder(
        tmp_path, "llama", max_position_embeddings=trained(name), rope_parameters=parameters(name)
    )
    compare_logits(folder, context, length, backend)


# Three quarters of each head are rotated, and half of each with its neighbours: Phi-4-mini, GLM-4.
PARTS = {"phi3": (0.75, "longrope with a factor"), "glm4": (0.5, "yarn")}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("family", PARTS)
def test_a_scaled_rotation_of_a_part_of_each_head(tmp_path: Path, family: str, backend: str) -> None:
    """Elements that are not rotated are not multiplied by the attention factor either."""
    part, name = PARTS[family]
    scaling = {**parameters(name), "partial_rotary_factor": part}
    for key in ("short_factor", "long_factor"):
        if key in scaling:
            scaling[key] = scaling[key][: int(HEAD_DIM * part) // 2]
    sizes = {"hidden_size": 9 * HEAD_DIM, "max_position_embeddings": TRAINED}
    model = make_hf_folder(tmp_path, family, rope_parameters=scaling, **sizes)
    for context, length in ((ORIGINAL, 60), (TRAINED, 200)):
        compare_logits(model, context, length, backend)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_yarn_as_the_makers_of_qwen_ask_for_it(tmp_path: Path, family: str) -> None:
    """By overrides of a folder that was saved without it, as Qwen's model cards say."""
    model = make_hf_folder(tmp_path, family, max_position_embeddings=ORIGINAL)
    scaling = {"rope_type": "yarn", "factor": 4.0, ORIGINAL_KEY: ORIGINAL}
    overrides = {"rope_parameters": {"rope_theta": 10000.0, **scaling}}
    with pytest.raises(ConfigError, match=r"max_model_len|max-model-len"):
        make_engine(model, max_model_len=TRAINED)
    config = json.loads((model / "config.json").read_text("utf-8"))
    for each in ({**overrides, "max_position_embeddings": TRAINED}, {"rope_scaling": scaling}):
        (model / "config.json").write_text(json.dumps(config), "utf-8")
        engine = make_engine(model, max_model_len=TRAINED, hf_overrides=each)
        (model / "config.json").write_text(json.dumps({**config, **each}), "utf-8")
        compare_logits(model, TRAINED, 200, "cpu", engine)


def compare_logits(
    model: Path, context: int | None, length: int, backend: str, engine: InferenceEngine | None = None
) -> None:
    """Those of a text of this length, its last tokens generated, with those of transformers."""
    engine = engine or make_engine(
        model, max_model_len=context, attention_backend=backend, max_num_batched_tokens=48, max_num_seqs=4
    )
    prompt = torch.randint(0, TOKENIZER_SIZE, (length - 6,), generator=torch.Generator().manual_seed(0))
    with recorded_logits(engine, every_position=True) as ours:
        (tokens,) = generate_ids(engine, [prompt.tolist()], 6)
    ids = [*prompt.tolist(), *tokens]
    with torch.inference_mode():
        theirs = reference(model)(torch.tensor([ids])).logits[0]
    assert len(ids) == length and sorted(ours) == list(range(length - 1))
    assert max(relative_error(ours[position], theirs[position]) for position in ours) < 1e-4


def gguf_keys(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a converter writes of a scaling: metadata, and tensors."""
    keys: dict[str, Any] = {"llama.rope.scaling.original_context_length": ORIGINAL}
    if name == "yarn":
        return {**keys, "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, {}
    factor = math.sqrt(1 + math.log(TRAINED / ORIGINAL) / math.log(ORIGINAL))
    keys["llama.rope.scaling.attn_factor"] = factor
    return keys, {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}


@pytest.mark.parametrize("name", ["yarn", "longrope"])
def test_a_gguf_file_gives_the_tokens_of_its_folder(tmp_path: Path, name: str) -> None:
    source = make_hf_folder(
        tmp_path / "hf", "llama", max_position_embeddings=TRAINED, rope_parameters=parameters(name)
    )
    keys, tensors = gguf_keys(name)
    file = write_gguf(tmp_path / "m.gguf", source, extra_metadata=keys, extra_tensors=tensors)
    from_gguf, from_folder = load_spec(file), load_spec(source)
    assert from_gguf.max_position == from_folder.max_position == TRAINED
    for length in (ORIGINAL, TRAINED):
        frequencies = [
            inverse_frequencies(s.layers[0].mixer.rope.at_length(length, 32), 32)
            for s in (from_gguf, from_folder)
        ]
        torch.testing.assert_close(*frequencies, rtol=1e-6, atol=0)
    assert from_gguf.layers[0].mixer.rope.attention_factor == pytest.approx(
        from_folder.layers[0].mixer.rope.attention_factor, rel=1e-6
    )
    prompt = torch.randint(0, TOKENIZER_SIZE, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    outputs = [generate_ids(make_engine(path, max_model_len=200), [prompt], 12) for path in (file, source)]
    assert outputs[0] == outputs[1]


def test_gguf_yarn_of_deepseek(tmp_path: Path) -> None:
    source = make_hf_folder(tmp_path / "hf", "llama", max_position_embeddings=TRAINED)
    keys = {**gguf_keys("yarn")[0], "llama.rope.scaling.yarn_log_multiplier": 0.5}
    rope = load_spec(write_gguf(tmp_path / "m.gguf", source, extra_metadata=keys)).layers[0].mixer.rope
    expected = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert rope.attention_factor == pytest.approx(expected)


def test_a_longer_context_than_the_original_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model = make_hf_folder(
        tmp_path, "llama", max_position_embeddings=TRAINED, rope_parameters=parameters("longrope")
    )
    args = {"model": str(model), "device": "cpu", "attention_backend": "torch"}
    assert EngineArgs(**args).resolve().max_model_len == ORIGINAL
    assert "Rotary scaling" not in caplog.text
    assert EngineArgs(**args, max_model_len=TRAINED).resolve().max_model_len == TRAINED
    assert f"--max-model-len {ORIGINAL}" in caplog.text


BAD = [
    ({"type": "yarn"}, "factor is missing"),
    ({"type": "yarn", "factor": 0.5}, "factor must be"),
    ({"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}, "beta_fast must not be below"),
    ({"type": "yarn", "factor": 2, "truncate": "no"}, "truncate must be"),
    ({"type": "yarn", "factor": 2, "attention_factor": -1}, "attention_factor must be"),
    ({"type": "yarn", "factor": 2, "extrapolation_factor": 2}, "extrapolation_factor other than 1"),
    ({"type": "yarn", "factor": 2, "long_factor": LONG}, "long_factor is not a key of rotary scaling 'yarn'"),
    ({"type": "dynamic"}, "factor is missing"),
    ({"type": "dynamic", "factor": 2, "alpha": 1000}, "alpha is not a key"),
    ({"type": "longrope", "long_factor": LONG}, "short_factor is missing"),
    (
        {"type": "longrope", "short_factor": SHORT, "long_factor": LONG[1:]},
        "long_factor must list 16 numbers",
    ),
    (
        {"type": "su", "short_factor": [0, *SHORT[1:]], "long_factor": LONG},
        "short_factor must list 16 numbers",
    ),
    ({"type": "longrope", "short_factor": "1", "long_factor": LONG}, "short_factor must list 16"),
]


@pytest.mark.parametrize(("scaling", "said"), BAD)
def test_a_bad_scaling_is_named(tmp_path: Path, scaling: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        load_spec(folder(tmp_path, scaling))
    assert f"rope_scaling.{said}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "tensors", "said"),
    [
        ({"llama.rope.scaling.type": "longrope"}, {}, "longrope needs the tensors"),
        ({}, {"rope_factors_long.weight": LONG}, "longrope needs the tensors"),
        ({}, {"rope_factors_short.weight": SHORT[1:], "rope_factors_long.weight": LONG}, "16 divisors"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0},
            {"rope_freqs.weight": SHORT},
            "has both llama.rope.scaling.type yarn and a tensor rope_freqs.weight",
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.yarn_ext_factor": 0.5,
            },
            {},
            "yarn_ext_factor other than 1",
        ),
    ],
)
def test_bad_gguf_scaling_is_named(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any], said: str
) -> None:
    source = make_hf_folder(tmp_path / "hf", "llama")
    file = write_gguf(tmp_path / "m.gguf", source, extra_metadata=metadata, extra_tensors=tensors)
    with pytest.raises(ModelFileError) as caught:
        load_spec(file)
    assert said in str(caught.value) and "\n" not in str(caught.value)
