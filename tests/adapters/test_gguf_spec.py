"""`load_spec` of GGUF files: what their metadata says, and everything in it that must be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refusal
from tiny_models import FAMILIES, make_hf_folder, token_id, write_gguf

from microvllm.adapters.registry import load_spec
from microvllm.adapters.rope_spec import RopeSpec, llama3_divisors


def problem(path: Path) -> str:
    return refusal(load_spec, path, most=600)


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_says_the_same_as_the_folder(tmp_path: Path, family: str) -> None:
    source = make_hf_folder(tmp_path / "hf", family, tie=family == "qwen3", vocab_size=333)
    from_folder = load_spec(source)
    from_gguf = load_spec(write_gguf(tmp_path / "model.gguf", source))
    assert from_gguf.rms_norm_eps == pytest.approx(from_folder.rms_norm_eps, rel=1e-6)
    assert from_gguf.architecture == ("llama" if family == "mistral" else family)
    for name in from_folder.__struct_fields__:
        if name not in ("rms_norm_eps", "architecture", "eos_token_ids"):
            assert getattr(from_gguf, name) == getattr(from_folder, name), name
    # What ends a text is known without being named.
    assert from_gguf.eos_token_ids == (*from_folder.eos_token_ids, token_id("<|endoftext|>"))


def test_gguf_biases_follow_the_tensors(tmp_path: Path) -> None:
    source = make_hf_folder(tmp_path / "hf", "llama", attention_bias=True, mlp_bias=True)
    spec = load_spec(write_gguf(tmp_path / "model.gguf", source))
    assert spec.layers[0].mixer.qkv_bias and spec.layers[0].mixer.o_bias and spec.layers[0].mlp.bias


def test_gguf_llama3_factors(tmp_path: Path) -> None:
    """Llama 3.1's GGUF files hold the divisors of its frequencies; its scaling is recovered from them."""
    source = make_hf_folder(
        tmp_path / "hf", "llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    rope = RopeSpec(
        theta=5e5,
        scaling="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    divisors = llama3_divisors(rope, 32)
    assert min(divisors) == 1.0 and max(divisors) == 32.0 and len(set(divisors)) > 2
    file = write_gguf(tmp_path / "a.gguf", source, extra_tensors={"rope_freqs.weight": divisors})
    assert load_spec(file).layers[0].mixer.rope == rope
    ones = write_gguf(tmp_path / "b.gguf", source, extra_tensors={"rope_freqs.weight": np.ones(16)})
    assert load_spec(ones).layers[0].mixer.rope == RopeSpec(theta=5e5)
    for number, bad in enumerate((np.linspace(1, 32, 16), np.ones(8), np.full(16, np.nan), np.zeros(16))):
        file = write_gguf(tmp_path / f"bad{number}.gguf", source, extra_tensors={"rope_freqs.weight": bad})
        assert "rope_freqs.weight" in problem(file)


BAD_METADATA: list[tuple[str, Any]] = [
    ("llama.rope.scaling.type", "ntk"),
    ("llama.rope.dimension_count", 16),
    ("llama.attention.value_length", 64),
    ("llama.attention.key_length", "32"),
    ("llama.attention.head_count", 0),
    ("llama.attention.head_count", 10),
    ("llama.block_count", 0),
    ("llama.block_count", 1 << 30),
    ("llama.context_length", 0),
    ("llama.attention.layer_norm_rms_epsilon", 0.0),
    ("llama.attention.layer_norm_rms_epsilon", float("nan")),
    ("llama.rope.freq_base", float("inf")),
    ("llama.expert_count", "8"),
    ("llama.embedding_length", "144"),
    ("tokenizer.ggml.eos_token_id", "2"),
    ("general.architecture", "rwkv7"),
]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.mark.parametrize(("key", "value"), BAD_METADATA)
def test_bad_gguf_metadata(tmp_path: Path, llama_folder: Path, key: str, value: Any) -> None:
    file = write_gguf(tmp_path / "m.gguf", llama_folder, extra_metadata={key: value})
    message = problem(file)
    assert message.startswith(f"{file}: {key} "), message


def test_gguf_linear_scaling_and_window(tmp_path: Path, llama_folder: Path) -> None:
    scaling: dict[str, Any] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    spec = load_spec(write_gguf(tmp_path / "a.gguf", llama_folder, extra_metadata=scaling))
    assert (spec.layers[0].mixer.rope.scaling, spec.layers[0].mixer.rope.factor, spec.max_position) == (
        "linear",
        2.0,
        1024,
    )
    window = {"llama.attention.sliding_window": 64}
    assert (
        load_spec(write_gguf(tmp_path / "b.gguf", llama_folder, extra_metadata=window)).layers[0].mixer.window
        == 64
    )
