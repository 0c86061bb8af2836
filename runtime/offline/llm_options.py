"""Reads the options of `LLM(...)`: the names of vLLM's `EngineArgs` as fields of ours."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sized
from typing import Any

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options import vllm_flags

logger = logging.getLogger("microvllm.llm")

# What `LLM` does in any case.
BUILT_IN = frozenset(("disable_log_stats", "enable_sleep_mode"))
# What only a server does, and what concerns other kinds of models: ignored with a warning.
SERVER_ONLY = frozenset(
    (
        *("served_model_name", "shutdown_timeout", "stream_interval", "log_level", "enable_log_requests"),
        *("enable_mm_processor_stats", "mamba_config"),
    )
)
# Refused, and no flags that a server refuses.
NO_FLAGS = {
    "model_weights": "load other weights than the model's",
    "reasoning_parser": "begin a grammar behind the model's reasoning",
}
WHOLE_CONTEXT = (-1, "auto")  # of max_model_len


def engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are fields of `EngineArgs`, without those that are None.

    One that only tunes is ignored with a warning. Raises `ConfigError` for an unknown one and for one that
    would change what is generated, unless its value asks for nothing.
    """
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    found: dict[str, Any] = {}
    for name in sorted(options):
        value = options[name]
        if name in fields:
            if value is not None and not (name == "max_model_len" and value in WHOLE_CONTEXT):
                found[name] = _plain(name, value)
        elif name not in BUILT_IN:
            _check_missing(name, value)
    return found


def _plain(name: str, value: Any) -> Any:
    """Paths and torch's dtypes as texts."""
    if name == "dtype":
        return str(value).removeprefix("torch.")
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_missing(name: str, value: Any) -> None:
    flag = name.replace("_", "-")
    if flag not in vllm_flags.KINDS and name not in SERVER_ONLY and name not in NO_FLAGS:
        raise ConfigError(f"LLM() has no option {name}")
    refused = vllm_flags.REFUSED.get(flag)
    empty = isinstance(value, Sized) and len(value) == 0
    if empty and refused is not None and isinstance(value, Mapping):
        empty = False  # the table says whether an object without keys asks for something
    if value is None or value is False or empty:
        return
    if refused is None and name not in NO_FLAGS:
        logger.warning("LLM: %s has no effect and is ignored", name)
        return
    changes, neutral = (NO_FLAGS[name], ()) if refused is None else (refused.changes, refused.neutral)
    if str(value).lower() not in (*vllm_flags.ASKS_FOR_NOTHING, *neutral):
        raise ConfigError(f"LLM: {name}={value!r:.200} is not supported: it would {changes}")
