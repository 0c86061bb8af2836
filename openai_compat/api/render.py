"""POST /v1/chat/completions/render and /v1/completions/render: what a request becomes before it runs.

Answers with the token ids and the sampling parameters, as vLLM's `GenerateRequest` has them, and generates
nothing. Routers that send a conversation where its prefix is cached ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.chat import CHAT_BODY, chat_params, render
from microvllm.openai_compat.api.completions import COMPLETION_BODY, completion_params, read_prompts
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.generation import begin, priority_of
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import SamplingParams


async def render_chat_completion(request: Request, state: ServerState, fields: Mapping[str, Any]) -> Response:
    """The token ids of a conversation and how they would be continued. Nothing is generated."""
    _check(fields)
    request_id = begin(request, fields, state, "chatcmpl").id
    params, priority = chat_params(fields, state), priority_of(request, fields)
    conversation = await state.client.run_rendering(render, state, fields)
    found = await state.client.run_blocking(
        _generate_request, state, fields, params, request_id, conversation.token_ids, priority
    )
    return Response(orjson.dumps(found), media_type="application/json")


async def render_completion(request: Request, state: ServerState, fields: Mapping[str, Any]) -> Response:
    """The token ids of each prompt and how they would be continued. Nothing is generated."""
    _check(fields)
    request_id = begin(request, fields, state, "cmpl").id
    params, priority = completion_params(fields, state, prompt_only=False), priority_of(request, fields)
    prompts, _ = await read_prompts(fields, state, params.n)
    found = [
        await state.client.run_blocking(
            _generate_request,
            state,
            fields,
            params,
            request_id if len(prompts) == 1 else f"{request_id}-{index}",
            ids,
            priority,
        )
        for index, ids in enumerate(prompts)
    ]
    return Response(orjson.dumps(found), media_type="application/json")


def _check(fields: Mapping[str, Any]) -> None:
    if fields["use_beam_search"]:
        raise InvalidRequestError("Beam search is not supported by the render endpoints.", "use_beam_search")


def _generate_request(
    state: ServerState,
    fields: Mapping[str, Any],
    params: SamplingParams,
    request_id: str,
    token_ids: list[int],
    priority: int,
) -> dict[str, Any]:
    """The members of vLLM's `GenerateRequest`, null where this server has nothing to say."""
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
        "model": fields["model"],
        "reasoning_ended": None,
        "reasoning_parser_kwargs": None,
        "return_token_ids": fields["return_token_ids"],
        "output_mode": "tokens",
        "parse_context": None,
        "stream": fields["stream"],
        "stream_options": fields["stream_options"] if fields["stream"] else None,
        "cache_salt": fields["cache_salt"] or None,
        "priority": priority,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
    }


ENDPOINTS = (
    Endpoint(
        path="/v1/chat/completions/render",
        methods=("POST",),
        handler=render_chat_completion,
        body=CHAT_BODY,
        answer="GenerateRequest",
    ),
    Endpoint(
        path="/v1/completions/render",
        methods=("POST",),
        handler=render_completion,
        body=COMPLETION_BODY,
        answer="GenerateRequests",
    ),
)
