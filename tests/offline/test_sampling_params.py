"""`SamplingParams` and `BeamSearchParams` as users of vLLM write them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from microvllm import BeamSearchParams, RequestOutputKind, SamplingParams
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.offline.sampling_params import UNSUPPORTED
from microvllm.runtime.request import RepetitionDetection

# Every field of vLLM 0.33's SamplingParams, in its order, with values that ask for nothing. The fields that
# its constructor keeps for itself (output_text_buffer_length and names with an underscore) are left out.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "presence_penalty": (None, 0.0, 0),
    "frequency_penalty": (None, 0.0, 0),
    "repetition_penalty": (None, 1.0, 1),
    "temperature": (None, 1.0, 1),
    "watermarking": (None, False),
    "top_p": (None, 1.0, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0.0, 0),
    "seed": (None, -1),
    "stop": (None, [], ()),
    "stop_token_ids": (None, [], ()),
    "ignore_eos": (None, False),
    "max_tokens": (None, 16),
    "min_tokens": (None, 0),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "prompt_logprob_token_ids": (None,),
    "prompt_logprob_start": (None,),
    "logprob_token_ids": (None,),
    "flat_logprobs": (None, False),
    "detokenize": (None, True),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "output_kind": (None, RequestOutputKind.CUMULATIVE),
    "stream_interval": (None, 1),
    "skip_clone": (None, False, True),
    "structured_outputs": (None,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "extra_args": (None, {}),
    "bad_words": (None, [], ()),
    "skip_reading_prefix_cache": (None, False),
    "thinking_token_budget": (None, -1),
    "repetition_detection": (None, {}),
    "routed_experts_prompt_start": (None, 0),
    "trace_decode_token_ids": (None,),
}
CASES = [(name, value) for name, values in NEUTRAL.items() for value in values]


def test_the_fields_are_vllms_in_its_order() -> None:
    assert list(SamplingParams.__dataclass_fields__) == list(NEUTRAL)
    assert SamplingParams(2, 0.5, -0.5, 1.2, 0.7).resolve().repetition_penalty == 1.2


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
def test_a_value_that_asks_for_nothing_changes_nothing(name: str, value: Any) -> None:
    for params in (SamplingParams(**{name: value}), SamplingParams.from_optional(**{name: value})):
        if name == "max_tokens" and value is None:
            assert params.resolve().max_tokens is None  # until the context is full
        else:
            assert params.resolve() == SamplingParams().resolve()
    later = SamplingParams()
    setattr(later, name, value)
    assert later.resolve() == SamplingParams(**{name: value}).resolve()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("extra_args", {"a": 1}),
        ("prompt_logprob_start", 0),
        ("prompt_logprob_token_ids", [[1]]),
        ("routed_experts_prompt_start", 3),
        ("thinking_token_budget", 10),
        ("trace_decode_token_ids", [1]),
        ("watermarking", True),
    ],
)
def test_what_is_missing_is_refused_by_name(name: str, value: Any) -> None:
    assert name in UNSUPPORTED
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_every_missing_field_is_tried() -> None:
    assert len(UNSUPPORTED) == 7


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop": ["a"], "detokenize": False}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": {True: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"logit_bias": {1: "much"}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"detokenize": 1}, "detokenize"),
        ({"flat_logprobs": "no"}, "flat_logprobs"),
        ({"output_kind": "delta"}, "output_kind"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"repetition_detection": {"size": 3}}, "repetition_detection"),
        ({"repetition_detection": "x"}, "repetition_detection"),
        ({"repetition_detection": [4]}, "repetition_detection"),
        ({"stop": 5}, "stop"),
        ({"repetition_detection": {"max_pattern_size": 3, "min_count": 1}}, "repetition_detection.min_count"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": float("inf")}, "temperature"),
        ({"n": 2, "temperature": 0}, "n"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_at_once_and_when_it_is_set_later(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**fields)
    assert caught.value.param == param
    params = SamplingParams()
    for name, value in fields.items():
        setattr(params, name, value)
    with pytest.raises(InvalidRequestError) as caught:
        params.resolve()
    assert caught.value.param == param


def test_forms_that_mean_the_same() -> None:
    def same(one: dict[str, Any], other: dict[str, Any]) -> None:
        assert SamplingParams(**one).resolve() == SamplingParams(**other).resolve()

    same({"stop": "end"}, {"stop": ["end"]})
    same({"stop": ("a", "b")}, {"stop": ["a", "b"]})
    same({"stop_token_ids": {5}}, {"stop_token_ids": [5, 5]})
    same({"stop_token_ids": np.array([5, 6])}, {"stop_token_ids": [5, 6]})
    same({"logit_bias": {"5": 1, "-1": 2}}, {"logit_bias": {5: 1.0, -1: 2.0}})
    same({"logit_bias": {5: 1000, 6: -1e9}}, {"logit_bias": {5: 100.0, 6: -100.0}})
    same({"logprobs": True, "prompt_logprobs": True}, {"logprobs": 1, "prompt_logprobs": 1})
    same({"logprob_token_ids": [1, 2]}, {"logprob_token_ids": [1, 2], "logprobs": 0})
    same({"temperature": np.float32(0.5), "top_k": np.int64(3)}, {"temperature": 0.5, "top_k": 3})
    same({"temperature": np.linspace(0, 1, 3)[1]}, {"temperature": 0.5})
    same({"seed": -1}, {})
    detection = RepetitionDetection(max_pattern_size=3, min_pattern_size=1, min_count=2)
    written = {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 2}
    same({"repetition_detection": written}, {"repetition_detection": detection})


def test_it_is_mutable_and_a_clone_is_apart() -> None:
    params = SamplingParams(stop=["a"], logit_bias={"5": 1.0}, seed=-1)
    assert (params.stop, params.logit_bias, params.seed) == (["a"], {5: 1.0}, None)
    other = params.clone()
    assert other == params and other is not params
    other.stop.append("b")  # type: ignore[union-attr]
    other.max_tokens = 3
    assert params.stop == ["a"] and params.max_tokens == 16
    assert other.resolve().stop == ["a", "b"] and other.resolve().max_tokens == 3
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(AttributeError):
        params.max_token = 5  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 1.5}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"length_penalty": "long"}, "length_penalty"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ],
    ids=str,
)
def test_a_wrong_field_of_beam_search_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **fields})
    assert caught.value.param == param
