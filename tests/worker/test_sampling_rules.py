"""Sampling rules and log probabilities through the whole engine, on a small real model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from model_tools import drain, make_engine, recorded_logits, relative_error, variant_folder

from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import (
    EngineRequest,
    FinishReason,
    RepetitionDetection,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
)
from microvllm.runtime.sampling_checks import check_sampling

MAX_TOKENS = 24


@functools.cache
def engine_with(**options: Any) -> InferenceEngine:
    return make_engine(variant_folder("llama-tied"), max_num_seqs=8, **options)


def make_prompts(count: int, *, seed: int, length: int = 30) -> list[list[int]]:
    prompts: list[list[int]] = np.random.default_rng(seed).integers(0, 300, (count, length)).tolist()
    return prompts


def run(engine: InferenceEngine, requests: Sequence[EngineRequest]) -> list[list[StepOutput]]:
    """All outputs of each request."""
    found: dict[int, list[StepOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert engine.core.add(request) is None
    for output in drain(engine):
        found[output.request_id].append(output)
    return list(found.values())


def tokens_of(outputs: Sequence[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def requests_for(engine: InferenceEngine) -> list[EngineRequest]:
    """One request of each kind of rule, all of which change the text, and their combination."""
    prompts = make_prompts(8, seed=5)
    plain = run(engine, [ask(engine, prompts[0])])[0]
    said = tokens_of(plain)
    words = [said[2:4], said[9:12], [said[0]], [said[5], 3]]
    rules: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"logit_bias": {said[0]: -100.0, 7: 3.0}},
        {"allowed_token_ids": list(range(40, 60))},
        {"bad_word_ids": words},
        {"temperature": 0.8, "seed": 4, "repetition_penalty": 1.3, "top_p": 0.9, "bad_word_ids": words},
        {"min_tokens": 10, "stop_token_ids": said[:3], "presence_penalty": 0.5},
        {},
    ]
    return [ask(engine, prompts[0], **rule) for rule in rules]


def ask(
    engine: InferenceEngine, prompt: list[int], bad_word_ids: Sequence[list[int]] = (), **options: Any
) -> EngineRequest:
    options = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True, **options}
    params = SamplingParams(**options)
    check_sampling(params)
    request = engine.processor.requests(prompt, params)[0]
    return msgspec.structs.replace(request, bad_word_ids=[*request.bad_word_ids, *bad_word_ids])


@functools.cache
def reference() -> list[list[int]]:
    """Each alone, one after the other."""
    engine = engine_with()
    return [tokens_of(run(engine, [request])[0]) for request in requests_for(engine)]


def test_every_rule_changes_the_text() -> None:
    *ruled, plain = reference()
    assert all(tokens != plain for tokens in ruled)
    assert set(ruled[3]) <= set(range(40, 60))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": True},
        {"max_num_batched_tokens": 9, "async_scheduling": True},
        # Room for the longest request and little more: the others are preempted and start again.
        {"num_gpu_blocks_override": 18, "block_size": 4, "max_model_len": 64},
        {"num_gpu_blocks_override": 18, "block_size": 4, "max_model_len": 64, "async_scheduling": True},
    ],
    ids=["together", "async", "chunked", "preempted", "preempted-async"],
)
def test_rules_are_the_same_in_company(options: dict[str, Any]) -> None:
    engine = engine_with(**options)
    before = engine.core.stats().preemptions
    outputs = run(engine, requests_for(engine))
    assert [tokens_of(each) for each in outputs] == reference()
    if "num_gpu_blocks_override" in options:
        assert engine.core.stats().preemptions > before
        assert max(output.num_preemptions for each in outputs for output in each) > 0


# ---- log probabilities ----------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model() -> None:
    """Of the prompt, in chunks and whole, and of what is sampled: log-softmax of the model's raw logits."""
    prompt = make_prompts(1, seed=9)[0]
    for options in ({}, {"max_num_batched_tokens": 8, "async_scheduling": True}):
        engine = engine_with(**options)
        run(engine, [ask(engine, prompt)])  # its blocks are in the prefix cache now, and must not be used
        request = ask(
            engine,
            prompt,
            prompt_logprobs=3,
            logprobs=2,
            temperature=1.5,
            seed=1,
            presence_penalty=2.0,
            logit_bias={3: 5.0},
        )
        with recorded_logits(engine, every_position=True) as logits:
            (outputs,) = run(engine, [request])
        tokens = [*prompt, *tokens_of(outputs)]
        first = outputs[0].prompt_logprobs
        assert first is not None and outputs[0].num_cached_tokens == 0
        assert all(output.prompt_logprobs is None for output in outputs[1:])
        assert all(output.logprobs is not None and len(output.logprobs) == 1 for output in outputs)
        found = [*first, *(entry for output in outputs for entry in output.logprobs or [])]
        assert len(found) == len(tokens) - 1
        for position, entry in enumerate(found):
            exact = logits[position].log_softmax(-1)
            count = 3 if position < len(prompt) - 1 else 2
            best = exact.topk(count).indices.tolist()
            assert entry.token_ids == [tokens[position + 1], *best]
            assert relative_error(torch.tensor(entry.logprobs), exact[entry.token_ids]) < 1e-4
            assert entry.rank == 1 + int((exact > exact[entry.token_ids[0]]).sum())


def test_prompt_log_probabilities_survive_preemption() -> None:
    prompts = make_prompts(8, seed=5)
    alone, tight = engine_with(), engine_with(num_gpu_blocks_override=18, block_size=4, max_model_len=64)
    before = tight.core.stats().preemptions

    def prompt_logprobs(engine: InferenceEngine, together: bool) -> list[list[TokenLogprobs] | None]:
        requests = [ask(engine, prompt, prompt_logprobs=1) for prompt in prompts]
        batches = [requests] if together else [[request] for request in requests]
        return [outputs[0].prompt_logprobs for batch in batches for outputs in run(engine, batch)]

    expected, found = prompt_logprobs(alone, False), prompt_logprobs(tight, True)
    assert tight.core.stats().preemptions > before
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and theirs is not None
        assert [entry.token_ids for entry in ours] == [entry.token_ids for entry in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, rel=1e-4)


def test_chosen_token_ids_and_the_whole_vocabulary() -> None:
    engine = engine_with(max_logprobs=-1)
    prompt = make_prompts(1, seed=2)[0]
    (some,), (whole,) = (
        run(engine, [ask(engine, prompt, max_tokens=1, **wish)])[0]
        for wish in ({"logprobs": 0, "logprob_token_ids": [5, 9]}, {"logprobs": -1})
    )
    assert some.logprobs is not None and whole.logprobs is not None
    vocab = engine.config.spec.vocab_size
    assert sorted(whole.logprobs[0].token_ids[1:]) == list(range(vocab))
    by_id = dict(zip(whole.logprobs[0].token_ids, whole.logprobs[0].logprobs, strict=True))
    assert some.logprobs[0].token_ids == [some.token_ids[0], 5, 9]
    assert some.logprobs[0].logprobs == [by_id[token] for token in some.logprobs[0].token_ids]


# ---- ends, and what is refused --------------------------------------------------------------------


def test_a_repeated_pattern_ends_the_request() -> None:
    engine = engine_with()
    prompt = make_prompts(1, seed=3)[0]
    forced = {"allowed_token_ids": [50], "max_tokens": 30}
    wish = RepetitionDetection(max_pattern_size=3, min_pattern_size=2, min_count=4)
    for min_tokens, length in ((0, 8), (11, 11)):
        (outputs,) = run(
            engine, [ask(engine, prompt, repetition_detection=wish, min_tokens=min_tokens, **forced)]
        )
        assert tokens_of(outputs) == [50] * length
        assert outputs[-1].finish_reason is FinishReason.REPETITION


def test_no_token_left_fails_only_that_request() -> None:
    engine = engine_with()
    prompts = make_prompts(2, seed=3)
    stuck = ask(engine, prompts[0], [[50]], allowed_token_ids=[50])
    good = ask(engine, prompts[1])
    failed, fine = run(engine, [stuck, good])
    assert failed[-1].finish_reason is FinishReason.ERROR and "allowed_token_ids" in (failed[-1].error or "")
    assert len(tokens_of(fine)) == MAX_TOKENS


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": -2}, "prompt_logprobs"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"logprobs": 1, "logprob_token_ids": [10**6]}, "logprob_token_ids"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_what_cannot_be_asked_names_its_field(wish: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ask(engine_with(), [1, 2, 3], **wish)
    assert caught.value.param == field


def test_a_script_may_have_any_number_of_stop_strings() -> None:
    stop = [f"end {number}" for number in range(9)]
    assert ask(engine_with(), [1, 2, 3], stop=stop).params.stop == stop
