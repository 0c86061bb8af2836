"""Grammars on a GPU: sampling that waits for masks changes no token."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from model_tools import make_engine, variant_folder

from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.request import EngineRequest, SamplingParams, StructuredOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "n", "tags"],
    "additionalProperties": False,
}
PERSON = StructuredOutput(kind="json", spec=json.dumps(SCHEMA), whitespace="")


def texts(**options: Any) -> list[str]:
    """Of twelve greedy requests, of which every third is free, in groups that arrive one after the other."""
    engine = make_engine(variant_folder("llama-tied"), max_num_seqs=16, dtype="float32", **options)
    core, wanted = engine.core, [request_of(engine, i) for i in range(12)]
    outputs: dict[int, list[int]] = {request.request_id: [] for request in wanted}
    waiting = list(wanted)
    while waiting or core.has_work():
        for request in waiting[:3]:
            core.add_samples([request])
        waiting = waiting[3:]
        for _ in range(5):
            for output in core.step():
                assert output.error is None
                outputs[output.request_id] += output.token_ids
    return [engine.tokenizer.decode(tokens) for tokens in outputs.values()]


def request_of(engine: InferenceEngine, i: int) -> EngineRequest:
    form = PERSON if i % 3 else None
    params = SamplingParams(
        max_tokens=40 + i, temperature=0.0, structured_outputs=form, ignore_eos=form is None
    )
    (request,) = engine.processor.requests([5, 6, 7 + i], params)
    return request


@functools.cache
def on_the_cpu() -> list[str]:
    return texts(device="cpu", attention_backend="torch")


@pytest.mark.parametrize(
    "options",
    [{}, {"without": "rules"}, {"async_scheduling": False}, {"enforce_eager": True}],
    ids=["masks-in-graphs", "graphs", "sync", "eager"],
)
def test_constrained_and_free_requests_give_the_tokens_of_the_cpu(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from microvllm.runtime.worker.gpu_rules import GpuRules

    replay, calls = GpuRules.replay_masked, list[Any]()

    def counted(*args: Any) -> None:
        calls.append(args)
        replay(*args)

    monkeypatch.setattr(GpuRules, "replay_masked", counted)
    wanted = dict(options)
    monkeypatch.setenv("MICROVLLM_GPU_OFF", wanted.pop("without", ""))
    made = texts(device="cuda", num_gpu_blocks_override=512, block_size=16, **wanted)
    assert made == on_the_cpu()
    for i, text in enumerate(made):
        if i % 3 and text.endswith("}"):
            assert set(json.loads(text)) == {"name", "n", "tags"}
    assert bool(calls) == options.keys().isdisjoint(("without", "enforce_eager"))
    assert sum(text.endswith("}") for i, text in enumerate(made) if i % 3) > 0
