"""vLLM's `LLMEngine`: requests step by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from llm_case import GREEDY, OPTIONS, PROMPTS, texts
from model_tools import variant_folder

from microvllm import LLM, EngineArgs, LLMEngine, RequestOutputKind, SamplingParams
from microvllm.runtime.errors import InvalidRequestError


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.core.has_work() and llm.engine.core.kv.num_used == 0


def run(engine: LLMEngine) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    return found


def test_the_engine_step_by_step(llm: LLM) -> None:
    engine = llm.llm_engine
    expected = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    kinds = list(RequestOutputKind)
    for kind, prompt in zip(kinds, PROMPTS, strict=True):
        params = GREEDY.clone()
        params.output_kind = kind
        assert engine.add_request(kind.name, prompt, params) == kind.name
    assert engine.get_num_unfinished_requests() == 3 and engine.step() != []
    outputs = run(engine)
    whole = {kind.name: result for kind, result in zip(kinds, expected, strict=True)}
    for name, results in outputs.items():
        assert [result.finished for result in results] == [False] * (len(results) - 1) + [True]
        wanted = whole[name].outputs[0]
        if name == "DELTA":
            ids = [token for result in results for token in result.outputs[0].token_ids]
            assert wanted.token_ids[-len(ids) :] == ids and len(results) > 5
            assert wanted.text.endswith("".join(result.outputs[0].text for result in results))
        else:
            assert results[-1].outputs[0] == wanted
            assert len(results) == (1 if name == "FINAL_ONLY" else len(results))
    lengths = [len(result.outputs[0].token_ids) for result in outputs["CUMULATIVE"]]
    assert lengths == sorted(set(lengths)) and len(lengths) > 5
    assert engine.step() == []


def test_intervals_aborts_and_wrong_requests_of_the_engine(llm: LLM) -> None:
    engine = LLMEngine(llm.engine)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, stream_interval=4)
    engine.add_request("slow", "x", params)
    lengths = [len(result.outputs[0].token_ids) for result in run(engine)["slow"]]
    assert lengths == [1, 5, 9, 10]
    engine.add_request("kept", "x", GREEDY)
    engine.add_request("left", PROMPTS[0], SamplingParams(max_tokens=300, ignore_eos=True))
    with pytest.raises(InvalidRequestError, match="already in use"):
        engine.add_request("kept", "x", GREEDY)
    for wrong in ({"prompt": ""}, {"prompt": "x", "multi_modal_data": {"image": 1}}):
        with pytest.raises(InvalidRequestError):
            engine.add_request("wrong", wrong, GREEDY)
    engine.step()
    engine.abort_request(["left", "unknown"])
    found = run(engine)
    assert list(found) == ["kept"]
    assert texts(found["kept"][-1:]) == texts(llm.generate("x", GREEDY, use_tqdm=False))


def test_several_sequences_of_one_request(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=6, ignore_eos=True)
    (expected,) = llm.generate("x", params, use_tqdm=False)
    engine = llm.llm_engine
    engine.add_request("three", "x", params)
    assert run(engine)["three"][-1].outputs == expected.outputs


def test_from_engine_args(llm: LLM) -> None:
    args = EngineArgs(model=str(variant_folder("llama-tied")), **OPTIONS)
    expected = texts(llm.generate("x", GREEDY, use_tqdm=False))
    assert texts(LLM.from_engine_args(args).generate("x", GREEDY, use_tqdm=False)) == expected
    engine = LLMEngine.from_engine_args(args)
    assert engine.model_config.max_model_len == llm.model_config.max_model_len == 512
    engine.add_request("0", "x", GREEDY)
    assert texts(list(itertools.chain(*run(engine).values()))[-1:]) == expected
