"""Makes `SamplingParams` of a request body: request -> model's generation_config -> OpenAI's default."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from microvllm.openai_compat.api.requests import GenerationRequest
from microvllm.openai_compat.api.structured import structured_output
from microvllm.openai_compat.errors import clip
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import SamplingParams
from microvllm.runtime.sampling_checks import check_sampling

if TYPE_CHECKING:
    from microvllm.runtime.process.client import EngineClient

MAX_BIAS = 100.0
# What has the same name and form in both; `SamplingParams` has the defaults of OpenAI.
_SHARED = {*GenerationRequest.__struct_fields__} & {*SamplingParams.__struct_fields__}
_TOKEN_ID = re.compile(r"[+-]?\d{1,18}", re.ASCII)


def sampling_params(
    body: GenerationRequest,
    client: EngineClient,
    *,
    max_tokens: int | None,
    max_tokens_field: str,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Return the sampling parameters of a request, checked.

    `max_tokens` is the requested value (None: until the context is full), `max_tokens_field` the field it
    came from. A `max_tokens` in the model's generation config is a limit for every request, as in vLLM.
    `logprobs` and `prompt_logprobs` are counts, which completions and chats have in different fields.
    Raises `InvalidRequestError` naming the field that is out of range.
    """
    _check_spaces(body, client)
    values = client.processor.default_params()
    limit = values.pop("max_tokens", None)
    values |= {name: value for name in _SHARED if (value := getattr(body, name)) is not None}
    values |= {
        "seed": None if body.seed == -1 else body.seed,  # -1 is vLLM's "no seed"
        "max_tokens": _max_tokens(max_tokens, max_tokens_field, client, limit),
        "stop": body.stop_strings,
        "logit_bias": _logit_bias(body.logit_bias),
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "logprob_token_ids": body.logprob_token_ids or None,
        "structured_outputs": structured_output(body),
    }
    if body.use_beam_search:
        values["temperature"] = 1.0  # beams are not drawn, and several of them make sense without chance
    params = SamplingParams(**values)
    check_sampling(params)
    return params


def _max_tokens(requested: int | None, field: str, client: EngineClient, limit: int | None) -> int | None:
    context = client.config.max_model_len
    if requested is None:
        return limit
    if requested < 1:
        raise InvalidRequestError(f"{field} must be at least 1, got {requested}.", field)
    if requested > context:
        raise InvalidRequestError(
            f"{field}={requested} cannot be greater than max_model_len={context}. "
            "Please request fewer output tokens.",
            field,
        )
    return requested if limit is None else min(requested, limit)


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    """Return the biases by token id: JSON has only strings as keys. Values are clamped, as in vLLM."""
    wrong = [key for key in biases if not _TOKEN_ID.fullmatch(key)]
    if wrong:
        keys = clip(", ".join(repr(clip(key)) for key in wrong))
        raise InvalidRequestError(
            f"logit_bias contains key(s) that cannot be converted to integer token IDs: {keys}", "logit_bias"
        )
    return {int(key): min(MAX_BIAS, max(-MAX_BIAS, bias)) for key, bias in biases.items()}


def _check_spaces(body: GenerationRequest, client: EngineClient) -> None:
    """Where text is the concatenation of the tokens' bytes there is never a space between special tokens.

    Other decoders put one there, which cannot be distinguished from a space of the text.
    """
    if not body.spaces_between_special_tokens and client.tokenizer.token_bytes is None:
        raise InvalidRequestError(
            "spaces_between_special_tokens: false is not supported for this model's tokenizer.",
            "spaces_between_special_tokens",
        )
