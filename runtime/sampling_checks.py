"""Checks sampling parameters, once, where they enter the engine. Imports no torch."""

from __future__ import annotations

from typing import Any

import msgspec

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import (
    INT64_MAX,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_TOKEN_IDS,
    RepetitionDetection,
    SamplingParams,
)

# A text with a lone surrogate, which JSON can spell, is no UTF-8.
_UNFIT = (msgspec.ValidationError, UnicodeEncodeError)
# What the fields must be that are no single number.
_MUST = {
    "logit_bias": f"must map at most {MAX_LOGIT_BIAS} token ids to numbers in [-100, 100]",
    "allowed_token_ids": "must be a list of at least one token id",
    "bad_words": f"must be at most {MAX_BAD_WORDS} words of 1 to {MAX_BAD_WORD_CHARS} characters",
    "stop": f"must be texts of 1 to {MAX_STOP_STRING_CHARS} characters",
    "stop_token_ids": f"must be a list of at most {MAX_STOP_TOKEN_IDS} token ids",
    "logprob_token_ids": f"must be a list of at most {MAX_LOGPROB_TOKEN_IDS} token ids",
    "repetition_detection": "must be a RepetitionDetection",
    "structured_outputs": "must be a StructuredOutput",
    "thinking": "must be a ThinkingBudget",
}


def check_sampling(params: SamplingParams) -> None:
    """Raises `InvalidRequestError` naming the field for a value of the wrong type or out of range."""
    _check_values(SamplingParams, params)
    detection = params.repetition_detection
    if detection is not None:
        name, size, smallest = "repetition_detection", detection.max_pattern_size, detection.min_pattern_size
        _check_values(RepetitionDetection, detection, f"{name}.")
        if smallest > size:
            raise _fault(f"{name}.min_pattern_size", f"an integer in [0, {size}]", smallest)
        if size and detection.min_count < 2:
            raise _fault(f"{name}.min_count", "an integer at least 2", detection.min_count)
    if params.logprob_token_ids is not None and params.logprobs is None:
        raise InvalidRequestError("logprob_token_ids needs logprobs to be set.", "logprob_token_ids")
    least, most = params.min_tokens, params.max_tokens
    if most is not None and least > most:
        raise _fault("min_tokens", f"less than or equal to max_tokens={most}", least)
    if params.n > 1 and params.greedy:
        raise InvalidRequestError(f"n must be 1 when using greedy sampling, got {params.n}.", "n")


def _check_values(kind: type[msgspec.Struct], values: msgspec.Struct, prefix: str = "") -> None:
    try:  # at C speed: a whole vocabulary may be allowed, and it is checked between two tokens of others
        msgspec.convert(msgspec.structs.asdict(values), kind)
        return
    except _UNFIT:
        pass
    for field in msgspec.structs.fields(kind):
        value = getattr(values, field.name)
        try:
            msgspec.convert(value, field.type)
        except _UNFIT:
            name = prefix + field.name
            if field.name in _MUST:
                raise InvalidRequestError(f"{name} {_MUST[field.name]}.", name) from None
            raise _fault(name, _range_of(field.type), value) from None


def _fault(name: str, expected: str, value: Any) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {expected}, got {value!r:.200}.", name)


def _range_of(declared: Any) -> str:
    """What a number or a boolean must be, in words."""
    kind = msgspec.inspect.type_info(declared)
    if isinstance(kind, msgspec.inspect.UnionType):  # with None
        kind = kind.types[0]
    if isinstance(kind, msgspec.inspect.IntType):
        bounds = f"at least {kind.ge}" if kind.le == INT64_MAX else f"in [{kind.ge}, {kind.le}]"
        return f"an integer {bounds}"
    if isinstance(kind, msgspec.inspect.FloatType):
        low = f"({kind.gt:g}" if kind.gt is not None else f"[{kind.ge:g}"
        return f"in {low}, {kind.le:g}]"
    return "true or false"
