"""From request fields to `SamplingParams`: request -> model's generation_config -> OpenAI's default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import SamplingParams

if TYPE_CHECKING:
    from microvllm.runtime.client import EngineClient

OPENAI_DEFAULTS: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def sampling_params(
    fields: Mapping[str, Any], client: EngineClient, *, max_tokens: int | None, max_tokens_field: str
) -> SamplingParams:
    """The sampling parameters of a request.

    `max_tokens` is the request's wish (None: until the context is full), `max_tokens_field` the field it
    came from. A `max_tokens` in the model's generation config is a limit for every request, as in vLLM.
    Raises `InvalidRequestError` naming the field that is out of range.
    """
    defaults = {**OPENAI_DEFAULTS, **client.processor.default_params()}
    chosen = {
        name: defaults[name] if fields[name] is None else fields[name]
        for name in ("temperature", "top_p", "top_k", "min_p")
    }
    context = client.config.max_model_len
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequestError(
            f"{max_tokens_field} must be at least 1, got {max_tokens}.", max_tokens_field
        )
    if max_tokens is not None and max_tokens > context:
        raise InvalidRequestError(
            f"{max_tokens_field}={max_tokens} cannot be greater than max_model_len={context}. "
            "Please request fewer output tokens.",
            max_tokens_field,
        )
    limit = defaults.get("max_tokens")
    if limit is not None:
        max_tokens = limit if max_tokens is None else min(max_tokens, limit)
    vocab_size = client.config.spec.vocab_size
    for token in fields["stop_token_ids"]:
        if token >= vocab_size:
            raise InvalidRequestError(
                f"stop_token_ids: token id {token} is out of vocabulary (size {vocab_size}).",
                "stop_token_ids",
            )
    return SamplingParams(
        n=fields["n"],
        seed=None if fields["seed"] == -1 else fields["seed"],  # -1 is vLLM's "no seed"
        max_tokens=max_tokens,
        min_tokens=fields["min_tokens"],
        stop=fields["stop"],
        stop_token_ids=fields["stop_token_ids"],
        ignore_eos=fields["ignore_eos"],
        include_stop_str_in_output=fields["include_stop_str_in_output"],
        skip_special_tokens=fields["skip_special_tokens"],
        **chosen,
    )
