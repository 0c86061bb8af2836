"""Reads what a model computes, from its files and the options that override them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microvllm.adapters.errors import ModelFileError, OverrideError
from microvllm.adapters.spec import ModelSpec
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options.pooler_config import choose_runner, configure_pooling


def read_spec(
    path: Path,
    overrides: Mapping[str, Any],
    rotary: Mapping[str, Any],
    *,
    runner: str,
    convert: str,
    pooler_config: dict[str, Any] | None,
) -> ModelSpec:
    """Return the spec of a model folder or file; `overrides` replace keys of config.json.

    `rotary`, without what is None, does so too: the older way to override. Raises `ConfigError` naming the
    option or the file.
    """
    from microvllm.adapters.registry import load_spec

    older = {key: value for key, value in rotary.items() if value is not None}
    given = {**overrides, **older}
    try:
        spec = load_spec(path, given, choose_runner(runner, convert, pooler_config))
    except OverrideError as error:
        flags = " and ".join(f"--{key.replace('_', '-')}" for key in ([] if overrides else older))
        message = str(error).replace("--hf-overrides", flags or "--hf-overrides")
        raise ConfigError(message) from error  # the flag that it names has the remedy
    except ModelFileError as error:
        raise ConfigError(str(error), remedy=error.remedy) from error
    return configure_pooling(spec, convert, pooler_config)
