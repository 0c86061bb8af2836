"""What a Prometheus, a load balancer and a router ask: /metrics, /load, /v1/loads, the load in a header."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import orjson
from starlette.requests import Request
from starlette.responses import Response

import microvllm

if TYPE_CHECKING:
    from microvllm.openai_compat.exposition import Exposition
    from microvllm.openai_compat.state import ServerState

LOAD_HEADER = "endpoint-load-metrics"  # of ORCA, the open request cost aggregation that Envoy reads


async def metrics(request: Request) -> Response:
    """Everything that is counted, in Prometheus' text format."""
    state: ServerState = request.app.state.server
    if state.exposition is None:
        # Its library takes a while to import: nobody's start, and nobody's tokens, shall wait for it.
        state.exposition = await asyncio.to_thread(_make_exposition, state)
    body, content_type = state.exposition.text()
    return Response(body, headers={"content-type": content_type})


def _make_exposition(state: ServerState) -> Exposition:
    from microvllm.openai_compat import exposition

    return exposition.Exposition(state)


async def load(request: Request) -> Response:
    """The number of generations in progress; always 0 without --enable-server-load-tracking, as in vLLM."""
    state: ServerState = request.app.state.server
    number = state.num_generations if state.args.enable_server_load_tracking else 0
    return Response(orjson.dumps({"server_load": number}), media_type="application/json")


async def loads(request: Request) -> Response:
    """Requests and tokens in the engine, as SGLang reports them: routers balance by it."""
    state: ServerState = request.app.state.server
    stats, config = state.client.stats, state.client.config
    running, waiting = stats.num_running, stats.num_waiting
    rank = {
        "dp_rank": 0,
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_total_reqs": running + waiting,
        "num_used_tokens": stats.kv_blocks_used * config.block_size - stats.kv_unused_slots,
        "max_total_num_tokens": stats.kv_blocks_total * config.block_size,
        "max_running_requests": config.max_num_seqs,
        "token_usage": stats.kv_usage,
        "cache_hit_rate": stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0,
    }
    total = {
        "total_running_reqs": running,
        "total_waiting_reqs": waiting,
        "total_reqs": running + waiting,
        "avg_token_usage": stats.kv_usage,
    }
    answer = {"version": microvllm.__version__, "dp_rank_count": 1, "loads": [rank], "aggregate": total}
    timestamp = datetime.now(timezone.utc).isoformat()
    return Response(orjson.dumps({"timestamp": timestamp, **answer}), media_type="application/json")


async def get_load(request: Request) -> Response:
    """The number of requests in the engine, as vllm-router reads it."""
    state: ServerState = request.app.state.server
    stats = state.client.stats
    return Response(
        orjson.dumps({"load": stats.num_running + stats.num_waiting}), media_type="application/json"
    )


async def kv_event_sources(request: Request) -> Response:
    """`{}`: this server publishes no events of its KV cache."""
    return Response(b"{}", media_type="application/json")
