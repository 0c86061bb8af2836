"""Serves POST /score and /rerank: how alike texts are, by the cosine of the angle between their vectors."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.prompts import Truncation
from microvllm.openai_compat.api.vectors.requests import RerankRequest, ScoreRequest, ScoringRequest
from microvllm.openai_compat.api.vectors.texts import check_total, make_vectors, split_inputs, tokenize_inputs
from microvllm.openai_compat.errors import Fault, shape_error
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.vectors import cosine

if TYPE_CHECKING:
    from microvllm.runtime.process.client import EngineClient

PAIRS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))


async def create_score(request: Request, state: ServerState, body: ScoreRequest) -> Response:
    """Scores one text against one or many, or texts in pairs: from -1 to 1, the more alike the higher."""
    created = int(time.time())
    first, second = _pair(body)
    queries, documents = (_texts(getattr(body, field), field) for field in (first, second))
    if len(queries) not in (1, len(documents)):
        raise InvalidRequestError("Input lengths must be either 1:1, 1:N or N:N", second)
    name, scores, spent = await _score(request, state, body, "score", (first, queries), (second, documents))
    answer = {
        "id": name,
        "object": "list",
        "created": created,
        "model": state.model_names[0],
        "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
        "usage": spent,
    }
    return Response(orjson.dumps(answer), media_type="application/json")


async def rerank(request: Request, state: ServerState, body: RerankRequest) -> Response:
    """Orders documents by how alike they are to a query, in the form of Jina and Cohere.

    The query's tokens are counted once.
    """
    documents = _texts(body.documents, "documents")
    name, scores, spent = await _score(
        request, state, body, "rerank", ("query", [body.query]), ("documents", documents)
    )
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    answer = {
        "id": name,
        "model": state.model_names[0],
        "usage": {"prompt_tokens": spent["prompt_tokens"], "total_tokens": spent["total_tokens"]},
        "results": [
            {
                "index": index,
                "document": {"text": documents[index], "multi_modal": None},
                "relevance_score": scores[index],
            }
            for index in order
        ],
    }
    return Response(orjson.dumps(answer), media_type="application/json")


async def _score(
    request: Request,
    state: ServerState,
    body: ScoringRequest,
    prefix: str,
    first: tuple[str, list[str]],
    second: tuple[str, list[str]],
) -> tuple[str, list[float], dict[str, Any]]:
    """Score texts, with their field each -> the id of the response, the scores, the usage."""
    read = partial(_read_texts, state, body, first, second)
    name, vectors, spent = await make_vectors(request, state, body, prefix, read)
    count = len(first[1])
    queries, documents = vectors[:count], vectors[count:]
    if count == 1:
        queries = queries * len(documents)
    return name, [cosine(query, document) for query, document in zip(queries, documents, strict=True)], spent


def _read_texts(
    state: ServerState, body: ScoringRequest, first: tuple[str, list[str]], second: tuple[str, list[str]]
) -> list[list[int]]:
    """Runs in a worker thread."""
    client, found = state.client, list[list[int]]()
    truncation = Truncation.of(body, client.config.max_model_len, room=0)
    limits = body.max_tokens_per_query, body.max_tokens_per_doc
    names = "max_tokens_per_query", "max_tokens_per_doc"
    for (field, texts), limit, name in zip((first, second), limits, names, strict=True):
        if limit >= client.config.max_model_len:
            longest = client.config.max_model_len
            raise InvalidRequestError(f"{name} ({limit}) must be less than max_model_len ({longest}).", name)
        shortened = [_shortened(client, text, limit) for text in texts] if limit else texts
        found += tokenize_inputs(client, shortened, field, True, truncation)
    check_total(found, second[0])
    return found


def _shortened(client: EngineClient, text: str, limit: int) -> str:
    """Return the text of the first `limit` tokens."""
    text = text[: client.processor.max_chars]
    ids = client.processor.tokenize_prompt(text, False)
    return text if len(ids) <= limit else client.tokenizer.decode(ids[:limit], False)


def _texts(value: Any, field: str) -> list[str]:
    if set(map(type, value if isinstance(value, list) else [value])) - {str}:
        raise shape_error([(f"body.{field}", Fault("Input should be a string or a list of strings"))])
    return split_inputs(value, field)


def _pair(body: ScoreRequest) -> tuple[str, str]:
    given = {field for pair in PAIRS for field in pair if getattr(body, field) is not None}
    for pair in PAIRS:
        if given == {*pair}:
            return pair
    pairs = ", or ".join(" and ".join(pair) for pair in PAIRS)
    raise shape_error([("body.queries", Fault(f"Give {pairs}, and no other of them"))])


_SCORE: dict[str, Any] = {"methods": ("POST",), "handler": create_score, "body": ScoreRequest, "pools": True}
_RERANK: dict[str, Any] = {"methods": ("POST",), "handler": rerank, "body": RerankRequest, "pools": True}
ENDPOINTS = (
    *(Endpoint(path=path, answer="ScoreResponse", **_SCORE) for path in ("/score", "/v1/score")),
    *(
        Endpoint(path=path, answer="RerankResponse", **_RERANK)
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ),
)
