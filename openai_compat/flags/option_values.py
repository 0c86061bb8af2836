"""How the values of command-line options are read: sizes, JSON, templates that may be files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import typer

from microvllm.runtime.errors import ConfigError

OBJECT = "{JSON}"  # the metavar of options whose keys may follow a dot: `--option.key value`
DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def human_int(text: str) -> int:
    """`4096`, `1k` = 1000, `25.6k` = 25600, `1K` = 1024: as vLLM reads sizes. Raises `typer.BadParameter`."""
    match = re.fullmatch(r"([+-]?\d+)(\.\d+)?([kKmMgGtT]?)", str(text).strip())
    if match is None or (match[2] and match[3] not in DECIMAL):
        raise typer.BadParameter(
            f"{text!r} is not a whole number (1k = 1000 and 1K = 1024 are understood, 25.6k too)"
        )
    whole, fraction, suffix = match[1], match[2] or "", match[3]
    if suffix not in DECIMAL:
        return int(whole) * BINARY.get(suffix, 1)
    # Digits are shifted, not multiplied as floats: 25.6k must be 25600 and not 25599.
    factor = DECIMAL[suffix]
    parts: int = 10 ** len(fraction[1:])
    scaled = int(whole + fraction[1:]) * factor
    if scaled % parts:
        raise typer.BadParameter(f"{text!r} is not a whole number")
    return scaled // parts


def queue_length(text: str) -> int | str:
    """A number of requests, or `auto`."""
    return "auto" if str(text).strip().lower() == "auto" else human_int(text)


def context_length(text: str) -> int:
    """Like `human_int`; `auto` and -1 (as long as the model and the KV cache allow) give -1."""
    return -1 if str(text).strip().lower() == "auto" else human_int(text)


def share(text: str) -> float:
    """A number above 0 and at most 1. Raises `typer.BadParameter`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:  # false for nan, too
        raise typer.BadParameter(f"{text!r} is not a number above 0 and at most 1")
    return value


def keys_of(path: str | None) -> tuple[str, ...]:
    """The API keys in a file, one a line; none without a file. Raises `ConfigError`."""
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-key-file {path}: {getattr(error, 'strerror', None) or error}") from error
    if not keys:
        raise ConfigError(f"--api-key-file {path}: holds no key")
    return keys


def json_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises `typer.BadParameter`."""
    value = _json(text)
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{_shown(text)} is not a JSON object")
    return value


def json_strings(text: str) -> tuple[str, ...]:
    """A JSON list of strings, such as `["https://example.com"]`. Raises `typer.BadParameter`."""
    value = _json(text)
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise typer.BadParameter(f"{_shown(text)} is not a JSON list of strings")
    return tuple(value)


def comma_list(text: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b")."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def chat_template_text(wish: str | None) -> str | None:
    """The text of `--chat-template`, which is a file or the template itself. Raises `ConfigError`."""
    if wish is None:
        return None
    try:
        return Path(wish).read_text("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the name
        if any(mark in wish for mark in "{}\n"):
            return wish
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"--chat-template {_shown(wish)}: {reason}, and it is no template either"
        ) from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise typer.BadParameter(f"{_shown(text)} is not JSON ({reason})") from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
