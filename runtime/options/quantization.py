"""Reads `--quantization` and `--quantization-config`: what of a model is quantised as it is loaded.

The keys are vLLM's. What has no implementation here is refused by key, and so is what could be meant for a
model but concerns none of its matrices (`adapters.weights`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from microvllm.adapters.files.fields import shorten
from microvllm.adapters.files.quantization import (
    LINEAR,
    ON_LOADING,
    Groups,
    Quantization,
    scheme_on_loading,
    why_not_quantized,
)
from microvllm.adapters.spec import ModelSpec
from microvllm.runtime.errors import ConfigError

FLAG = "--quantization-config"
ONLINE = "online"  # the value of --quantization that leaves all to the configuration
# The weights' formats by vLLM's names, which are those of `--quantization` but for the end.
WEIGHTS = {f"{name}_static": name for name in ON_LOADING if name != "fp8"}
KEYS = ("linear", "moe", "ignore", "targets")


def quantize(
    spec: ModelSpec, requested: str | None, config: Mapping[str, Any] | None, stored: str | None, model: str
) -> ModelSpec:
    """Return the spec with what loading quantises. Raises `ConfigError` naming the flag and the key.

    `stored` is the method that quantised the checkpoint, None for plain weights.
    """
    if config is None:
        if requested == ONLINE:
            raise ConfigError(f"--quantization {ONLINE} needs {FLAG}")
        if requested is None:
            return spec
        if problem := why_not_quantized(requested, stored, model):
            raise ConfigError(problem)
        made = None if stored else _everything(requested)
    else:
        if stored is not None:
            raise ConfigError(f"{FLAG}: {model} is quantised as {stored}; plain weights are quantised")
        if requested not in (None, ONLINE, *ON_LOADING):
            raise ConfigError(f"{FLAG} does not fit --quantization {requested}")
        made = _read({key: value for key, value in config.items() if value is not None}, requested)
    return spec if made is None else msgspec.structs.replace(spec, quantization=made)


def _everything(requested: str) -> Quantization:
    groups = (((LINEAR,), scheme_on_loading(requested)),)
    return Quantization(method=requested, groups=groups, expert_groups=groups, on_loading=True)


def _read(config: Mapping[str, Any], requested: str | None) -> Quantization:
    for key in config:
        if key not in KEYS:
            raise _fault(key, f"is unknown: {', '.join(KEYS)} are there")
    base = requested if requested in ON_LOADING else None
    names = {kind: _format(kind, config[kind]) if kind in config else base for kind in ("linear", "moe")}
    ignored = tuple(map(_pattern, _list("ignore", config.get("ignore", []))))
    targets = config.get("targets")
    if targets is None:
        if not any(names.values()):
            raise ConfigError(f"{FLAG}: needs linear, moe or targets")
        linear, moe = (((((LINEAR,), scheme_on_loading(name)),) if name else ()) for name in names.values())
        method = ", ".join(dict.fromkeys(filter(None, names.values())))
        return Quantization(method=method, groups=linear, expert_groups=moe, ignored=ignored, on_loading=True)
    if any(names.values()):
        other = "linear and moe" if base is None else f"--quantization {base}"
        raise _fault("targets", f"does not go together with {other}")
    if ignored:
        raise _fault("ignore", "has no meaning beside targets: what none of them names stays plain")
    if not isinstance(targets, dict) or not targets:
        raise _fault("targets", f"must be an object of patterns and formats, got {shorten(targets)}")
    groups: Groups = tuple(
        ((_pattern(pattern),), scheme_on_loading(_shorthand(f"targets[{pattern}]", name)))
        for pattern, name in targets.items()
    )
    method = ", ".join(dict.fromkeys(targets.values()))
    return Quantization(method=method, groups=groups, expert_groups=groups, on_loading=True)


def _format(kind: str, value: Any) -> str | None:
    """The name in `ON_LOADING` of the weights' format of one kind of layers."""
    if isinstance(value, dict):
        for key in value:
            if key not in ("weight", "activation"):
                raise _fault(f"{kind}.{key}", "is unknown: weight and activation are there")
        if value.get("activation") is not None:
            raise _fault(f"{kind}.activation", "is not implemented: activations follow the weights' format")
        kind, value = f"{kind}.weight", value.get("weight")
        if value is None:
            return None
    if isinstance(value, str) and value in WEIGHTS:
        return WEIGHTS[value]
    return _shorthand(kind, value, *WEIGHTS)


def _shorthand(key: str, value: Any, *others: str) -> str:
    names = [name for name in ON_LOADING if name != "fp8"]
    if not isinstance(value, str) or value not in names:
        raise _fault(key, f"{shorten(value)} is not implemented: {', '.join([*names, *others])} are")
    return value


def _list(key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _fault(key, f"must be a list of names, got {shorten(value)}")
    return value


def _pattern(text: str) -> str:
    """A pattern of `Quantization`: of vLLM's, a name stands for the module of exactly this name."""
    if text.startswith("re:"):
        try:
            re.compile(text.removeprefix("re:"))
        except re.error as error:
            raise ConfigError(f"{FLAG}: {shorten(text)} is no expression ({error})") from None
        return text
    return text if any(letter in text for letter in "*?[") else f"re:{re.escape(text)}$"


def _fault(key: str, problem: str) -> ConfigError:
    return ConfigError(f"{FLAG}: {key} {problem}")
