"""Serves /v1/responses/{response_id}: reads, deletes and cancels stored responses."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.responses.items import listed_item
from microvllm.openai_compat.api.responses.store import ID_PREFIX
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError

DEFAULT_LIMIT, MAX_LIMIT = 20, 100  # items in one list, as OpenAI has them
_ORDERS = ("desc", "asc")


class _Kind(msgspec.Struct):
    """What a cancellation asks of a stored response."""

    background: bool


async def retrieve_response(request: Request, state: ServerState) -> Response:
    """Returns a stored response as it was, or as far as it is if it runs in the background."""
    # What a response includes is decided by its request, and its events are not kept.
    for name in ("stream", "starting_after", "include_obfuscation"):
        if request.query_params.get(name, "false") != "false":
            raise InvalidRequestError(f"`{name}` is not supported for a stored response.", name)
    return _json(state.responses.get(_id_of(request)).response)


async def delete_response(request: Request, state: ServerState) -> Response:
    """Forgets a stored response, and cancels it if it runs in the background."""
    name = _id_of(request)
    await _cancel(name, state)
    state.responses.delete(name)
    return _json(orjson.dumps({"id": name, "object": "response", "deleted": True}))


async def cancel_response(request: Request, state: ServerState) -> Response:
    """Ends a response that runs in the background; one that has ended is returned as it is."""
    name = _id_of(request)
    response = state.responses.get(name).response
    if not msgspec.json.decode(response, type=_Kind).background:
        problem = "Only a response with `background` can be cancelled; end others by closing the connection."
        raise InvalidRequestError(problem, "response_id")
    await _cancel(name, state)
    return _json(state.responses.get(name).response)


async def list_input_items(request: Request, state: ServerState) -> Response:
    """Lists the items that the request of a stored response gave as its input."""
    name, query = _id_of(request), request.query_params
    order, after = query.get("order", "desc"), query.get("after")
    if order not in _ORDERS:
        raise InvalidRequestError("order must be 'asc' or 'desc'.", "order")
    limit = query.get("limit", str(DEFAULT_LIMIT))
    if not (limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= MAX_LIMIT):
        raise InvalidRequestError(f"limit must be in [1, {MAX_LIMIT}].", "limit")
    given = state.responses.get(name).input  # as large as a body
    listing = (given, name.removeprefix(ID_PREFIX), order == "desc", after, int(limit))
    return _json(await state.client.run_blocking(_list_of, *listing))


def _list_of(given: bytes, suffix: str, descending: bool, after: str | None, limit: int) -> bytes:
    items = [listed_item(item, suffix, index) for index, item in enumerate(orjson.loads(given))]
    if descending:
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequestError("after: no item of this response has this id.", "after")
        items = items[ids.index(after) + 1 :]
    shown = items[:limit]
    return orjson.dumps(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(shown) < len(items),
        }
    )


async def _cancel(name: str, state: ServerState) -> None:
    task = state.background.get(name)
    if task is not None:
        task.cancel()
        await asyncio.wait((task,))


def _id_of(request: Request) -> str:
    name: str = request.path_params["response_id"]
    return name


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


_INTEGER: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
ENDPOINTS = (
    Endpoint(
        path="/v1/responses/{response_id}",
        handler=retrieve_response,
        answer="ResponsesResponse",
    ),
    Endpoint(
        path="/v1/responses/{response_id}",
        methods=("DELETE",),
        handler=delete_response,
        answer="DeletedResponse",
    ),
    Endpoint(
        path="/v1/responses/{response_id}/cancel",
        methods=("POST",),
        handler=cancel_response,
        answer="ResponsesResponse",
    ),
    Endpoint(
        path="/v1/responses/{response_id}/input_items",
        handler=list_input_items,
        query={
            "limit": _INTEGER,
            "order": {"enum": list(_ORDERS), "default": "desc"},
            "after": {"type": "string"},
        },
        answer="ResponseItemList",
    ),
)
