"""`SamplingParams` as a user of the offline API writes it: mutable, lenient, with all of vLLM's names.

`resolve` gives the engine's own frozen form (`microvllm.runtime.request.SamplingParams`), which checks the
ranges. A field of vLLM that is not implemented here is refused by name, unless its value asks for nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.grammar.forms import form_of
from microvllm.runtime.request import INT64_MAX, RepetitionDetection
from microvllm.runtime.request import SamplingParams as EngineParams
from microvllm.runtime.sampling_checks import check_sampling

MAX_LOGIT_BIAS = 100.0
RANDOM_SEED = -1  # the same as no seed, as in vLLM
# Fields of vLLM that are not implemented, with the values that ask for nothing, beside None.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "extra_args": ({},),
    "prompt_logprob_start": (),
    "prompt_logprob_token_ids": (),
    "routed_experts_prompt_start": (0,),
    "thinking_token_budget": (-1,),
    "trace_decode_token_ids": (),
    "watermarking": (False,),
}
LISTS = ("stop", "stop_token_ids", "bad_words")
SWITCHES = (
    *("detokenize", "flat_logprobs", "skip_clone", "skip_reading_prefix_cache"),
    "spaces_between_special_tokens",
)


class RequestOutputKind(enum.Enum):
    """What `LLMEngine.step` returns of a request: all so far, what is new, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(slots=True)
class StructuredOutputsParams:
    """The form of an output, exactly one kind; names and defaults are those of vLLM 0.33.

    json: a schema as a dictionary or as JSON text; structural_tag: a dictionary or JSON text. Raises
    `InvalidRequestError`.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        form_of(self, "structured_outputs")


@dataclass(slots=True)
class SamplingParams:
    """How to choose tokens and when to stop; names, order and defaults are those of vLLM 0.33.

    Raises `InvalidRequestError` naming the field, here and, for what is set later, when it is used. None is
    the default for every field, but for `max_tokens`, where it means "until the context is full". `stop` may
    be one string, `logit_bias` may have its token ids as strings, and its values are cut to -100..100.
    A `seed` of -1 is none. With `detokenize=False` texts stay empty and stop strings are refused.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    watermarking: bool | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: list[list[int]] | None = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    skip_clone: bool = False
    structured_outputs: Any = None
    logit_bias: Mapping[Any, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = None
    skip_reading_prefix_cache: bool = False
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    routed_experts_prompt_start: int = 0
    trace_decode_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        for name, value in self._values().items():
            setattr(self, name, value)
        self.resolve()

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        """Call the constructor; vLLM's takes None for every field only here."""
        return cls(**fields)

    def clone(self) -> SamplingParams:
        """Return a deep copy."""
        return copy.deepcopy(self)

    def resolve(self) -> EngineParams:
        """Check all fields and return the engine's frozen form of them."""
        values = self._values()
        for name, harmless in UNSUPPORTED.items():
            if values[name] is not None and values[name] not in harmless:
                raise InvalidRequestError(f"{name} is not supported.", name)
        for name in SWITCHES:
            if type(values[name]) is not bool:
                raise InvalidRequestError(f"{name} must be true or false, got {values[name]!r}.", name)
        if not isinstance(values["output_kind"], RequestOutputKind):
            raise InvalidRequestError(
                f"output_kind must be a RequestOutputKind, got {values['output_kind']!r}.", "output_kind"
            )
        interval = values["stream_interval"]
        if interval is not None and not (type(interval) is int and 1 <= interval <= INT64_MAX):
            raise InvalidRequestError(
                f"stream_interval must be an integer at least 1, got {interval!r}.", "stream_interval"
            )
        if values["stop"] and not values["detokenize"]:
            raise InvalidRequestError("stop strings need detokenize=True.", "stop")
        if values["logprob_token_ids"] and values["logprobs"] is None:
            values["logprobs"] = 0  # the ids replace the likeliest ones
        form = values["structured_outputs"]
        values["structured_outputs"] = None if form is None else form_of(form, "structured_outputs")
        # What the server alone sets has no field here.
        params = EngineParams(
            **{name: values[name] for name in EngineParams.__struct_fields__ if name in values}
        )
        check_sampling(params)
        return params

    def _values(self) -> dict[str, Any]:
        """Return the fields by name, each in the one form that the engine takes."""
        values = {name: _plain(getattr(self, name)) for name in DEFAULTS}
        for name, default in DEFAULTS.items():
            if values[name] is None and name != "max_tokens":
                values[name] = default
        for name in LISTS:
            values[name] = [] if values[name] is None else _as_list(values[name])
        for name in ("allowed_token_ids", "logprob_token_ids"):
            values[name] = None if values[name] is None else _as_list(values[name])
        if values["seed"] == RANDOM_SEED:
            values["seed"] = None
        if values["top_k"] == -1:
            values["top_k"] = 0
        for name in ("logprobs", "prompt_logprobs"):
            if values[name] is True:
                values[name] = 1
        values["logit_bias"] = _logit_bias(values["logit_bias"] or {})
        values["repetition_detection"] = _repetition(values["repetition_detection"])
        values["structured_outputs"] = _options(values["structured_outputs"])
        return values


DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in dataclasses.fields(SamplingParams)}


@dataclass(slots=True)
class BeamSearchParams:
    """How `LLM.beam_search` searches; names and defaults are those of vLLM 0.33.

    A beam's score is its log probability divided by (generated tokens, an end token among them) **
    `length_penalty`. `temperature` only matters where log probabilities are those of the processed logits
    (`logprobs_mode`). Raises `InvalidRequestError` naming the field.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: Any = None
    skip_special_tokens: bool = True
    watermarking: bool | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        self.step_params()
        if not (isinstance(self.length_penalty, numbers.Real) and math.isfinite(self.length_penalty)):
            raise InvalidRequestError(
                f"length_penalty must be a finite number, got {self.length_penalty!r}.", "length_penalty"
            )
        for name in ("structured_outputs", "watermarking", "allowed_token_ids"):
            if getattr(self, name):
                raise InvalidRequestError(f"{name} is not supported with beam search.", name)
        SamplingParams(
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
        )

    def step_params(self) -> SamplingParams:
        """Request the likeliest next tokens of a beam, twice as many as there are beams."""
        if type(self.beam_width) is not int or self.beam_width < 1:
            raise InvalidRequestError(
                f"beam_width must be an integer at least 1, got {self.beam_width!r}.", "beam_width"
            )
        return SamplingParams(
            max_tokens=1, temperature=self.temperature, logprobs=2 * self.beam_width, ignore_eos=True
        )


def _plain(value: Any) -> Any:
    """Return a number of numpy's as Python's: sweeps take their values from arrays."""
    if isinstance(value, (bool, int, float)) and type(value) in (bool, int, float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _as_list(value: Any) -> Any:
    """Return plain values, each once. What is no collection stays, for the engine's check to name it."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        return value
    items = [_plain(item) for item in value]
    try:
        return list(dict.fromkeys(items))
    except TypeError:
        return items


def _logit_bias(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    wrong = [key for key in value if not _is_id(key)]
    if wrong:
        raise InvalidRequestError(f"logit_bias has keys that are no token ids: {wrong!r:.200}.", "logit_bias")
    biases = {int(key): _plain(bias) for key, bias in value.items()}
    return {
        token: min(max(bias, -MAX_LOGIT_BIAS), MAX_LOGIT_BIAS) if type(bias) in (int, float) else bias
        for token, bias in biases.items()
    }


def _is_id(key: Any) -> bool:
    if isinstance(key, bool):
        return False
    if isinstance(key, str):
        return key.strip().removeprefix("-").isdecimal()
    return isinstance(key, numbers.Integral)


def _options(value: Any) -> StructuredOutputsParams | None:
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    names = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    if not isinstance(value, Mapping) or not set(value) <= set(names):
        raise InvalidRequestError(
            f"structured_outputs must be StructuredOutputsParams, or a dictionary of {', '.join(names)}.",
            "structured_outputs",
        )
    return StructuredOutputsParams(**value)


def _repetition(value: Any) -> RepetitionDetection | None:
    if isinstance(value, RepetitionDetection):
        return value
    if value is None or value == {}:
        return None
    names = RepetitionDetection.__struct_fields__
    fields = (
        value if isinstance(value, Mapping) else {n: getattr(value, n) for n in names if hasattr(value, n)}
    )
    if not fields or not set(fields) <= set(names):
        raise InvalidRequestError(
            f"repetition_detection must have {', '.join(names)}.", "repetition_detection"
        )
    return RepetitionDetection(**{name: _plain(found) for name, found in fields.items() if found is not None})
