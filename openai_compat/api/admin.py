"""What an operator asks: the configuration, the prefix cache, whether the engine sleeps, the tokenizer.

/reset_prefix_cache, /is_sleeping and the internals in /server_info exist only in vLLM's developer mode
(`VLLM_SERVER_DEV_MODE=1`): they report or change what only an operator should. /tokenizer_info has a flag.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

import microvllm
from microvllm.openai_compat.api.fields import boolean
from microvllm.openai_compat.errors import Fault, shape_error
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import EngineDeadError

PATHS = frozenset({"vocab_file", "merges_file", "name_or_path"})  # of the machine it was made on
PACKAGES = ("microvllm", "torch", "transformers", "tokenizers", "starlette", "uvicorn", "msgspec")


async def server_info(request: Request) -> Response:
    """What a router asks of an engine: version, model, context and capacity.

    In developer mode also the engine's configuration as text (`config_format=text`, the default) or JSON, the
    environment's VLLM_ and MICROVLLM_ variables (no keys), and versions.
    """
    state: ServerState = request.app.state.server
    config = state.client.config
    info: dict[str, Any] = {
        "version": microvllm.__version__,
        "served_model_name": state.model_names[0],
        "context_length": config.max_model_len,
        "max_running_requests": config.max_num_seqs,
        "max_total_num_tokens": state.client.stats.kv_blocks_total * config.block_size,
        "page_size": config.block_size,
        "dtype": config.dtype,
        "tp_size": 1,
        "dp_size": 1,
    }
    form = request.query_params.get("config_format", "text")
    if form not in ("text", "json"):
        raise shape_error(
            [("query.config_format", Fault("literal_error", "Input should be 'text' or 'json'"))]
        )
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


async def reset_prefix_cache(request: Request) -> Response:
    """Forgets every cached prefix: `{"success": true}`.

    It succeeds while requests run, too, since they keep their own blocks; so `reset_running_requests` has
    nothing to add, nor has `reset_external`, there being no cache outside. Both must be booleans.
    """
    state: ServerState = request.app.state.server
    for name in ("reset_running_requests", "reset_external"):
        try:
            boolean(request.query_params.get(name, "false"))
        except Fault as fault:
            raise shape_error([(f"query.{name}", fault)]) from None
    if not state.client.healthy():
        raise EngineDeadError("The engine is being started again, with an empty cache.")
    state.client.reset_prefix_cache()
    return _json({"success": True})


async def is_sleeping(request: Request) -> Response:
    """`{"is_sleeping": false}`: the engine keeps its memory as long as the server runs."""
    return _json({"is_sleeping": False})


async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's settings: what its `tokenizer_config.json` says, and the chat template in use."""
    state: ServerState = request.app.state.server
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
        return version(package)
    except PackageNotFoundError:
        return None


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content, default=str), media_type="application/json")
