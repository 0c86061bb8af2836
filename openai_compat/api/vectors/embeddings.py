"""Serves POST /v1/embeddings: a vector for each text."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.conversation import render
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.prompts import Truncation
from microvllm.openai_compat.api.requests import TokenizeRequest
from microvllm.openai_compat.api.vectors.requests import EmbeddingRequest
from microvllm.openai_compat.api.vectors.texts import (
    MAX_INPUTS,
    check_input,
    check_total,
    make_vectors,
    split_inputs,
    tokenize_inputs,
)
from microvllm.openai_compat.errors import Fault, shape_error
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError

INLINE_NUMBERS = 1 << 14  # more are written in a worker thread


async def create_embeddings(request: Request, state: ServerState, body: EmbeddingRequest) -> Response:
    """Returns a vector for each text, as numbers or as base64 of little-endian float32.

    A text may also come as token ids, or as a conversation, which goes through the chat template.
    """
    created = int(time.time())
    conversations = _conversations(body)
    if conversations is None:
        read = partial(_read_inputs, state, body, split_inputs(body.input, "input"))
    else:
        read = partial(_read_conversations, state, body, conversations)
    name, vectors, spent = await make_vectors(
        *(request, state, body, "embd", read),
        dimensions=body.dimensions,
        renders=conversations is not None,
    )
    head = {"id": name, "object": "list", "created": created, "model": state.model_names[0]}
    write = partial(_write, head, vectors, spent, body.encoding_format)
    many = len(vectors) * len(vectors[0]) > INLINE_NUMBERS
    answer = await state.client.run_blocking(write) if many else write()
    return Response(answer, media_type="application/json")


def _write(
    head: dict[str, Any], vectors: Sequence[np.ndarray], spent: dict[str, Any], encoding: str
) -> bytes:
    data = [
        {
            "index": index,
            "object": "embedding",
            "embedding": vector if encoding == "float" else _base64(vector),
        }
        for index, vector in enumerate(vectors)
    ]
    return orjson.dumps({**head, "data": data, "usage": spent}, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64(vector: np.ndarray) -> str:
    if sys.byteorder == "big":
        vector = vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode("ascii")


def _conversations(body: EmbeddingRequest) -> list[Any] | None:
    """Return the conversations of a request; None if it has texts or ids."""
    if (body.input is None) == (body.messages is None):
        raise shape_error([("body.input", Fault("Give either input or messages"))])
    given = body.messages if body.messages is not None else body.input
    if not isinstance(given, list) or not given:
        return None if body.messages is None else [given]
    if body.messages is None and not _is_message(given[0]):
        return None
    found = given if isinstance(given[0], list) else [given]
    if len(found) > MAX_INPUTS:
        raise InvalidRequestError(f"{len(found)} conversations are more than {MAX_INPUTS}.", "messages")
    return found


def _is_message(value: Any) -> bool:
    """Whether a value is a message, or a conversation that begins with one."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict)


def _read_inputs(state: ServerState, body: EmbeddingRequest, entries: Sequence[Any]) -> list[list[int]]:
    """Runs in a worker thread."""
    client, special = state.client, body.add_special_tokens is not False
    truncation = Truncation.of(body, client.config.max_model_len, room=0)
    return tokenize_inputs(client, entries, "input", special, truncation)


def _read_conversations(
    state: ServerState, body: EmbeddingRequest, conversations: Sequence[Any]
) -> list[list[int]]:
    """Runs in a worker thread."""
    client, found = state.client, []
    truncation = Truncation.of(body, client.config.max_model_len, room=0)
    for conversation in conversations:
        whole = TokenizeRequest(
            messages=conversation,
            add_special_tokens=bool(body.add_special_tokens),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        found.append(check_input(client, render(state, whole).token_ids, "messages", truncation))
    check_total(found, "messages")
    return found


ENDPOINTS = (
    Endpoint(
        path="/v1/embeddings",
        methods=("POST",),
        handler=create_embeddings,
        body=EmbeddingRequest,
        answer="EmbeddingResponse",
        pools=True,
    ),
)
