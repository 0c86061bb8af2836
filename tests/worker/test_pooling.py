"""Vectors of texts: those of transformers, whatever is computed beside them and in whatever pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from model_tools import drain, make_engine, make_prompts
from tiny_models import QUANTIZABLE, TOKENIZER_SIZE, make_hf_folder, reference, write_gguf, write_tokenizer

from microvllm.adapters.pooling_spec import Pooling
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.request import FinishReason, StepOutput
from microvllm.runtime.vectors import POOLING_PARAMS

METHODS = {
    "LAST": lambda states: states[-1],
    "MEAN": lambda states: states.mean(0),
    "CLS": lambda states: states[0],
}
PROMPTS = make_prompts(9, TOKENIZER_SIZE, longest=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


def hidden_states(folder: Path, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Of each prompt those behind the last norm, by transformers: [tokens, hidden] float32."""
    model = reference(folder)
    with torch.no_grad():
        return [model.model(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts]


@pytest.fixture(scope="module")
def states(folder: Path) -> list[torch.Tensor]:
    return hidden_states(folder, PROMPTS)


def pooling_engine(folder: Path, method: str, **options: Any) -> InferenceEngine:
    config = {"pooling_type": method, "use_activation": False}
    return make_engine(folder, runner="pooling", pooler_config=config, **options)


def add(engine: InferenceEngine, prompts: Sequence[list[int]]) -> list[int]:
    """Queue the prompts; returns their ids."""
    ids = []
    for prompt in prompts:
        (request,) = engine.processor.requests(prompt, POOLING_PARAMS)
        assert engine.core.add(request) is None
        ids.append(request.request_id)
    return ids


def pool(engine: InferenceEngine, prompts: Sequence[list[int]]) -> list[StepOutput]:
    """The one output of each prompt, all computed together; every block comes back."""
    ids, found = add(engine, prompts), dict[int, StepOutput]()
    for output in drain(engine):
        assert output.request_id not in found and output.finish_reason is FinishReason.STOP
        assert output.token_ids == [] and output.scheduled_at is not None
        found[output.request_id] = output
    return [found[i] for i in ids]


def check(
    outputs: Sequence[StepOutput], states: Sequence[torch.Tensor], method: str, tolerance: float = 1e-5
) -> None:
    for output, expected in zip(outputs, states, strict=True):
        assert output.pooled is not None
        ours, theirs = np.frombuffer(output.pooled, np.float32), METHODS[method](expected).numpy()
        assert np.abs(ours - theirs).max() <= tolerance * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_vectors_are_those_of_transformers(
    folder: Path, states: list[torch.Tensor], method: str, backend: str
) -> None:
    engine = pooling_engine(folder, method, attention_backend=backend)
    check(pool(engine, PROMPTS), states, method)
    for prompt, expected in zip(PROMPTS[::3], states[::3], strict=True):
        check(pool(engine, [prompt]), [expected], method)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_text_in_chunks(folder: Path, states: list[torch.Tensor], method: str, asynchronous: bool) -> None:
    """Also one that fills the context: no room is needed for a token."""
    options: dict[str, Any] = {"max_num_batched_tokens": 13, "max_num_seqs": 4, "max_model_len": 60}
    engine = pooling_engine(folder, method, async_scheduling=asynchronous, **options)
    check(pool(engine, PROMPTS), states, method)
    check(pool(engine, PROMPTS), states, method)  # what the rows kept of the others is no part of them


@pytest.mark.parametrize("method", METHODS)
def test_after_a_preemption(folder: Path, states: list[torch.Tensor], method: str) -> None:
    options = {"max_num_batched_tokens": 32, "long_prefill_token_threshold": 8, "max_model_len": 64}
    engine = pooling_engine(folder, method, num_gpu_blocks_override=6, block_size=16, **options)
    outputs = pool(engine, PROMPTS[::-1])
    check(outputs, states[::-1], method)
    assert any(output.num_preemptions for output in outputs)


@pytest.mark.parametrize("method", METHODS)
def test_a_cached_prefix(folder: Path, states: list[torch.Tensor], method: str) -> None:
    """The last token's state may follow one; the others need what was not computed, and compute it."""
    engine = pooling_engine(folder, method)
    first, again = pool(engine, PROMPTS), pool(engine, PROMPTS)
    check(first, states, method)
    check(again, states, method)
    cached = [output.num_cached_tokens for output in again]
    expected = [(len(prompt) - 1) // 16 * 16 if method == "LAST" else 0 for prompt in PROMPTS]
    assert cached == expected and (any(cached) == (method == "LAST"))


def test_one_that_is_aborted_leaves_the_others_alone(folder: Path, states: list[torch.Tensor]) -> None:
    engine = pooling_engine(folder, "MEAN", max_num_batched_tokens=40, long_prefill_token_threshold=8)
    ids = add(engine, PROMPTS)
    outputs = {output.request_id: output for output in engine.core.step()}
    gone = [id_ for id_ in ids if id_ not in outputs][::2]
    assert gone and all(engine.core.abort(id_) for id_ in gone)
    outputs |= {output.request_id: output for output in drain(engine)}
    left = [i for i, id_ in enumerate(ids) if id_ not in gone]
    assert sorted(outputs) == [ids[i] for i in left]
    check([outputs[ids[i]] for i in left], [states[i] for i in left], "MEAN")


@pytest.mark.parametrize("method", METHODS)
def test_a_vector_that_is_not_finite_ends_its_request_alone(
    folder: Path, states: list[torch.Tensor], method: str
) -> None:
    engine = pooling_engine(folder, method)
    model = engine.core._runner.model  # type: ignore[attr-defined]
    head = model.head

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        normed = head(hidden)
        normed[-1] = float("nan")  # of the longest text, which comes last
        if method == "CLS":
            normed[-len(PROMPTS[-1])] = float("inf")
        return normed

    model.head = broken
    ids = add(engine, PROMPTS)
    outputs = {output.request_id: output for output in drain(engine)}
    failed = outputs.pop(ids[-1])
    assert failed.pooled is None and failed.finish_reason is FinishReason.ERROR and failed.error
    check([outputs[id_] for id_ in ids[:-1]], states[:-1], method)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_model_whose_stored_head_is_not_loaded(family: str, tmp_path: Path) -> None:
    """Untied, as a folder and as a GGUF file with quantised matrices."""
    source = make_hf_folder(tmp_path / "model", family, **QUANTIZABLE)
    states = hidden_states(source, PROMPTS)
    engine = pooling_engine(source, "MEAN")
    check(pool(engine, PROMPTS), states, "MEAN")
    assert engine.config.spec.pooling is not None and engine.config.spec.tie_embeddings
    exact = write_gguf(tmp_path / "exact.gguf", source)
    check(pool(pooling_engine(exact, "LAST"), PROMPTS), states, "LAST")
    rounded = write_gguf(tmp_path / "rounded.gguf", source, quantization="Q8_0")
    check(pool(pooling_engine(rounded, "LAST"), PROMPTS), states, "LAST", tolerance=0.1)


def test_a_model_that_was_saved_without_a_head(
    folder: Path, states: list[torch.Tensor], tmp_path: Path
) -> None:
    """As Qwen3-Embedding is: other tensor names, another class. No option says what it is for."""
    bare = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    bare.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    engine = make_engine(tmp_path)
    assert engine.config.spec.pooling == Pooling(method="last")
    check(pool(engine, PROMPTS), states, "LAST")


@pytest.mark.parametrize(("number", "method"), [(1, "MEAN"), (2, "CLS"), (3, "LAST")])
def test_a_gguf_file_says_how_it_is_pooled(
    folder: Path, states: list[torch.Tensor], tmp_path: Path, number: int, method: str
) -> None:
    file = write_gguf(tmp_path / "m.gguf", folder, extra_metadata={"qwen3.pooling_type": number})
    check(pool(make_engine(file), PROMPTS), states, method)
    assert make_engine(file, runner="generate").config.spec.pooling is None


def test_a_pooling_of_gguf_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", folder, extra_metadata={"qwen3.pooling_type": 4})
    with pytest.raises(ConfigError, match=r"qwen3\.pooling_type 4 is not supported"):
        make_engine(file)
