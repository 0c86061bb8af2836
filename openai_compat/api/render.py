"""Serves the render endpoints: what a chat or a completion becomes before it runs.

Answers with the token ids and the sampling parameters, as vLLM's `GenerateRequest` has them, and generates
nothing. Routers that send a conversation where its prefix is cached ask for it.
"""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.chat_completions import ChatCompletion
from microvllm.openai_compat.api.completions import Completion
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.generation import Generation
from microvllm.openai_compat.api.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError


async def render_chat_completion(
    request: Request, state: ServerState, body: ChatCompletionRequest
) -> Response:
    """The token ids of a conversation and how they would be continued. Nothing is generated."""
    _check(body)
    chat = ChatCompletion(request, state, body)
    (prompt,) = await chat.prepare()
    found = await state.client.run_blocking(_generate_request, chat, chat.id, prompt)
    return Response(orjson.dumps(found), media_type="application/json")


async def render_completion(request: Request, state: ServerState, body: CompletionRequest) -> Response:
    """The token ids of each prompt and how they would be continued. Nothing is generated."""
    _check(body)
    completion = RenderedCompletion(request, state, body)
    prompts = await completion.prepare()
    ids = [completion.id] if len(prompts) == 1 else [f"{completion.id}-{i}" for i in range(len(prompts))]
    found = [
        await state.client.run_blocking(_generate_request, completion, request_id, prompt)
        for request_id, prompt in zip(ids, prompts, strict=True)
    ]
    return Response(orjson.dumps(found), media_type="application/json")


class RenderedCompletion(Completion):
    """Needs at least one token, since a `GenerateRequest` cannot express "no more than the prompt"."""

    scores_prompt_only = False


def _check(body: GenerationRequest) -> None:
    if body.use_beam_search:
        raise InvalidRequestError("Beam search is not supported by the render endpoints.", "use_beam_search")


def _generate_request(generation: Generation[Any], request_id: str, token_ids: list[int]) -> dict[str, Any]:
    """Return the members of vLLM's `GenerateRequest`, null where this server has no such thing."""
    state, body, params = generation.state, generation.body, generation.params
    # The processor checks the ids against the model and clamps max_tokens to the context.
    prepared = state.client.processor.requests(token_ids, params)[0].params
    sampling = {**msgspec.structs.asdict(params), "max_tokens": prepared.max_tokens}
    return {
        "request_id": request_id,
        "token_ids": token_ids,
        "token_offsets": None,
        "features": None,
        "content_parts": None,
        "sampling_params": {
            name: {str(key): bias for key, bias in value.items()}
            if name == "logit_bias"
            else msgspec.to_builtins(value)
            for name, value in sampling.items()
        },
        "model": body.model,
        "reasoning_ended": None,
        "reasoning_parser_kwargs": None,
        "return_token_ids": body.return_token_ids,
        "output_mode": "tokens",
        "parse_context": None,
        "stream": body.stream,
        "stream_options": msgspec.to_builtins(body.stream_options) if body.stream else None,
        "cache_salt": body.cache_salt or None,
        "priority": generation.priority,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
    }


ENDPOINTS = (
    Endpoint(
        path="/v1/chat/completions/render",
        methods=("POST",),
        handler=render_chat_completion,
        body=ChatCompletionRequest,
        answer="GenerateRequest",
    ),
    Endpoint(
        path="/v1/completions/render",
        methods=("POST",),
        handler=render_completion,
        body=CompletionRequest,
        answer="GenerateRequests",
    ),
)
