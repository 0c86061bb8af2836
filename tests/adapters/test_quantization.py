"""`quantization_config`: what is read of it, and what is refused by its key; `--quantization`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_tools import load_script, variant_folder

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.quantization import Quantization, read_quantization
from microvllm.adapters.registry import load_spec
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError

FORMS = load_script("quantize_checkpoint").FORMS


def read(form: str, **changes: Any) -> Quantization:
    """Of a form's own object with keys changed; None removes one, and dots lead into the first group."""
    part = FORMS[form].config(128)
    for key, value in changes.items():
        inner, _, last = key.rpartition("__")
        place = part
        for name in inner.split("__") if inner else ():
            place = place["config_groups"]["group_0"] if name == "group" else place[name]
        place[last] = value
    found = read_quantization(Fields(Path("config.json"), {"quantization_config": part}))
    assert found is not None
    return found


UNREAD = [
    (
        "fp8",
        {"quant_method": "bitsandbytes"},
        "quant_method 'bitsandbytes' is not supported: fp8, compressed-",
    ),
    ("fp8", {"quant_method": "quark"}, "quant_method 'quark' is not supported"),
    ("fp8", {"quant_method": None}, "quant_method is missing"),
    ("fp8", {"fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
    ("fp8", {"activation_scheme": "none"}, "activation_scheme 'none' is not supported"),
    ("fp8", {"kv_cache_scheme": "static"}, "kv_cache_scheme must be an object"),
    ("fp8", {"weight_block_size": [128]}, "weight_block_size must be two sizes"),
    ("fp8", {"weight_block_size": [128, "x"]}, "weight_block_size must be two sizes"),
    ("fp8", {"weight_block_size": [128, float("inf")]}, "weight_block_size must be two sizes"),
    ("fp8", {"weight_block_size": [0, 128]}, "weight_block_size must be two sizes above 0"),
    ("fp8", {"ignored_layers": "lm_head"}, "ignored_layers must be a list of names"),
    ("fp8", {"ignored_layers": ["re:("]}, "ignored_layers has 're:(', which is no expression"),
    ("modelopt-fp8", {"quant_algo": "NVFP4"}, "quant_algo 'NVFP4' is not supported"),
    ("modelopt-fp8", {"quant_algo": None}, "quant_algo is missing"),
    (
        "modelopt-fp8",
        {"kv_cache_quant_algo": "NVFP4"},
        "kv_cache_quant_algo 'NVFP4' is not supported: FP8 is",
    ),
    ("compressed-fp8-tensor", {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' is not"),
    ("compressed-fp8-tensor", {"config_groups": None}, "config_groups is missing"),
    ("compressed-fp8-tensor", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is set"),
    ("compressed-fp8-tensor", {"transform_config": {"config_groups": {"a": 1}}}, "transform_config is set"),
    ("compressed-fp8-tensor", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme.type is missing"),
    ("compressed-fp8-tensor", {"group__targets": ["Embedding"]}, "group_0.targets has 'Embedding'"),
    ("compressed-fp8-tensor", {"group__output_activations": {"num_bits": 8}}, "output_activations is set"),
    ("compressed-fp8-tensor", {"group__weights": None}, "group_0.weights is missing"),
    ("compressed-fp8-tensor", {"group__weights__num_bits": 4}, "weights.num_bits must be 8 in this format"),
    ("compressed-fp8-tensor", {"group__weights__type": "int"}, "weights.type 'int' is not supported"),
    ("compressed-fp8-tensor", {"group__weights__symmetric": False}, "weights.symmetric is false"),
    ("compressed-fp8-tensor", {"group__weights__dynamic": True}, "weights.dynamic is true"),
    ("w4a16", {"group__weights__num_bits": 3}, "weights.num_bits must be 4 or 8 in this format, got 3"),
    (
        "w4a16",
        {"group__weights__strategy": "tensor_group"},
        "weights.strategy 'tensor_group' is not supported",
    ),
    ("w4a16", {"group__weights__group_size": 0}, "weights.group_size must be a positive integer"),
    ("w4a16", {"group__weights__actorder": "odd"}, "weights.actorder 'odd' is not supported"),
    (
        "w4a16",
        {"group__weights__strategy": "channel", "group__weights__actorder": "group"},
        "actorder is set",
    ),
    ("gptq-4", {"bits": 3}, "quantization_config.bits must be 4 or 8, got 3"),
    ("gptq-4", {"group_size": 0}, "group_size must be a positive integer"),
    ("gptq-4", {"group_size": None}, "group_size is missing"),
    ("gptq-4", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
    ("gptq-4", {"dynamic": {"-:.*k_proj": {}}}, "dynamic is set"),
    ("gptq-4", {"desc_act": "yes"}, "desc_act must be true or false"),
    ("gptq-4", {"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported"),
    ("awq", {"bits": 8}, "bits must be 4, got 8"),
    ("awq", {"version": "gemv"}, "version must be gemm, got 'gemv'"),
    ("awq", {"zero_point": False}, "zero_point is false"),
]


@pytest.mark.parametrize(("form", "changes", "problem"), UNREAD)
def test_what_is_not_read_is_named(form: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFileError, match=r"^config\.json: quantization_config\.") as caught:
        read(form, **changes)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


PROJECTION = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "ignored"),
    [
        (PROJECTION, True),
        ("q_proj", True),
        ("model.layers.10", True),
        ("model.layers.1", False),
        ("proj", False),
        ("model.layers.*.self_attn.*", True),
        ("model.layers.1.*", False),
        (r"re:model\.layers\.\d+\.self_attn", True),
        ("re:self_attn", False),
    ],
)
def test_which_modules_a_pattern_stands_for(pattern: str, ignored: bool) -> None:
    found = read("compressed-fp8-channel", ignore=[pattern])
    assert (found.scheme(PROJECTION) is None) == ignored
    assert found.scheme("model.layers.2.mlp.down_proj") is not None


def test_modules_in_blocks_of_gptq() -> None:
    found = read("gptq-4", modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.down_proj"]])
    assert found.scheme(PROJECTION) is not None and found.scheme("model.layers.1.mlp.up_proj") is None


def test_older_names_of_keys() -> None:
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}
    found = read_quantization(Fields(Path("config.json"), {"compression_config": older}))
    assert found is not None and found.scheme(PROJECTION) == read("awq").scheme(PROJECTION)


def quantized_config(tmp_path: Path, form: str) -> str:
    """A folder whose config.json says that it is quantised; nothing else of it is read."""
    config = json.loads((variant_folder("llama-tied") / "config.json").read_text())
    config["quantization_config"] = FORMS[form].config(128)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("form", "flag"),
    [
        ("fp8", "fp8"),
        ("w4a16", "compressed-tensors"),
        ("modelopt-fp8", "modelopt"),
        ("gptq-4", "gptq"),
        ("gptq-4", "gptq_marlin"),
        ("awq", "awq_marlin"),
        ("awq", None),
    ],
)
def test_the_flag_may_name_what_the_checkpoint_is(tmp_path: Path, form: str, flag: str | None) -> None:
    model = quantized_config(tmp_path, form)
    config = EngineArgs(model=model, quantization=flag, device="cpu", attention_backend="torch").resolve()
    assert config.spec.quantization == load_spec(tmp_path).quantization is not None


def test_a_flag_that_names_something_else_is_refused(tmp_path: Path) -> None:
    model = quantized_config(tmp_path, "awq")
    for value, problem in (
        ("gptq", r"--quantization gptq: .* is quantised as awq"),
        ("gguf", r"--quantization gguf: .* is quantised as awq"),
        ("bitsandbytes", r"--quantization must be one of fp8, .*, got bitsandbytes"),
    ):
        with pytest.raises(ConfigError, match=problem):
            EngineArgs(model=model, quantization=value, device="cpu").resolve()
    with pytest.raises(
        ConfigError, match=r"--quantization awq: .* plain weights, which loading quantises to"
    ):
        EngineArgs(model=str(variant_folder("llama-tied")), quantization="awq", device="cpu").resolve()
