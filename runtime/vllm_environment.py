"""Knows the environment variables of vLLM 0.33, and names those that are set and have no effect here.

`vllm_environment.tsv` lists those of vLLM's `envs.py`; `scripts/compare_flags.py` compares them with an
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
VARIABLES = dict(read_table("vllm_environment.tsv"))  # name -> honoured, harmless or ignored


def is_on(name: str) -> bool:
    """Whether a variable says 1 or true. Raises `ConfigError` for what is neither on nor off."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("1", "true"):
        return True
    if value in ("", "0", "false"):
        return False
    raise ConfigError(f"{name} in the environment must be 0 or 1, got {value!r}")


def whole_number(name: str) -> int:
    """The value of a variable, 0 if it is not set. Raises `ConfigError` for what is no such number."""
    value = os.environ.get(name, "").strip() or "0"
    if not value.isdecimal() or len(value) > 18:
        raise ConfigError(f"{name} in the environment must be a whole number, got {value!r}")
    return int(value)


def ignored_variables(environment: Mapping[str, str]) -> str | None:
    """One line that names the variables of vLLM that are set and do nothing here; None if there are none."""
    names = sorted(name for name in environment if name.startswith(PREFIX) and environment[name])
    ignored = [name for name in names if VARIABLES.get(name, "ignored") == "ignored"]
    if not ignored:
        return None
    return f"environment variables without effect here: {', '.join(ignored)}{_unknown(ignored)}"


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """The variables that begin as vLLM's do and are none of them."""
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in VARIABLES)


def _unknown(ignored: list[str]) -> str:
    """A hint at the first one that vLLM does not know either, as a mistyped one."""
    for name in ignored:
        if name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, 1, 0.8)
            return f" ({name} is none of vLLM's" + (f"; {near[0]} is)" if near else ")")
    return ""
