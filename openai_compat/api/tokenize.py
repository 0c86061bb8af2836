"""Serves POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.conversation import render
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.generation import check_model
from microvllm.openai_compat.api.reading import read_value
from microvllm.openai_compat.api.requests import DetokenizeRequest, TokenizeRequest
from microvllm.openai_compat.errors import Fault, shape_error
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import ContextLengthError, InvalidRequestError
from microvllm.runtime.request import TokenId

if TYPE_CHECKING:
    from microvllm.runtime.process.client import EngineClient


async def tokenize(request: Request, state: ServerState, body: TokenizeRequest) -> Response:
    """`{"count", "max_model_len", "tokens", "token_strs"}` of a prompt or of a conversation."""
    if not state.args.skip_model_name_validation:
        check_model(body.model, state)
    if (body.prompt is None) == (body.messages is None):
        raise shape_error([("body.prompt", Fault("Give either prompt or messages"))])
    if body.tools is not None:
        _check_tools(state, body)
    run = state.client.run_blocking if body.messages is None else state.client.run_rendering
    return Response(await run(_tokenize, state, body), media_type="application/json")


def _check_tools(state: ServerState, body: TokenizeRequest) -> None:
    """Refuse tools that no prompt would have: a chat with them has no answer either."""
    if body.messages is None:
        raise InvalidRequestError("tools need messages: a prompt is tokenized as it is.", "tools")
    if state.formats.calls is None and "tools" not in state.client.processor.template_source:
        raise InvalidRequestError("tools: the chat template does not show tools to the model.", "tools")


def _tokenize(state: ServerState, body: TokenizeRequest) -> bytes:
    """Runs in a worker thread."""
    client = state.client
    if body.prompt is None:
        ids = render(state, body).token_ids
    else:
        ids = client.processor.tokenize_prompt(body.prompt, body.add_special_tokens is not False)
    return orjson.dumps(
        {
            "count": len(ids),
            "max_model_len": client.config.max_model_len,
            "tokens": ids,
            "token_strs": [client.tokenizer.id_to_token(i) for i in ids] if body.return_token_strs else None,
        }
    )


async def detokenize(request: Request, state: ServerState, body: DetokenizeRequest) -> Response:
    """`{"prompt"}`: the text of token ids, special tokens included; at most a context's worth of them."""
    if not state.args.skip_model_name_validation:
        check_model(body.model, state)
    client, tokens = state.client, body.tokens
    if len(tokens) > client.config.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {client.config.max_model_len} tokens, "
            f"but {len(tokens)} were given.",
            "tokens",
        )
    return Response(await client.run_blocking(_detokenize, client, tokens), media_type="application/json")


def _detokenize(client: EngineClient, tokens: list[Any]) -> bytes:
    """Runs in a worker thread."""
    try:
        ids = read_value(list[TokenId], tokens)
    except Fault as fault:
        raise shape_error([("body.tokens", fault)]) from None
    vocab_size = max(client.config.spec.vocab_size, client.tokenizer.vocab_size)
    highest = max(ids, default=0)
    if highest >= vocab_size:
        raise InvalidRequestError(f"Token id {highest} is out of vocabulary", "tokens")
    return orjson.dumps({"prompt": client.tokenizer.decode(ids, False)})


ENDPOINTS = (
    Endpoint(
        path="/tokenize",
        methods=("POST",),
        handler=tokenize,
        body=TokenizeRequest,
        answer="TokenizeResponse",
    ),
    Endpoint(
        path="/detokenize",
        methods=("POST",),
        handler=detokenize,
        body=DetokenizeRequest,
        answer="DetokenizeResponse",
    ),
)
