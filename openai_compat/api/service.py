"""Serves probes, metrics, load and settings, and what an operator may switch.

/reset_prefix_cache, /is_sleeping and the internals in /server_info exist only in vLLM's developer mode
(`VLLM_SERVER_DEV_MODE=1`): they report or change what only an operator should. /tokenizer_info and the
profiler have flags.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

import microvllm
from microvllm.openai_compat.api.endpoint import Endpoint, Switch, read_body
from microvllm.openai_compat.api.reading import read_value
from microvllm.openai_compat.api.requests import ProfileRequest
from microvllm.openai_compat.errors import RETRY_AFTER_S, Fault, clip, shape_error
from microvllm.openai_compat.metrics import Exposition
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import EngineDeadError, InvalidRequestError
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.process.client import SLEEP_TAGS

logger = logging.getLogger("microvllm.server")

PATHS = frozenset({"vocab_file", "merges_file", "name_or_path"})  # paths of the machine that wrote the file
PACKAGES = ("microvllm", "torch", "transformers", "tokenizers", "starlette", "uvicorn", "msgspec")


async def health(request: Request, state: ServerState) -> Response:
    """200 or 503: 503 while no engine serves and while the server drains.

    Without a body, unless there are several engines: then it says of each whether it serves.
    """
    fine = state.client.healthy() and not state.lifecycle.draining
    response = Response() if len(state.client.replicas) == 1 else _json(_engines(state))
    if not fine:
        response.status_code = 503
        response.headers["retry-after"] = str(RETRY_AFTER_S)
    return response


def _engines(state: ServerState) -> dict[str, dict[str, str]]:
    states = ("serving" if replica.healthy() else "starting" for replica in state.client.replicas)
    return {"engines": {str(number): each for number, each in enumerate(states)}}


async def version(request: Request, state: ServerState) -> Response:
    """`{"version"}` of this server."""
    return Response(orjson.dumps({"version": microvllm.__version__}), media_type="application/json")


async def metrics(request: Request, state: ServerState) -> Response:
    """Everything that is counted, or the samples of the given names, in Prometheus' text format."""
    if state.exposition is None:
        # Importing its library takes a while, which must hold up neither the start nor a stream.
        name, config = state.model_names[0], state.client.config
        state.exposition = await asyncio.to_thread(
            Exposition, state.http_metrics, state.metrics, name, config
        )
    body, content_type = state.exposition.text(request.query_params.getlist("name[]"))
    return Response(body, headers={"content-type": content_type})


async def load(request: Request, state: ServerState) -> Response:
    """The number of generations in progress; always 0 without --enable-server-load-tracking, as in vLLM."""
    number = state.num_generations if state.args.enable_server_load_tracking else 0
    return Response(orjson.dumps({"server_load": number}), media_type="application/json")


async def loads(request: Request, state: ServerState) -> Response:
    """Requests and tokens in the engine, as SGLang reports them: routers balance by it."""
    replicas = state.client.replicas
    stats = state.client.stats
    running, waiting = stats.num_running, stats.num_waiting
    total = {
        "total_running_reqs": running,
        "total_waiting_reqs": waiting,
        "total_reqs": running + waiting,
        "avg_token_usage": sum(replica.stats.kv_usage for replica in replicas) / len(replicas),
    }
    answer = {
        "version": microvllm.__version__,
        "dp_rank_count": len(replicas),
        "loads": [_load_of(replica.stats, state, number) for number, replica in enumerate(replicas)],
        "aggregate": total,
    }
    timestamp = datetime.now(timezone.utc).isoformat()
    return Response(orjson.dumps({"timestamp": timestamp, **answer}), media_type="application/json")


def _load_of(stats: EngineStats, state: ServerState, rank: int) -> dict[str, float]:
    config = state.client.config
    running, waiting = stats.num_running, stats.num_waiting
    in_blocks = stats.kv_tokens_total * stats.kv_blocks_used // max(1, stats.kv_blocks_total)
    return {
        "dp_rank": rank,
        "num_running_reqs": running,
        "num_waiting_reqs": waiting,
        "num_total_reqs": running + waiting,
        "num_used_tokens": in_blocks - stats.kv_unused_slots,
        "max_total_num_tokens": stats.kv_tokens_total,
        "max_running_requests": config.max_num_seqs,
        "token_usage": stats.kv_usage,
        "cache_hit_rate": stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0,
    }


async def get_load(request: Request, state: ServerState) -> Response:
    """The number of requests in the engine, as vllm-router reads it."""
    stats = state.client.stats
    return Response(
        orjson.dumps({"load": stats.num_running + stats.num_waiting}), media_type="application/json"
    )


async def kv_event_sources(request: Request, state: ServerState) -> Response:
    """Where each engine publishes the events of its KV cache, by its rank; `{}` where none does."""
    sources = state.client.kv_event_sources()
    return Response(msgspec.json.encode(sources), media_type="application/json")


async def server_info(request: Request, state: ServerState) -> Response:
    """What a router asks of an engine: version, model, context and capacity.

    In developer mode also the engine's configuration as text (`config_format=text`, the default) or JSON, the
    environment's VLLM_ and MICROVLLM_ variables (no keys), and versions.
    """
    config = state.client.config
    info: dict[str, Any] = {
        "version": microvllm.__version__,
        "served_model_name": state.model_names[0],
        "context_length": config.max_model_len,
        "max_running_requests": config.max_num_seqs * config.data_parallel_size,
        "max_total_num_tokens": state.client.stats.kv_tokens_total,
        "page_size": config.block_size,
        "block_size": config.block_size,
        "dtype": config.dtype,
        "tp_size": config.tensor_parallel_size,
        "dp_size": config.data_parallel_size,
    }
    form = request.query_params.get("config_format", "text")
    if form not in ("text", "json"):
        raise shape_error([("query.config_format", Fault("Input should be 'text' or 'json'"))])
    return _json(info | (_internals(state, form) if state.args.dev_mode else {}))


def _internals(state: ServerState, form: str) -> dict[str, Any]:
    config = state.client.config
    return {
        "vllm_config": repr(config) if form == "text" else msgspec.to_builtins(config),
        "vllm_env": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("VLLM_", "MICROVLLM_")) and "KEY" not in name
        },
        "system_env": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpu_count": os.cpu_count(),
            **{name: _version(name) for name in PACKAGES},
        },
    }


async def reset_prefix_cache(request: Request, state: ServerState) -> Response:
    """Forgets every cached prefix: `{"success": true}`.

    It succeeds while requests run, too, since they keep their blocks; so `reset_running_requests` has
    nothing to add, nor has `reset_external`, there being no cache outside. Both must be booleans.
    """
    for name in ("reset_running_requests", "reset_external"):
        try:
            read_value(bool, request.query_params.get(name, "false"))
        except Fault as fault:
            raise shape_error([(f"query.{name}", fault)]) from None
    if not state.client.healthy():
        raise EngineDeadError("The engine is being started again, with an empty cache.")
    state.client.reset_prefix_cache()
    return _json({"success": True})


async def is_sleeping(request: Request, state: ServerState) -> Response:
    """`{"is_sleeping"}`: whether the engines have given memory back."""
    return _json({"is_sleeping": state.client.sleep_level > 0})


async def sleep(request: Request, state: ServerState) -> Response:
    """Has the engines give their memory back, once running requests were ended or have come to their end."""
    level, mode = request.query_params.get("level", "1"), request.query_params.get("mode", "abort")
    if level not in ("1", "2"):
        raise InvalidRequestError("level must be 1 or 2.", "level")
    if mode not in ("abort", "wait"):
        raise InvalidRequestError("mode must be abort or wait.", "mode")
    ranks = state.client.config.tensor_parallel_size
    if level == "1" and ranks > 1:
        raise InvalidRequestError(
            f"level 1 is not available with --tensor-parallel-size {ranks}; level 2 is.", "level"
        )
    await state.client.sleep(int(level), wait=mode == "wait")
    logger.info("The engine is asleep at level %s.", level)
    return Response()


async def wake_up(request: Request, state: ServerState) -> Response:
    """Has the engines take the memory of the given `tags` again, or all of it."""
    tags = request.query_params.getlist("tags")
    if unknown := sorted(set(tags) - set(SLEEP_TAGS)):
        raise InvalidRequestError(f"tags must be of {', '.join(SLEEP_TAGS)}, got {clip(unknown[0])}.", "tags")
    await state.client.wake_up(tags or SLEEP_TAGS)
    logger.info("The engine has taken memory again: %s.", ", ".join(tags or SLEEP_TAGS))
    return Response()


async def tokenizer_info(request: Request, state: ServerState) -> Response:
    """The tokenizer's settings: what its `tokenizer_config.json` says, and the chat template in use."""
    return _json(await state.client.run_blocking(_tokenizer_settings, state))


def _tokenizer_settings(state: ServerState) -> dict[str, Any]:
    """Runs in a worker thread. A GGUF file has no such file; then there are its special tokens."""
    tokenizer = state.client.tokenizer
    file = Path(state.client.config.tokenizer_path) / "tokenizer_config.json"
    stored = orjson.loads(file.read_bytes()) if file.is_file() else {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens, **stored}
    template = state.args.chat_template or tokenizer.chat_template
    if template:
        settings["chat_template"] = template
    return {name: value for name, value in settings.items() if name not in PATHS}


def _version(package: str) -> str | None:
    try:
        return package_version(package)
    except PackageNotFoundError:
        return None


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content, default=str), media_type="application/json")


async def start_profile(request: Request, state: ServerState) -> Response:
    """Starts a profile of the engine. A body is not needed; `profile_prefix` begins the file's name."""
    headers = request.headers
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    body = await read_body(request, state, ProfileRequest) if has_body else ProfileRequest()
    if state.args.profiler is not None:
        await state.client.start_profile(state.args.profiler, body.profile_prefix)
        logger.info("Profiling the engine.")
    return Response()


async def stop_profile(request: Request, state: ServerState) -> Response:
    """Ends the profile and writes the trace; the engine pauses meanwhile."""
    logger.info("Profile written to %s", await state.client.stop_profile())
    return Response()


_PROBE: dict[str, Any] = {"needs_key": False, "in_http_metrics": False}
_NAMES = {"name[]": {"type": "array", "items": {"type": "string"}}}
_CONFIG_FORMAT = {"config_format": {"enum": ["text", "json"], "default": "text"}}
_RESETS = {
    "reset_running_requests": {"type": "boolean", "default": False},
    "reset_external": {"type": "boolean", "default": False},
}
_TOKENIZER_INFO = Switch(lambda args: args.enable_tokenizer_info_endpoint, "--enable-tokenizer-info-endpoint")
_PROFILER = Switch(
    lambda args: args.profiler is not None,
    '--profiler-config \'{"profiler": "torch", "torch_profiler_dir": "FOLDER"}\'',
)
_SLEEP = Switch(
    lambda args: args.dev_mode and args.enable_sleep_mode,
    "--enable-sleep-mode and VLLM_SERVER_DEV_MODE=1 in the environment",
)
_LEVELS = {
    "level": {"enum": ["1", "2"], "default": "1"},
    "mode": {"enum": ["abort", "wait"], "default": "abort"},
}
_TAGS = {"tags": {"type": "array", "items": {"enum": list(SLEEP_TAGS)}}}
_DEV_MODE = Switch(lambda args: args.dev_mode, "VLLM_SERVER_DEV_MODE=1 in the environment")

ENDPOINTS = (
    Endpoint(path="/health", handler=health, **_PROBE),
    Endpoint(path="/ready", handler=health, **_PROBE),
    Endpoint(path="/ping", methods=("GET", "POST"), handler=health, **_PROBE),
    Endpoint(path="/version", handler=version, answer="Version", **_PROBE),
    # Open as in vLLM, for a Prometheus without a key.
    Endpoint(path="/metrics", handler=metrics, query=_NAMES, **_PROBE),
    Endpoint(path="/metrics/", handler=metrics, documented=False, **_PROBE),
    Endpoint(path="/load", handler=load, answer="Load", **_PROBE),
    Endpoint(path="/get_load", handler=get_load, answer="EngineLoad", **_PROBE),
    Endpoint(path="/v1/loads", handler=loads, answer="Loads", in_http_metrics=False),
    Endpoint(path="/kv_event_sources", handler=kv_event_sources, answer="KVEventSources"),
    Endpoint(
        path="/server_info",
        handler=server_info,
        query=_CONFIG_FORMAT,
        answer="ServerInfo",
        in_http_metrics=False,
    ),
    Endpoint(path="/get_server_info", handler=server_info, documented=False),
    Endpoint(
        path="/tokenizer_info", handler=tokenizer_info, answer="TokenizerInfoResponse", switch=_TOKENIZER_INFO
    ),
    Endpoint(path="/start_profile", methods=("POST",), handler=start_profile, switch=_PROFILER),
    Endpoint(path="/stop_profile", methods=("POST",), handler=stop_profile, switch=_PROFILER),
    Endpoint(
        path="/reset_prefix_cache",
        methods=("POST",),
        handler=reset_prefix_cache,
        query=_RESETS,
        answer="Success",
        switch=_DEV_MODE,
    ),
    Endpoint(path="/sleep", methods=("POST",), handler=sleep, query=_LEVELS, switch=_SLEEP),
    Endpoint(path="/wake_up", methods=("POST",), handler=wake_up, query=_TAGS, switch=_SLEEP),
    Endpoint(path="/is_sleeping", handler=is_sleeping, answer="Sleep", switch=_DEV_MODE),
)
