"""`load_spec` of folders: real configurations of every family, and everything that must be refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refusal
from tiny_models import FAMILIES, make_hf_folder

from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.registry import load_spec
from microvllm.adapters.rope_spec import RopeSpec, llama3_divisors
from microvllm.adapters.spec import Attention
from microvllm.adapters.tensors import WHOLE

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_7B_V03 = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32768,
}
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
REMOVED = object()


def folder(path: Path, base: dict[str, Any], **changes: Any) -> Path:
    """A folder whose config.json is `base` with changes; `REMOVED` takes a key out."""
    config = {key: value for key, value in {**base, **changes}.items() if value is not REMOVED}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return path


def problem(path: Path) -> str:
    return refusal(load_spec, path, most=600)


def test_smollm2(tmp_path: Path) -> None:
    spec = load_spec(folder(tmp_path, SMOLLM2_135M))
    assert (
        spec.architecture,
        spec.num_layers,
        spec.layers[0].mixer.num_heads,
        spec.layers[0].mixer.num_kv_heads,
    ) == ("llama", 30, 9, 3)
    assert (spec.layers[0].mixer.head_dim, spec.vocab_size, spec.max_position, spec.rms_norm_eps) == (
        64,
        49152,
        8192,
        1e-5,
    )
    assert spec.layers[0].mixer.rope == RopeSpec(theta=100000.0)
    assert spec.tie_embeddings and not (
        spec.layers[0].mixer.qkv_bias
        or spec.layers[0].mixer.o_bias
        or spec.layers[0].mlp.bias
        or spec.layers[0].mixer.qk_norm
    )
    assert (spec.dtype, spec.bos_token_id, spec.eos_token_ids) == ("bfloat16", 1, (2,))


def test_llama_31(tmp_path: Path) -> None:
    spec = load_spec(folder(tmp_path, LLAMA_31_8B))
    assert spec.layers[0].mixer.rope == RopeSpec(
        theta=500000.0,
        scaling="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    assert (spec.layers[0].mixer.head_dim, spec.max_position, spec.tie_embeddings) == (128, 131072, False)
    assert spec.eos_token_ids == (128001, 128008, 128009)


def test_mistral(tmp_path: Path) -> None:
    spec = load_spec(folder(tmp_path, MISTRAL_7B_V03))
    assert (spec.architecture, spec.layers[0].mixer.head_dim, spec.layers[0].mixer.window) == (
        "mistral",
        128,
        None,
    )
    assert load_spec(folder(tmp_path, MISTRAL_7B_V03, sliding_window=4096)).layers[0].mixer.window == 4096
    assert load_spec(folder(tmp_path, MISTRAL_7B_V03, sliding_window=32768)).layers[0].mixer.window is None
    assert load_spec(folder(tmp_path, MISTRAL_7B_V03, head_dim=160)).layers[0].mixer.head_dim == 160
    # transformers' default when the key is not written at all
    assert load_spec(folder(tmp_path, MISTRAL_7B_V03, sliding_window=REMOVED)).layers[0].mixer.window == 4096


def test_qwen25(tmp_path: Path) -> None:
    spec = load_spec(folder(tmp_path, QWEN25_05B))
    assert (
        spec.architecture,
        spec.layers[0].mixer.head_dim,
        spec.layers[0].mixer.qkv_bias,
        spec.layers[0].mixer.o_bias,
    ) == ("qwen2", 64, True, False)
    assert (spec.layers[0].mixer.window, spec.tie_embeddings) == (None, True)


def test_qwen3(tmp_path: Path) -> None:
    spec = load_spec(folder(tmp_path, QWEN3_06B))
    assert (
        spec.architecture,
        spec.layers[0].mixer.head_dim,
        spec.layers[0].mixer.qk_norm,
        spec.layers[0].mixer.qkv_bias,
    ) == ("qwen3", 128, True, False)
    assert load_spec(folder(tmp_path, QWEN3_06B, attention_bias=True)).layers[0].mixer.o_bias
    assert load_spec(folder(tmp_path, QWEN3_06B, head_dim=REMOVED)).layers[0].mixer.head_dim == 128


def test_qwen_sliding_window(tmp_path: Path) -> None:
    def windows(**changes: Any) -> list[int | None]:
        config = {"use_sliding_window": True, "sliding_window": 1024, **changes}
        spec = load_spec(folder(tmp_path, QWEN25_05B, **config))
        return [layer.mixer.window for layer in spec.layers]

    assert windows(max_window_layers=0) == [1024] * 24
    assert windows(max_window_layers=24) == [None] * 24
    assert windows() == [None] * 21 + [1024] * 3
    assert windows(layer_types=["sliding_attention"] * 24) == [1024] * 24
    assert windows(layer_types=["full_attention"] * 24) == [None] * 24
    assert windows(layer_types=["full_attention", "sliding_attention"] * 12) == [None, 1024] * 12
    # A window that no context reaches changes nothing.
    assert windows(sliding_window=QWEN25_05B["sliding_window"]) == [None] * 24
    assert windows(use_sliding_window=False, max_window_layers=0) == [None] * 24


def test_gemma_3(tmp_path: Path) -> None:
    """Five layers of six slide, with their own rotary base; the scaling does not lengthen the context."""
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    spec = load_spec(folder(tmp_path, GEMMA_3_1B, **scaled))
    assert [layer.mixer.window for layer in spec.layers] == ([512] * 5 + [None]) * 4 + [512] * 2
    local, full = spec.mixers
    assert local.rope == RopeSpec(theta=1e4)
    assert full.rope == RopeSpec(theta=1e6, scaling="linear", factor=8.0)
    assert (full.scale, full.softcap, full.qk_norm, full.head_dim) == (256**-0.5, None, True, 256)
    assert spec.max_position == spec.default_length == 32768
    assert (spec.norm_offset, spec.embedding_scale, spec.logits_softcap) == (1.0, 1152**0.5, None)
    assert spec.tie_embeddings and spec.layers[0].post_norms
    assert spec.layers[0].mlp == MLP(size=6912, activation="gelu_tanh")
    # A window that no context reaches changes nothing, but its layers keep their rotation.
    wide = load_spec(folder(tmp_path, GEMMA_3_1B, sliding_window=32768))
    assert [mixer.window for mixer in wide.mixers] == [None, None]
    assert wide.layers[0].mixer.rope == local.rope


def test_gemma_2(tmp_path: Path) -> None:
    """Absent caps are the authors' defaults, null ones are none."""
    config = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 512}
    absent = {key: REMOVED for key in GEMMA_3_1B if key.endswith("softcapping") or key.startswith("rope_")}
    spec = load_spec(folder(tmp_path, GEMMA_3_1B, **config, **absent))
    assert [layer.mixer.window for layer in spec.layers] == [512, None] * 13
    assert {mixer.softcap for mixer in spec.mixers} == {50.0} and spec.logits_softcap == 30.0
    assert {mixer.rope for mixer in spec.mixers} == {RopeSpec(theta=1e4)}
    assert not spec.mixers[0].qk_norm
    spec = load_spec(folder(tmp_path, GEMMA_3_1B, **config))
    assert (spec.mixers[0].softcap, spec.logits_softcap) == (None, None)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_activation", "silu", "hidden_activation must be gelu_pytorch_tanh"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping is set"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention is not supported"),
        ("rope_parameters", {"rope_theta": 1e4}, "rope_parameters.rope_theta must be one of full_attention"),
        ("layer_types", ["full_attention"], "layer_types must list one kind for each of the 26 layers"),
        ("query_pre_attn_scalar", 0, "query_pre_attn_scalar must be a finite number above 0"),
        ("architectures", ["Gemma3ForConditionalGeneration"], "architectures names"),
    ],
)
def test_bad_gemma_key(tmp_path: Path, key: str, value: Any, said: str) -> None:
    assert said in problem(folder(tmp_path, GEMMA_3_1B, **{key: value}))


def test_phi_3(tmp_path: Path) -> None:
    config = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rms_norm_eps": REMOVED}
    spec = load_spec(folder(tmp_path, MISTRAL_7B_V03, **config))
    assert (spec.architecture, spec.rms_norm_eps, spec.layers[0].mixer.window) == ("phi3", 1e-5, None)
    spec = load_spec(folder(tmp_path, MISTRAL_7B_V03, **config, sliding_window=2047))
    assert spec.layers[0].mixer.window == 2047
    spec = load_spec(folder(tmp_path, MISTRAL_7B_V03, **config, partial_rotary_factor=0.75))
    assert spec.layers[0].mixer.rope == RopeSpec(theta=1e6, rotary_dim=96)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers_writes_it(tmp_path: Path, family: str) -> None:
    """The newest spelling, by transformers itself, with llama3 scaling in `rope_parameters`."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 128,
    }
    make_hf_folder(tmp_path, family, rope_parameters=rope, tokenizer=False)
    spec = load_spec(tmp_path)
    assert spec.layers[0].mixer.rope == RopeSpec(
        theta=5000.0,
        scaling="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=2.0,
        original_max_position=128,
    )
    assert (spec.architecture, spec.layers[0].mixer.num_heads, spec.layers[0].mixer.num_kv_heads) == (
        family,
        9,
        3,
    )
    assert spec.layers[0].mixer.head_dim == (16 if family == "qwen2" else 32)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_linear_scaling_multiplies_the_context(tmp_path: Path, key: str) -> None:
    spec = load_spec(folder(tmp_path, SMOLLM2_135M, **{key: {"type": "linear", "factor": 4.0}}))
    assert spec.layers[0].mixer.rope == RopeSpec(theta=100000.0, scaling="linear", factor=4.0)
    assert spec.max_position == 4 * 8192


def test_rope_theta_beside_or_inside(tmp_path: Path) -> None:
    inside = {"rope_type": "default", "rope_theta": 7.0}
    assert load_spec(folder(tmp_path, SMOLLM2_135M, rope_parameters=inside)).layers[0].mixer.rope.theta == 7.0
    assert load_spec(folder(tmp_path, SMOLLM2_135M, rope_theta=REMOVED)).layers[0].mixer.rope.theta == 10000.0


LLAMA3 = LLAMA_31_8B["rope_scaling"]
BAD_ROPE = [
    ({"type": "mrope", "factor": 4.0}, "rope_scaling.type"),
    ({"rope_type": "ntk", "factor": 4.0}, "rope_scaling.rope_type"),
    ({"rope_type": 3}, "rope_scaling.rope_type"),
    ({"type": "linear", "factor": 0}, "rope_scaling.factor"),
    ({"type": "linear", "factor": float("nan")}, "rope_scaling.factor"),
    ({"type": "linear", "factor": float("inf")}, "rope_scaling.factor"),
    ({"type": "linear", "factor": "4"}, "rope_scaling.factor"),
    ({"type": "linear", "factor": True}, "rope_scaling.factor"),
    ({"type": "linear"}, "rope_scaling.factor"),
    ({"type": "linear", "factor": 2.0, "scale": 4}, "rope_scaling.scale"),
    ({"factor": 4.0}, "rope_scaling.factor"),
    ({**LLAMA3, "factor": float("nan")}, "rope_scaling.factor"),
    ({**LLAMA3, "low_freq_factor": 4.0}, "rope_scaling.high_freq_factor"),
    ({**LLAMA3, "original_max_position_embeddings": 8192.5}, "rope_scaling.original_max_position_embeddings"),
    ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, "rope_scaling.rope_theta"),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": None}, "rope_scaling.truncate"),
    ({"full_attention": {"rope_type": "default"}}, "rope_scaling.full_attention"),
    ([4.0], "rope_scaling"),
    ("linear", "rope_scaling"),
]


@pytest.mark.parametrize(("scaling", "key"), BAD_ROPE)
def test_bad_rope_scaling(tmp_path: Path, scaling: Any, key: str) -> None:
    message = problem(folder(tmp_path, SMOLLM2_135M, rope_scaling=scaling))
    assert message.startswith(f"{tmp_path / 'config.json'}: {key} ")


@pytest.mark.parametrize(
    ("key", "value", "ignored"),
    [
        ("eos_token_id", -1, "-1"),
        ("eos_token_id", [2, 49152, -1], "49152"),
        ("eos_token_id", [2, 1 << 40], str(1 << 40)),
        ("bos_token_id", 49152, "49152"),
    ],
)
def test_an_id_outside_of_the_vocabulary_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: Any, ignored: str
) -> None:
    spec = load_spec(folder(tmp_path, SMOLLM2_135M, **{key: value}))
    expected = {"eos_token_id": (2,) if isinstance(value, list) else (), "bos_token_id": None}
    assert getattr(spec, {"eos_token_id": "eos_token_ids"}.get(key, key)) == expected[key]
    assert f"{key} {ignored} is ignored: the vocabulary has 49152 tokens" in caplog.text


BAD_KEYS = [
    ("architectures", ["DbrxForCausalLM"]),
    ("architectures", ["LlamaForSequenceClassification"]),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", [7]),
    ("model_type", "qwen2"),
    ("model_type", ["llama"]),
    ("vocab_size", 0),
    ("vocab_size", -5),
    ("vocab_size", "49152"),
    ("vocab_size", 49152.0),
    ("vocab_size", True),
    ("vocab_size", 1 << 70),
    ("vocab_size", REMOVED),
    ("hidden_size", REMOVED),
    ("hidden_size", [576]),
    ("hidden_size", 577),
    ("intermediate_size", None),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 1_000_000),
    ("num_attention_heads", 7),
    ("num_attention_heads", 0),
    ("num_attention_heads", 16),
    ("head_dim", 63),
    ("head_dim", 0),
    ("max_position_embeddings", 0),
    ("max_position_embeddings", -1),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", float("inf")),
    ("rms_norm_eps", "1e-5"),
    ("rope_theta", 0),
    ("rope_theta", float("nan")),
    ("hidden_act", "gelu"),
    ("partial_rotary_factor", 0.5),
    ("quantization_config", "gptq"),
    ("num_local_experts", 8),
    ("tie_word_embeddings", "yes"),
    ("attention_bias", 1),
    ("mlp_bias", "no"),
    ("torch_dtype", "float8_e4m3fn"),
    ("torch_dtype", 16),
    ("bos_token_id", "1"),
    ("eos_token_id", [2, 3.5]),
    ("eos_token_id", [[2]]),
]


@pytest.mark.parametrize(("key", "value"), BAD_KEYS)
def test_bad_config_key(tmp_path: Path, key: str, value: Any) -> None:
    message = problem(folder(tmp_path, SMOLLM2_135M, **{key: value}))
    assert message.startswith(f"{tmp_path / 'config.json'}: {key} "), message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not JSON"),
        (b"<html>", "not JSON"),
        (b"[1, 2]", "JSON object"),
        (b"null", "JSON object"),
        (b'"a"', "JSON object"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[" * 200_000, "nested"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "config.json"),
        (b"{}", "architectures"),
    ],
)
def test_config_that_is_none(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    message = problem(tmp_path)
    assert str(tmp_path / "config.json") in message and said in message


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    assert "no such file or folder" in problem(tmp_path / "absent")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf" in problem(tmp_path)  # the hint names the file to give instead
    (tmp_path / "w.safetensors").write_bytes(b"x")
    assert "config.json" in problem(tmp_path / "w.safetensors")
    (tmp_path / "config.json").mkdir()
    assert "not a regular file" in problem(tmp_path)
    assert "cannot be read" in problem(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "regular file" in problem(tmp_path / "pipe.gguf")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert str(loop) in problem(loop)


def test_code_of_the_model_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "modeling_custom.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "modeling_custom.Config", "AutoModelForCausalLM": "modeling_custom.Model"}
    load_spec(folder(tmp_path, SMOLLM2_135M, auto_map=auto_map))
    assert not marker.exists()


def test_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from microvllm.adapters.registry import load_spec; "
        f"load_spec(Path({str(folder(tmp_path, SMOLLM2_135M))!r})); "
        "sys.exit(bool({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_llama3_divisors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        max_position_embeddings=131072,
        rope_parameters={**LLAMA3, "rope_theta": 500000.0},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    rope = RopeSpec(
        theta=500000.0, scaling="llama3", factor=8.0, high_freq_factor=4.0, original_max_position=8192
    )
    np.testing.assert_allclose(plain / scaled.numpy(), llama3_divisors(rope, 128), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"keys_as_values": True}, {"source": 0}], ids=str)
def test_a_token_s_products_are_the_elements_of_an_attention_s_matrices(options: dict[str, Any]) -> None:
    mixer = Attention(num_heads=6, num_kv_heads=2, head_dim=8, rope=RopeSpec(), **options)
    names = {name: name for name in ("q", "k", "v", "k_as_v", "gate_of_q", "qkv", "o")}
    shapes = [slot.shape for slot in mixer.slots(40, names, WHOLE)]
    assert mixer.num_products(40) == sum(rows * columns for rows, columns in shapes)
