"""Reads a command line the way `vllm serve` 0.33 does, and brings it into the form that Typer reads.

A script written for vLLM starts unchanged: `_` and `-` are the same, `-tp` is short for
`--tensor-parallel-size`, a flag may take several values, keys of a JSON flag may follow a dot, options may
come from a file, and a flag that is known but not implemented is dropped with a warning. A flag that vLLM
does not know either is an error.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from microvllm.openai_compat.config_file import option_words, read_config
from microvllm.openai_compat.vllm_flags import (
    IGNORED_BECAUSE,
    IGNORED_LISTS,
    IGNORED_SWITCHES,
    IGNORED_VALUE_FLAGS,
    OTHER_SPELLINGS,
    PARALLEL_FLAGS,
)
from microvllm.runtime.errors import ConfigError

CONFIG_FLAG = "--config"


class UsageError(ConfigError):
    """A flag is unknown, lacks its value or has a wrong one."""


def normalise_argv(argv: Sequence[str], own: Mapping[str, str], warn: Callable[[str], None]) -> list[str]:
    """Bring vLLM's spellings of flags into the one form that Typer reads.

    `own` maps each flag of the command to its kind: "value", "list" (several values), "json" (an object) or
    "switch". In the result underscores in flag names are dashes, each value is joined to its long flag with
    "=", a list flag is repeated for each value, an object is whole, and vLLM's flags that have no effect here
    are gone, each reported to `warn`. The options of a `--config` file come first, those that the command
    line also gives are left out. Raises `UsageError` for a flag that is unknown or lacks its value, and
    `ConfigError` naming the file.
    """
    given = _normalise(argv, own, warn)
    files = [token for token in given if token.startswith(CONFIG_FLAG + "=")] if CONFIG_FLAG in own else []
    if not files:
        return given
    if len(files) > 1:
        raise UsageError(f"{CONFIG_FLAG} was given more than once")
    given.remove(files[0])
    return _from_file(files[0].removeprefix(CONFIG_FLAG + "="), given, own, warn) + given


def _from_file(
    path: str, given: Sequence[str], own: Mapping[str, str], warn: Callable[[str], None]
) -> list[str]:
    """The options of the file that are not among the `given` ones."""
    overridden = {_option(token) if token.startswith("-") else "model" for token in given}
    out: list[str] = []
    for key, value in read_config(path).items():
        name = key.replace("_", "-")
        try:
            if f"--{name}" == CONFIG_FLAG:
                raise UsageError("a file cannot name another one")
            kind = own.get(f"--{name}") or _ignored_kind(f"--{name}")
            tokens = _normalise(option_words(name, value, kind == "list"), own, warn)
        except ConfigError as error:
            raise UsageError(f"{CONFIG_FLAG} {path}: {key}: {error}") from error
        out += [token for token in tokens if _option(token) not in overridden]
    return out


def _option(token: str) -> str:
    """`--no-enable-x` and `--enable-x=1` are one option: enable-x."""
    return token.partition("=")[0].lstrip("-").removeprefix("no-")


def _normalise(argv: Sequence[str], own: Mapping[str, str], warn: Callable[[str], None]) -> list[str]:
    out: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    warned: set[str] = set()
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            rest.insert(0, token)
            break
        if not _is_flag(token):
            out.append(token)
            continue
        flag, value = _split_flag(token, own)
        base, _, key = flag.partition(".")
        kind = own.get(flag) or (own.get(base) if own.get(base) == "json" else _ignored_kind(flag))
        if kind is None:
            raise UsageError(_unknown_flag(flag, own))
        if kind == "switch" and value is not None:
            raise UsageError(f"{flag} takes no value, got {value!r}")
        values = [] if value is None else [value]
        if kind != "switch" and not values:
            if rest and not _is_flag(rest[0]):
                values.append(rest.pop(0))
            elif kind != "optional":
                raise UsageError(f"{flag} needs a value")
        while kind == "list" and rest and not _is_flag(rest[0]):
            values.append(rest.pop(0))
        if kind == "json":
            _merge(objects.setdefault(base, {}), base, key, values[0])
        elif flag in own:
            for each in values:
                # A short flag is followed by its value: with "=" that would become part of the value.
                out += [f"{flag}={each}"] if flag.startswith("--") else [flag, each]
            if not values:
                out.append(flag)
        else:
            _check_ignored(flag, values)
            if flag.removeprefix("--") not in PARALLEL_FLAGS and flag not in warned:
                warned.add(flag)
                warn(_ignored_warning(flag))
    return [*out, *(f"{flag}={json.dumps(found)}" for flag, found in objects.items()), *rest]


def _merge(found: dict[str, Any], flag: str, key: str, text: str) -> None:
    """Adds `--flag.a.b 1` or `--flag '{"a": {"b": 1}}'` to the object that `found` holds for the flag."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text  # `--flag.name word` needs no quotes
    names = key.split(".") if key else []
    for name in reversed(names):
        value = {name: value}
    if not isinstance(value, dict):
        raise UsageError(f"{flag} needs a JSON object, got {text[:200]!r}")
    _update(found, value)


def _update(found: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        inner = found.get(name)
        if isinstance(inner, dict) and isinstance(value, dict):
            _update(inner, value)
        else:
            found[name] = value


def _is_flag(token: str) -> bool:
    # As argparse sees it: a negative number or a name with a space in it is a value.
    name = token.partition("=")[0]
    return len(token) > 1 and token[0] == "-" and " " not in name and not re.fullmatch(r"-\.?\d.*", name)


def _split_flag(token: str, own: Mapping[str, str]) -> tuple[str, str | None]:
    """`--a_b.c=1` -> (`--a-b.c`, `1`), `-tp=2` -> (`--tensor-parallel-size`, `2`), `-O3` likewise.

    A short flag of the command's own is not taken for vLLM's abbreviation of another.
    """
    flag, equals, value = token.partition("=")
    if re.fullmatch(r"-O\d", flag):
        return OTHER_SPELLINGS["-O"], flag[2:]
    name, dot, key = flag.partition(".")
    if name.startswith("--"):
        name = name.replace("_", "-")
    flag = (name if name in own else OTHER_SPELLINGS.get(name, name)) + dot + key
    return ("--help" if flag == "--help" else flag), (value if equals and flag != "--help" else None)


def _ignored_kind(flag: str) -> str | None:
    # `--compilation-config.mode 3` sets one key of a JSON flag.
    name = flag.removeprefix("--").partition(".")[0]
    if name in IGNORED_LISTS:
        return "list"
    if name in IGNORED_VALUE_FLAGS or name in PARALLEL_FLAGS:
        return "value"
    if name == "hf-token":
        return "optional"
    return "switch" if name.removeprefix("no-") in IGNORED_SWITCHES else None


def _ignored_warning(flag: str) -> str:
    return f"{flag} {IGNORED_BECAUSE.get(flag.removeprefix('--'), 'is a vLLM flag that has no effect here')}"


def _check_ignored(flag: str, values: Sequence[str]) -> None:
    """Refuse what vLLM refuses too, or what asks for several GPUs, though the flag is ignored."""
    if flag.removeprefix("--") in PARALLEL_FLAGS and values[0].strip() != "1":
        raise UsageError(f"{flag} must be 1 (one model runs on one device here), got {values[0]}")


def _unknown_flag(flag: str, own: Mapping[str, str]) -> str:
    names = (*IGNORED_VALUE_FLAGS, *IGNORED_SWITCHES, *IGNORED_LISTS, *PARALLEL_FLAGS)
    known = [*own, *(f"--{name}" for name in names)]
    # Own flags first: of two equally near names the one that does something helps more.
    near = difflib.get_close_matches(flag, list(own), 1, 0.75) or difflib.get_close_matches(
        flag, known, 1, 0.75
    )
    return f"unknown flag {flag}" + (f", did you mean {near[0]}?" if near else "")
