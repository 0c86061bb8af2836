"""The engine on each attention backend of a GPU, against transformers and against itself."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import drain, generate_ids, make_engine, make_prompts, relative_error
from tiny_models import TOKENIZER_SIZE, make_hf_folder

from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.request import SamplingParams, TokenLogprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
# Heads of 64 and 128, which every build of flash-attn has.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "head_dim": 64},
    "qwen2": {"family": "qwen2", "hidden_size": 576, "tie": True},
    "qwen3": {"family": "qwen3", "head_dim": 128},
}
BACKENDS: dict[str, dict[str, Any]] = {
    "triton": {"block_size": 16, "num_gpu_blocks_override": 512},
    "flash_attn": {"block_size": 256, "num_gpu_blocks_override": 64},
}
# Of the largest log probability, in any entry: the reference is in float32, and so are its weights.
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 5e-3}
VOCAB = TOKENIZER_SIZE


@functools.cache
def _models() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="microvllm-backends-")  # deleted at exit


@functools.cache
def folder(model: str) -> Path:
    options = dict(MODELS[model])
    return make_hf_folder(Path(_models().name) / model, options.pop("family"), **options)


def engine(model: str, backend: str, dtype: str, **options: Any) -> InferenceEngine:
    if backend == "flash_attn":
        if importlib.util.find_spec("flash_attn") is None:
            pytest.skip("needs the package flash-attn")
        if dtype == "float32":
            pytest.skip("flash-attn has no float32")
    defaults = {"device": "cuda", "attention_backend": backend, "dtype": dtype, "max_num_seqs": 16}
    return make_engine(folder(model), **{**defaults, **BACKENDS[backend], **options})


def rows(entries: list[TokenLogprobs]) -> torch.Tensor:
    """[n, VOCAB] log probabilities."""
    made = torch.full((len(entries), VOCAB), torch.nan)
    for row, entry in zip(made, entries, strict=True):
        row[entry.token_ids] = torch.tensor(entry.logprobs)
    return made


@functools.cache
def reference(model: str, tokens: tuple[int, ...]) -> torch.Tensor:
    """What transformers says in float32 of every token but the first: [n - 1, vocab]."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder(model), dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = loaded(torch.tensor([tokens])).logits[0, :-1]
    found: torch.Tensor = logits.log_softmax(-1)
    return found


def ask(
    made: InferenceEngine, prompt: list[int], **wish: Any
) -> tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]:
    """All tokens, and all log probabilities: of the prompt if they are asked for, and of the output."""
    params = SamplingParams(temperature=0.0, logprobs=-1, ignore_eos=True, **wish)
    assert made.core.add(made.processor.requests(prompt, params)[0]) is None
    tokens, of_prompt, of_output = list(prompt), [], []
    for output in drain(made):
        tokens += output.token_ids
        of_prompt += output.prompt_logprobs or []
        of_output += output.logprobs or []
    assert len(tokens) == len(prompt) + len(of_output)
    return tokens, of_prompt, of_output


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 64}], ids=["whole", "chunked"])
def test_a_prompt_and_100_decode_steps_are_near_transformers(
    model: str, backend: str, dtype: str, options: dict[str, Any]
) -> None:
    """The tokens are the engine's own, so that every step is compared whatever a close call decided."""
    made = engine(model, backend, dtype, max_logprobs=-1, **options)
    prompt = np.random.default_rng(3).integers(0, VOCAB, 300).tolist()
    tokens, of_prompt, of_output = ask(made, prompt, max_tokens=100, prompt_logprobs=-1)
    found = torch.cat((rows(of_prompt), rows(of_output)))
    assert relative_error(found, reference(model, tuple(tokens))) < TOLERANCE[dtype]
    assert made.core.stats().graph_replays >= 99
    # Its beginning is in the prefix cache now.
    tokens, _, of_output = ask(made, tokens[:350], max_tokens=20)
    assert made.core.stats().prefix_hits >= 256
    assert relative_error(rows(of_output), reference(model, tuple(tokens))[-20:]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("model", list(MODELS))
def test_graphs_and_async_scheduling_change_no_token(model: str, backend: str, dtype: str) -> None:
    """At the same batch shape: 8 requests of one length, which is a captured size."""
    prompts = [prompt[:20] + [7] * (20 - len(prompt[:20])) for prompt in make_prompts(8, VOCAB, seed=1)]
    tokens = [
        generate_ids(engine(model, backend, dtype, **options), prompts, 60)
        for options in ({}, {"enforce_eager": True}, {"async_scheduling": False})
    ]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_pool_too_small_for_all_stays_whole(backend: str) -> None:
    """Requests that cross blocks, long ones first, are preempted: all end, with all tokens."""
    blocks = {"triton": 40, "flash_attn": 8}[backend]
    made = engine("qwen3", backend, "bfloat16", num_gpu_blocks_override=blocks, max_num_batched_tokens=64)
    prompts = make_prompts(12, VOCAB, seed=5, longest=250)[::-1]
    tokens = generate_ids(made, prompts, 60)
    assert [len(each) for each in tokens] == [60] * 12
    assert made.core.stats().preemptions > 0


def test_a_backend_of_a_wrong_block_size_is_refused() -> None:
    from microvllm.runtime.errors import ConfigError

    with pytest.raises(ConfigError, match="256"):
        engine("llama", "flash_attn", "bfloat16", block_size=64)
