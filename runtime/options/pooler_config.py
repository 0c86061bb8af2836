"""Reads `--runner`, `--convert` and `--pooler-config`: what a model is served for, and how it makes vectors.

The names are vLLM's. What of its pooler configuration has no meaning for vectors of texts is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from microvllm.adapters.pooling_spec import Pooling, PoolingMethod
from microvllm.adapters.spec import ModelSpec
from microvllm.runtime.errors import ConfigError

RUNNERS = ("auto", "generate", "pooling")
CONVERTS = ("auto", "none", "embed")
METHODS: Mapping[str, PoolingMethod] = {"LAST": "last", "MEAN": "mean", "CLS": "first"}
POOLING_TYPES = ("pooling_type", "seq_pooling_type")
# Keys that are not here, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "task": ("embed",),
    "tok_pooling_type": ("ALL",),
    "enable_flash_late_interaction": (True, False),  # only tunes scores of other models
    "enable_chunked_processing": (False,),
    "max_embed_len": (),
    "logit_mean": (),
    "logit_sigma": (),
    "step_tag_id": (),
    "returned_token_ids": (),
}


def choose_runner(runner: str, convert: str, pooler_config: Mapping[str, Any] | None) -> str:
    """Return generate, pooling, or auto, which the model's files decide. Raises `ConfigError`."""
    if convert == "embed":
        if runner == "generate":
            raise ConfigError("--convert embed does not fit --runner generate")
        runner = "pooling"
    if pooler_config is not None and runner == "generate":
        raise ConfigError("--pooler-config does not fit --runner generate")
    return runner


def configure_pooling(spec: ModelSpec, convert: str, pooler_config: Mapping[str, Any] | None) -> ModelSpec:
    """Replace what the model's files say of its pooling. Raises `ConfigError` naming the key at fault."""
    pooling = spec.pooling
    if pooling is None:
        if pooler_config is not None:
            raise ConfigError("--pooler-config: the model generates texts", remedy="add --runner pooling")
        return spec
    if convert == "none":
        raise ConfigError("--convert none: this model becomes one for embeddings only by --convert embed")
    for key, value in (pooler_config or {}).items():
        if value is not None:
            pooling = _with(pooling, key, value)
    if sum((pooler_config or {}).get(key) is not None for key in POOLING_TYPES) > 1:
        raise ConfigError("--pooler-config: pooling_type and seq_pooling_type are one setting; give one")
    if pooling.size is not None and (problem := pooling.size_problem(pooling.size, spec.hidden_size)):
        raise ConfigError(f"--pooler-config: dimensions {pooling.size}: {problem}")
    return msgspec.structs.replace(spec, pooling=pooling)


def _with(pooling: Pooling, key: str, value: Any) -> Pooling:
    if key in POOLING_TYPES:
        if not isinstance(value, str) or value not in METHODS:
            raise _fault(key, f"must be one of {', '.join(METHODS)}", value)
        return msgspec.structs.replace(pooling, method=METHODS[value])
    if key == "use_activation":
        if type(value) is not bool:
            raise _fault(key, "must be true or false", value)
        return msgspec.structs.replace(pooling, normalize=value)
    if key == "dimensions":
        if type(value) is not int:
            raise _fault(key, "must be an integer", value)
        return msgspec.structs.replace(pooling, size=value)
    if value not in NEUTRAL.get(key, ()):
        known = key in NEUTRAL or key == "normalize"
        raise _fault(key, "is not supported" if known else "is no key that vLLM has", value)
    return pooling


def _fault(key: str, problem: str, value: Any) -> ConfigError:
    return ConfigError(f"--pooler-config: {key} {problem}, got {value!r:.100}")
