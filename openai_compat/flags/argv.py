"""Reads a command line the way `vllm serve` 0.33 does, and brings it into the form that Typer reads.

A script written for vLLM starts unchanged: `_` and `-` are the same, `-tp` is short for
`--tensor-parallel-size`, a long flag may be cut short where that is not ambiguous, `--disable-x` is
`--no-enable-x`, a flag may take several values, keys of a JSON flag may follow a dot, and options may come
from a file. A flag of vLLM that only tunes is dropped with a warning, one that would change what is served is
an error, and so is a flag that vLLM does not know either. The table is `runtime/options/vllm_flags.tsv`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microvllm.runtime.errors import ConfigError
from microvllm.runtime.options import vllm_flags
from microvllm.runtime.options.flag import human_int

CONFIG_FLAG = "--config"
# Commands with this switch take vLLM's engine and server flags, the others only their own.
IGNORE_FLAG = "--ignore-unsupported-flags"


class UsageError(ConfigError):
    """A flag is unknown, lacks its value or has a wrong one."""


@dataclass(frozen=True)
class _Given:
    """Parsed words: those for Typer, and the last values of each flag that has no option here.

    A switch has the value "true" or "false".
    """

    words: list[str] = field(default_factory=list)
    without_option: dict[str, list[str]] = field(default_factory=dict)


def normalise_argv(argv: Sequence[str], own: Mapping[str, str], warn: Callable[[str], None]) -> list[str]:
    """Bring vLLM's spellings of flags into the one form that Typer reads.

    `own` maps each flag of the command to its kind: "value", "list" (several values), "json" (an object) or
    "switch". In the result underscores in flag names are dashes, each value is joined to its long flag with
    "=", a list flag is repeated for each value, an object is whole, and vLLM's flags that have no effect here
    are gone, each reported to `warn`. The options of a `--config` file come first, those that the command
    line also gives are left out. Raises `UsageError` for a flag that is unknown, lacks its value or would
    change what is served, and `ConfigError` naming the file.
    """
    spellings = _spellings(own)
    given = _read(argv, own, spellings)
    files = [word for word in given.words if word.startswith(CONFIG_FLAG + "=")] if CONFIG_FLAG in own else []
    if len(files) > 1:
        raise UsageError(f"{CONFIG_FLAG} was given more than once")
    words, without_option = given.words, given.without_option
    if files:
        words.remove(files[0])
        from_file = _from_file(files[0].removeprefix(CONFIG_FLAG + "="), given, own, spellings)
        words = from_file.words + words
        without_option = from_file.without_option | without_option
    _check(words, without_option, warn)
    return words


def _from_file(path: str, given: _Given, own: Mapping[str, str], spellings: Mapping[str, str]) -> _Given:
    """Read the options of the file that are not among the `given` ones."""
    overridden = {_option(word) if word.startswith("-") else "model" for word in given.words}
    found = _Given()
    for key, value in _read_config(path).items():
        name = key.replace("_", "-")
        try:
            if f"--{name}" == CONFIG_FLAG:
                raise UsageError("a file cannot name another one")
            takes_several = "list" in (own.get(f"--{name}"), vllm_flags.KINDS.get(name))
            entry = _read(option_words(name, value, takes_several), own, spellings)
        except ConfigError as error:
            raise UsageError(f"{CONFIG_FLAG} {path}: {key}: {error}") from error
        found.words.extend(word for word in entry.words if _option(word) not in overridden)
        found.without_option.update(entry.without_option)
    return found


def _option(word: str) -> str:
    """Return the option of a word: `--no-enable-x` and `--enable-x=1` are both enable-x."""
    return word.partition("=")[0].lstrip("-").removeprefix("no-")


def _read(argv: Sequence[str], own: Mapping[str, str], spellings: Mapping[str, str]) -> _Given:
    given = _Given()
    objects: dict[str, dict[str, Any]] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            rest.insert(0, word)
            break
        if not _is_flag(word):
            given.words.append(word)
            continue
        spelled, key, value = _split_flag(word)
        flag = _resolve(spelled, own, spellings)
        kind = own.get(flag) or vllm_flags.KINDS[_positive(flag)]
        if key and (kind in ("switch", "list") or (flag in own and kind != "json")):
            raise UsageError(f"unknown flag {spelled}.{key}")
        if kind == "switch" and value is not None:
            raise UsageError(f"{flag} takes no value, got {value!r}")
        values = [] if value is None else [value]
        if kind != "switch" and not values:
            if rest and not _is_flag(rest[0]):
                values.append(rest.pop(0))
            elif kind != "optional":
                raise UsageError(f"{flag}{key and '.' + key} needs a value")
        while kind == "list" and rest and not _is_flag(rest[0]):
            values.append(rest.pop(0))
        if kind == "json":
            _merge(objects.setdefault(flag, {}), flag, key, values[0])
        elif flag in own:
            for each in values:
                # A short flag is followed by its value: with "=" that would become part of the value.
                given.words.extend([f"{flag}={each}"] if flag.startswith("--") else [flag, each])
            if not values:
                given.words.append(flag)
        elif kind == "switch":
            given.without_option[_positive(flag)] = [json.dumps(_positive(flag) == flag.lstrip("-"))]
        else:
            for name, setting in _settings(flag.lstrip("-"), key, values):
                earlier = given.without_option.get(name, []) if kind == "list" else []
                given.without_option[name] = earlier + setting
    given.words.extend(f"{flag}={json.dumps(found)}" for flag, found in objects.items())
    given.words.extend(rest)
    return given


def _is_flag(word: str) -> bool:
    # As in argparse, a negative number or a name with a space in it is a value.
    name = word.partition("=")[0]
    return len(word) > 1 and word[0] == "-" and " " not in name and not re.fullmatch(r"-\.?\d.*", name)


def _split_flag(word: str) -> tuple[str, str, str | None]:
    """Split a word into flag, key and value.

    `--a_b.c=1` gives (`--a-b`, `c`, `1`), `--help=all` (`--help`, ``, None) and `-O3` (`-O`, ``, `3`).
    """
    flag, equals, value = word.partition("=")
    if re.fullmatch(r"-O\w+", flag):
        return "-O", "", flag[2:]
    name, _, key = flag.partition(".")
    if name.startswith("--"):
        name = name.replace("_", "-")
    return name, key, (value if equals and name != "--help" else None)


def _spellings(own: Mapping[str, str]) -> dict[str, str]:
    """Map each spelling that the command takes to its flag, of `own` or of vLLM.

    A short flag of the command's own is not taken for vLLM's abbreviation of another.
    """
    flags = dict(own)
    if IGNORE_FLAG in own:
        for name, kind in vllm_flags.KINDS.items():
            flags.setdefault(f"--{name}", kind)
            if kind == "switch":
                flags.setdefault(f"--no-{name}", kind)
    spellings = {flag: flag for flag in flags}
    for flag, kind in flags.items():
        negative, inverse = f"--no-{flag[2:]}", _inverse(flag)
        if kind == "switch" and negative in flags and inverse is not None:
            spellings.setdefault(inverse, negative)
            spellings.setdefault(f"--no-{inverse[2:]}", flag)
    for short, flag in vllm_flags.OTHER_SPELLINGS.items():
        if flag in flags:
            spellings.setdefault(short, flag)
    return spellings


def _resolve(spelled: str, own: Mapping[str, str], spellings: Mapping[str, str]) -> str:
    """Return the flag of a spelling or of its unambiguous beginning. Raises `UsageError` if there is none."""
    if spelled in spellings:
        return spellings[spelled]
    longer = sorted(name for name in spellings if spelled.startswith("--") and name.startswith(spelled))
    meanings = {spellings[name] for name in longer}
    if len(meanings) == 1:
        return meanings.pop()
    if meanings:
        raise UsageError(f"{spelled} is ambiguous: it may be {', '.join(longer[:6])}")
    # Own flags first: of two equally near names the one that does something helps more.
    near = difflib.get_close_matches(spelled, list(own), 1, 0.75)
    near = near or difflib.get_close_matches(spelled, list(spellings), 1, 0.75)
    raise UsageError(f"unknown flag {spelled}" + (f", did you mean {near[0]}?" if near else ""))


def _inverse(flag: str) -> str | None:
    """Turn `--enable-x` into `--disable-x` and back; None for other flags."""
    for prefix, other in (("--enable-", "--disable-"), ("--disable-", "--enable-")):
        if flag.startswith(prefix):
            return other + flag.removeprefix(prefix)
    return None


def _positive(flag: str) -> str:
    """Turn `--no-x` and `--x` into `x`, for a flag of vLLM; some names begin with "no-" themselves."""
    name = flag.removeprefix("--")
    return name if name in vllm_flags.KINDS else name.removeprefix("no-")


def _settings(name: str, key: str, values: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield what a flag without an option sets: itself, or those of its keys that have a row of their own."""
    listed = [each for each in vllm_flags.REFUSED if each.startswith(f"{name}.")]
    found: dict[str, Any] = {}
    if not key:
        yield name, list(values)
    if listed:
        _merge_if_object(found, key, values[0])
        for each in listed:
            value = found.get(each.partition(".")[2])
            if value is not None:
                yield each, [value if isinstance(value, str) else json.dumps(value)]
    if key:
        yield name, [f"{key}={value}" for value in values]


def _merge(found: dict[str, Any], flag: str, key: str, text: str) -> None:
    """Add `--flag.a.b 1` or `--flag '{"a": {"b": 1}}'` to the object that `found` holds for the flag."""
    if not _merge_if_object(found, key, text):
        raise UsageError(f"{flag} needs a JSON object, got {text[:200]!r}")


def _merge_if_object(found: dict[str, Any], key: str, text: str) -> bool:
    value: Any
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = human_int(text)  # `--flag.name 80g`
        except ValueError:
            value = text  # `--flag.name word` needs no quotes
    if key.endswith("+"):
        value = text.split(",")
    names = key.removesuffix("+").split(".") if key else []
    for name in reversed(names):
        value = {name: value}
    if not isinstance(value, dict):
        return False
    _update(found, value)
    return True


def _update(found: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        inner = found.get(name)
        if isinstance(inner, dict) and isinstance(value, dict):
            _update(inner, value)
        elif isinstance(inner, list) and isinstance(value, list):
            inner.extend(value)
        else:
            found[name] = value


def _check(
    words: Sequence[str], without_option: Mapping[str, list[str]], warn: Callable[[str], None]
) -> None:
    """Warn of each flag without effect. Raises `UsageError` naming those that would change the service."""
    asking = {name: values for name, values in without_option.items() if _asks(name, values)}
    for name, other in vllm_flags.NEEDS.items():
        if asking.get(name) == ["true"] and other not in asking and f"--{other}" not in words:
            raise UsageError(f"--{name} needs --{other}")
    last = [word for word in words if word.endswith(IGNORE_FLAG.removeprefix("-"))][-1:]
    ignoring = last == [IGNORE_FLAG]
    problems = []
    for name, values in asking.items():
        refused = vllm_flags.REFUSED.get(name)
        if refused is None:
            shown = f"--no-{name}" if values == ["false"] else f"--{name}"
            because = vllm_flags.IGNORED_BECAUSE.get(name)
            warn(f"{shown} is ignored: {because}" if because else f"{shown} has no effect here")
            continue
        shown = " ".join([f"--{name}", *(values if refused.kind != "switch" else ())])[:200]
        if ignoring and not refused.always:
            warn(f"{shown} is ignored: it would {refused.changes}")
        else:
            problems.append((refused, f"{shown} (it would {refused.changes})"))
    if problems:
        ignorable = not any(refused.always for refused, _ in problems)
        raise UsageError(
            f"not supported: {', '.join(shown for _, shown in problems)}",
            remedy="leave it out" + (f", or start without it with {IGNORE_FLAG}" if ignorable else ""),
        )


def _asks(name: str, values: Sequence[str]) -> bool:
    """Return whether a flag sets something. One that only tunes always does, since each gets its warning."""
    refused = vllm_flags.REFUSED.get(name)
    if refused is None:
        return True
    if refused.kind == "switch":
        return values == ["true"]
    neutral = (*vllm_flags.ASKS_FOR_NOTHING, *refused.neutral)
    return any(value.strip().lower() not in neutral for value in values)


def _read_config(path: str) -> dict[str, Any]:
    """Read the options of a YAML file: names of flags without their dashes, and values.

    Raises `ConfigError` naming the file.
    """
    import yaml

    where = f"--config {path}"
    if not path.endswith((".yaml", ".yml")):
        raise ConfigError(f"{where}: must be a .yaml or .yml file")
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{where}: {reason}") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{where}: not readable as YAML ({reason})") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) and key for key in content):
        raise ConfigError(f"{where}: must hold names of options and their values")
    return content


def option_words(name: str, value: Any, takes_several: bool) -> list[str]:
    """Return one entry as words of the command line. Raises `ConfigError` for an entry without a value.

    True and false are a switch and its `no-` form. A list becomes several values where the flag takes them,
    else JSON, as an object does.
    """
    if value is None:
        raise ConfigError("has no value")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list) and takes_several:
        return [f"--{name}={item}" for item in value]
    if isinstance(value, (dict, list)):
        try:
            return [f"--{name}={json.dumps(value)}"]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"cannot be written as JSON ({error})") from error
    return [f"--{name}={value}"]
