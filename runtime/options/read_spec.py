"""Reads what a model computes, from its files and the options that override them. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from microvllm.adapters.errors import ModelFileError, OverrideError
from microvllm.adapters.spec import ModelSpec
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options.pooler_config import choose_runner, configure_pooling


def read_spec(path: Path, args: Any) -> ModelSpec:
    """Return the spec of a model folder or file, with what `EngineArgs` override of its config.json.

    Raises `ConfigError` naming the option or the file.
    """
    from microvllm.adapters.registry import load_spec

    rotary = {"rope_scaling": args.rope_scaling, "rope_theta": args.rope_theta}
    older = {key: value for key, value in rotary.items() if value is not None}
    overrides, pooler_config = args.hf_overrides or {}, args.pooler_config
    try:
        runner = choose_runner(args.runner, args.convert, pooler_config)
        spec = load_spec(path, {**overrides, **older}, runner)
    except OverrideError as error:
        flags = " and ".join(f"--{key.replace('_', '-')}" for key in ([] if overrides else older))
        message = str(error).replace("--hf-overrides", flags or "--hf-overrides")
        raise ConfigError(message) from error  # the flag that it names has the remedy
    except ModelFileError as error:
        raise ConfigError(str(error), remedy=error.remedy) from error
    return configure_pooling(spec, args.convert, pooler_config)
