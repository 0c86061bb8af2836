"""Serves GET /v1/models and /v1/models/{model}."""

from __future__ import annotations

import uuid
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.generation import check_model
from microvllm.openai_compat.state import ServerState


async def list_models(request: Request, state: ServerState) -> Response:
    """One card per served name. `root` is a folder from which benchmark clients load the tokenizer."""
    cards = [_card(state, name) for name in state.model_names]
    return Response(orjson.dumps({"object": "list", "data": cards}), media_type="application/json")


async def retrieve_model(request: Request, state: ServerState) -> Response:
    """The card of one served name, which may have slashes in it; no name, as in /v1/models/, means all."""
    name = request.path_params["model"]
    if not name:
        return await list_models(request, state)
    check_model(name, state)
    return Response(orjson.dumps(_card(state, name)), media_type="application/json")


def _card(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "microvllm",
        "root": state.client.tokenizer_root,
        "parent": None,
        "max_model_len": state.client.config.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{uuid.uuid5(uuid.NAMESPACE_OID, name).hex}",
                "object": "model_permission",
                "created": state.created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }


ENDPOINTS = (
    Endpoint(path="/v1/models", handler=list_models, answer="ModelList"),
    Endpoint(path="/v1/models/{model:path}", handler=retrieve_model, answer="ModelCard"),
)
