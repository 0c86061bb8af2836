"""Answers 400 at the endpoints of vLLM 0.33 that this server does not have, naming the endpoint.

Status 404 would be wrong there: clients read it as "no such model", and a proxy takes the deployment out.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.endpoint import NOT_IMPLEMENTED_KIND, Endpoint
from microvllm.openai_compat.errors import clip
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError

# The paths of vLLM's routers by method. An endpoint that is implemented comes before them in the router.
NOT_IMPLEMENTED: Mapping[str, tuple[str, ...]] = {
    "POST": (
        *("/v1/responses/render", "/v1/messages/render"),
        *("/v1/chat/completions/batch", "/v1/chat/completions/derender", "/v1/completions/derender"),
        *("/v2/embed", "/pooling", "/classify", "/generative_scoring", "/v1/decisions", "/v1/systemone"),
        *("/v1/audio/transcriptions", "/v1/audio/translations", "/invocations", "/cohere/v2/chat"),
        *("/inference/v1/generate", "/inference/v1/abort_requests", "/abort_requests"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
        *("/reset_mm_cache", "/reset_encoder_cache", "/collective_rpc"),
        *("/release_kv_cache_memory", "/pause", "/resume"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
        *("/start_draft_weight_update", "/update_weights", "/finish_weight_update"),
        *("/update_weight_version", "/weight_checker"),
        *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply"),
    ),
    "GET": (
        *("/v1/realtime", "/is_paused", "/weight_info", "/get_world_size"),
        "/fault_tolerance/status",
    ),
}


async def not_implemented(request: Request, state: ServerState) -> Response:
    """Answer 400: vLLM has the endpoint, this server does not."""
    where = f"{request.method} {clip(request.scope['path'])}"
    raise InvalidRequestError(
        f"{where} is an endpoint of vLLM that this server does not implement.", kind=NOT_IMPLEMENTED_KIND
    )


ENDPOINTS = tuple(
    Endpoint(path=path, methods=(method,), handler=not_implemented, documented=False)
    for method, paths in NOT_IMPLEMENTED.items()
    for path in paths
)
