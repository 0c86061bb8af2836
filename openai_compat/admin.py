"""What an operator asks: the configuration, the prefix cache, whether the engine sleeps, the tokenizer.

All but /tokenizer_info, which has a flag of its own, exist only in vLLM's developer mode
(`VLLM_SERVER_DEV_MODE=1`): they tell or change what a client has no business with.
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

from microvllm.openai_compat.errors import Fault, shape_error
from microvllm.openai_compat.fields import boolean
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import EngineDeadError

PATHS = frozenset({"vocab_file", "merges_file", "name_or_path"})  # of the machine it was made on
PACKAGES = ("microvllm", "torch", "transformers", "tokenizers", "starlette", "uvicorn", "msgspec")


async def server_info(request: Request) -> Response:
    """The engine's configuration, the environment's VLLM_ and MICROVLLM_ variables (no keys), versions.

    `config_format` is text (the default) or json.
    """
    state: ServerState = request.app.state.server
    form = request.query_params.get("config_format", "text")
    if form not in ("text", "json"):
        raise shape_error(
            [("query.config_format", Fault("literal_error", "Input should be 'text' or 'json'"))]
        )
    config = state.client.config
    return _json(
        {
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
    )


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
