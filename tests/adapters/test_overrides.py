"""--hf-overrides, --rope-scaling and --rope-theta: the model is what a folder with those values would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_hf_folder

from microvllm import LLM, SamplingParams
from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import load_spec
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
HIGH = {"rope_theta": 5e5}
LINEAR = {"rope_scaling": {"type": "linear", "factor": 2.0}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def folder(path: Path, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**BASE, **config}), "utf-8")
    return path


@pytest.mark.parametrize(
    ("stored", "overrides", "wanted"),
    [
        ({}, HIGH, HIGH),
        ({"rope_theta": 1e4}, HIGH, HIGH),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, HIGH, HIGH),
        ({"rope_parameters": {**YARN, "rope_theta": 1e4}}, HIGH, {"rope_scaling": YARN, **HIGH}),
        # A scaling without a base keeps the model's, wherever that is.
        (HIGH, {"rope_scaling": YARN}, {"rope_scaling": YARN, **HIGH}),
        (HIGH, {"rope_parameters": YARN}, {"rope_scaling": YARN, **HIGH}),
        ({"rope_parameters": {"rope_type": "default", **HIGH}}, LINEAR, {**LINEAR, **HIGH}),
        ({"rope_theta": 1e4}, {"rope_parameters": {**YARN, **HIGH}}, {"rope_scaling": YARN, **HIGH}),
        # A scaling is replaced as a whole, and may be taken away.
        ({"rope_scaling": {**YARN, "beta_fast": 16.0}}, LINEAR, LINEAR),
        ({"rope_scaling": YARN, **HIGH}, {"rope_scaling": None}, HIGH),
        ({"rope_parameters": {**YARN, **HIGH}}, {"rope_parameters": None}, HIGH),
        ({}, {"max_position_embeddings": 4096}, {"max_position_embeddings": 4096}),
        ({}, {"num_hidden_layers": 1, "rms_norm_eps": 1e-5}, {"num_hidden_layers": 1, "rms_norm_eps": 1e-5}),
        ({"eos_token_id": 1}, {"eos_token_id": [2, 3]}, {"eos_token_id": [2, 3]}),
        ({"architectures": ["Other"]}, {"architectures": ["LlamaForCausalLM"]}, {}),
        ({}, {}, {}),
    ],
)
def test_the_model_is_as_if_its_file_said_so(
    stored: dict[str, Any], overrides: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    changed = load_spec(folder(tmp_path / "stored", **stored), overrides)
    assert changed == load_spec(folder(tmp_path / "wanted", **wanted))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"rope_thetta": 1.0}, "--hf-overrides: rope_thetta is no key that a llama model has here"),
        ({"text_config": {"rope_theta": 1.0}}, "--hf-overrides: text_config is no key"),
        ({"rope_theta": -1.0}, "rope_theta must be a finite number above 0"),
        ({"rope_theta": "high"}, "rope_theta must be a finite number"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "odd", "factor": 2.0}}, "rope_type must be one of"),
        ({"rope_scaling": {"rope_type": "yarn", "faktor": 2.0}}, "faktor is not a key of rotary scaling"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"quantization_config": {"quant_method": "fp9"}}, "quantization_config.quant_method 'fp9'"),
    ],
)
def test_a_wrong_override_is_named(overrides: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineArgs(model=str(folder(tmp_path)), hf_overrides=overrides).resolve()
    assert problem in str(caught.value) and "--hf-overrides" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy is None  # not "fetch the file again": the command adds the help of the flag


def test_the_rotary_options_win_over_overrides(tmp_path: Path) -> None:
    args = EngineArgs(
        model=str(folder(tmp_path / "a")),
        hf_overrides={"rope_theta": 1e4, "max_position_embeddings": 64},
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_theta=5e5,
        device="cpu",
        attention_backend="torch",
    )
    scaling = {"type": "linear", "factor": 2.0}
    wanted = folder(tmp_path / "b", rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=64)
    assert args.resolve().spec == load_spec(wanted)
    assert args.resolve().max_model_len == 128


def test_what_is_no_object_is_refused(tmp_path: Path) -> None:
    model = str(folder(tmp_path))
    for options in ({"hf_overrides": lambda config: config}, {"hf_overrides": "{}"}, {"rope_theta": "x"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            EngineArgs(model=model, **options).resolve()


def test_a_gguf_file_has_no_such_values(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match="--hf-overrides replaces values"):
        load_spec(file, {"rope_theta": 1e6})
    with pytest.raises(ConfigError, match="--rope-theta replaces values"):
        EngineArgs(model=str(file), rope_theta=1e6).resolve()


def test_answers_are_those_of_the_changed_model(tmp_path: Path) -> None:
    """The same weights under another configuration: the override alone makes the difference."""
    stored = make_hf_folder(tmp_path / "stored", "llama")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    changed = make_hf_folder(tmp_path / "changed", "llama", rope_parameters={**scaling, "rope_theta": 300.0})
    prompt, params = list(range(3, 60)), SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "attention_backend": "torch"}
    options |= {"cpu_threads": 1, "num_gpu_blocks_override": 256}  # else most of the memory, page by page

    def tokens(model: Path, **more: Any) -> list[int]:
        return list(LLM(str(model), **options, **more).generate([prompt], params)[0].outputs[0].token_ids)

    wanted = tokens(changed)
    assert tokens(stored, hf_overrides={"rope_parameters": {**scaling, "rope_theta": 300.0}}) == wanted
    assert tokens(stored, rope_scaling=scaling, rope_theta=300.0) == wanted
    assert tokens(stored) != wanted
