"""Reads vLLM's environment variables, and names those that are set and have no effect here.

`vllm_environment.tsv` lists those of vLLM 0.33's `envs.py`; `scripts/compare_flags.py` compares them with an
installed vLLM. One that is `honoured` is read where its option is defined. One that is `harmless` says
where caches and libraries are, how vLLM was built or what it reports home: no behaviour depends on it
here. One that is `ignored` is named in a warning.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from microvllm.runtime.errors import ConfigError
from microvllm.runtime.tables import read_table

PREFIX = "VLLM_"
VARIABLES = dict(read_table("options/vllm_environment.tsv"))  # name -> honoured, harmless or ignored


def is_on(name: str, *, default: bool = False) -> bool:
    """Return whether a variable is 1 or true. Raises `ConfigError` for a value that is neither on nor off."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("1", "true"):
        return True
    if value in ("", "0", "false"):
        return default and not value
    raise ConfigError(f"{name} in the environment must be 0 or 1, got {value!r}")


def chosen(given: bool | None, name: str) -> bool:
    """Return what an option says, or where it was not given a variable. Raises `ConfigError` as `is_on`."""
    return is_on(name) if given is None else given


def whole_number(name: str) -> int:
    """Return the number in a variable, 0 if it is not set. Raises `ConfigError` if it is no whole number."""
    value = os.environ.get(name, "").strip() or "0"
    if not value.isdecimal() or len(value) > 18:
        raise ConfigError(f"{name} in the environment must be a whole number, got {value!r}")
    return int(value)


def ignored_variables(environment: Mapping[str, str]) -> str | None:
    """Return one line that names vLLM's variables that are set and do nothing here; None without any."""
    names = sorted(name for name in environment if name.startswith(PREFIX) and environment[name])
    ignored = [name for name in names if VARIABLES.get(name, "ignored") == "ignored"]
    if not ignored:
        return None
    return f"environment variables without effect here: {', '.join(ignored)}{_unknown(ignored)}"


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that begin with `VLLM_` and are none of vLLM's."""
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in VARIABLES)


def _unknown(ignored: list[str]) -> str:
    """Return a hint at the first variable that is none of vLLM's, which may be mistyped."""
    for name in ignored:
        if name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, 1, 0.8)
            return f" ({name} is none of vLLM's" + (f"; {near[0]} is)" if near else ")")
    return ""
