"""Whole models in FP8 on a GPU: packed, against the same values in transformers and against themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import generate_ids, load_script, make_engine, make_prompts, relative_error
from test_gpu_backends import TOLERANCE, VOCAB, ask, rows
from tiny_models import make_hf_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs an NVIDIA GPU of compute capability 8.9",
    ),
]
SIZES: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 512}  # heads of 64, rows in 4.5 blocks
FORMS = ("fp8", "fp8-block", "compressed-fp8-channel")
quantize_checkpoint = load_script("quantize_checkpoint")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("plain"), "qwen2", **SIZES)


def engine(folder: Path, dtype: str, **options: Any) -> Any:
    defaults = {"device": "cuda", "max_num_seqs": 16, "num_gpu_blocks_override": 512, "block_size": 16}
    return make_engine(folder, dtype=dtype, **{**defaults, **options})


def logits(folder: Path, values: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Of transformers in float32 with these matrices, of every token but the first."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded.load_state_dict(values, strict=False)
    with torch.inference_mode():
        found: torch.Tensor = loaded(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_log_probabilities_are_those_of_the_values(
    plain: Path, tmp_path: Path, form: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt of more rows than the kernels of few take, and of 40 steps, which graphs replay."""
    monkeypatch.setenv("MICROVLLM_GPU_OFF", "w8a8")  # which rounds more than the tolerance
    values = quantize_checkpoint.quantize_folder(plain, tmp_path, form, 128)
    made = engine(tmp_path, dtype, max_logprobs=-1)
    prompt = np.random.default_rng(3).integers(0, VOCAB, 200).tolist()
    tokens, of_prompt, of_output = ask(made, prompt, max_tokens=40, prompt_logprobs=-1)
    found = torch.cat((rows(of_prompt), rows(of_output)))
    assert relative_error(found, logits(plain, values, tokens)) < TOLERANCE[dtype]
    assert made.core.stats().graph_replays >= 39


@pytest.mark.parametrize("form", [*FORMS, "fp8-static"])
def test_prompts_of_rounded_activations_are_near(plain: Path, tmp_path: Path, form: str) -> None:
    """As near as the rounding of the weights itself is to the plain model, or so."""
    values = quantize_checkpoint.quantize_folder(plain, tmp_path, form, 128)
    made = engine(tmp_path, "bfloat16", max_logprobs=-1)
    prompt = np.random.default_rng(3).integers(0, VOCAB, 300).tolist()
    tokens, of_prompt, of_output = ask(made, prompt, max_tokens=2, prompt_logprobs=-1)
    found = torch.cat((rows(of_prompt), rows(of_output)))
    error = relative_error(found, logits(plain, values, tokens))
    print(f"{form}: {error:.4f}")
    assert error < 0.1


@pytest.mark.parametrize("requested", ["fp8", "fp8_per_channel", "fp8_per_block"])
def test_tokens_of_weights_that_loading_quantises(
    plain: Path, tmp_path: Path, requested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 they are those of the CPU, whatever runs together, with graphs and without."""
    prompts = make_prompts(8, VOCAB, seed=1, longest=150)
    expected = generate_ids(
        make_engine(plain, device="cpu", dtype="float32", quantization=requested), prompts, 30
    )
    packed = engine(plain, "float32", quantization=requested)
    eager = engine(plain, "float32", quantization=requested, enforce_eager=True)
    assert generate_ids(packed, prompts, 30) == generate_ids(eager, prompts, 30) == expected
    monkeypatch.setenv("MICROVLLM_GPU_OFF", "packed")
    assert generate_ids(engine(plain, "float32", quantization=requested), prompts, 30) == expected


def test_packed_weights_take_half_the_memory(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all matrices but embeddings and head, with no more than one plain matrix beside them at a time."""

    def loaded() -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        made = engine(plain, "bfloat16", load_format="dummy", quantization="fp8", enforce_eager=True)
        taken = torch.cuda.memory_allocated() - before
        del made
        return taken

    loaded()  # what libraries allocate once
    first = loaded()
    monkeypatch.setenv("MICROVLLM_GPU_OFF", "packed")
    codes = 2 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 512)  # a byte each, of two layers
    assert loaded() - first > 0.9 * codes
