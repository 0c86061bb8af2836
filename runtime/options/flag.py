"""Describes a command-line flag on the field that it sets, and checks the values of such fields.

`EngineArgs` and `ServerArgs` declare each option once, with `flag()`: its default, section of `--help`, help
text and bounds. The command line, `--config` files and environment variables derive from that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from microvllm.runtime.errors import ConfigError

T = TypeVar("T")

# The sections of --help, in their order.
MODEL = "Model"
ANSWERS = "Requests and answers"
SCHEDULING = "Scheduling and KV cache"
MACHINE = "Machine"
SERVER = "Server"
ACCESS = "Access and encryption"
LOGS = "Logs"
OPTIONS = "Options"
SECTIONS = (MODEL, ANSWERS, SCHEDULING, MACHINE, SERVER, ACCESS, LOGS, OPTIONS)

OBJECT = "{JSON}"  # the metavar of flags whose keys may follow a dot: `--flag.key value`
AUTO_QUEUE = "auto"
DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A command-line flag, apart from the type and the default, which are its field's.

    `name` is without dashes and defaults to the field's; `spelled` replaces what follows from it, such as the
    `--no-` form of a switch. `low` and `high` (included), `above` (excluded) and `choices` bound the value.
    `read` makes it from the text and raises `ValueError`. Where the flag is missing, the first of the
    variables `env` that is set counts.
    """

    section: str
    help: str
    name: str = ""
    metavar: str | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    read: Callable[[str], Any] | None = None
    spelled: tuple[str, ...] = ()

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value, None if nothing is; None itself leaves the option undecided."""
        if isinstance(value, str):
            if self.choices and value not in self.choices:
                return f"must be one of {', '.join(self.choices)}, got {value}"
        elif isinstance(value, tuple):
            if not all(value):
                return "must not be empty"
        elif isinstance(value, (int, float)) and (bounds := self._bounds()) and not self._within(value):
            words = "".join(f", or {choice}" for choice in self.choices)
            return f"must be {bounds}{words}, got {value}"
        return None

    def _within(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
        )

    def _bounds(self) -> str:
        if self.low is not None and self.high is not None:
            return f"in [{self.low}, {self.high}]"
        bounds = (("at least", self.low), ("above", self.above), ("at most", self.high))
        return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)


def flag(default: T, section: str, text: str, **more: Any) -> T:
    """Declare a dataclass field with a default and a `Flag`; `more` are further fields of `Flag`."""
    metadata = {"flag": Flag(section, text, **more)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)  # type: ignore[return-value]
    return dataclasses.field(default=default, metadata=metadata)


def required_flag(section: str, text: str, **more: Any) -> Any:
    """Declare a field with a `Flag` and no default."""
    return dataclasses.field(metadata={"flag": Flag(section, text, **more)})


def flags_of(cls: Any) -> dict[str, Flag]:
    """Return the flags of a dataclass by the names of their fields; `Flag.name` is filled in."""
    found = {field.name: field.metadata["flag"] for field in dataclasses.fields(cls) if field.metadata}
    return {
        name: dataclasses.replace(flag, name=flag.name or name.replace("_", "-"))
        for name, flag in found.items()
    }


def check_flags(args: Any) -> None:
    """Raise `ConfigError` for the first field of a dataclass that is out of the bounds of its flag."""
    for name, flag in flags_of(args).items():
        problem = flag.problem(getattr(args, name))
        if problem is not None:
            raise ConfigError(f"--{flag.name} {problem}")


def given_flags(args: Any, names: Iterable[str]) -> list[str]:
    """Return the flags, of the fields that are named, whose value is not the default."""
    defaults = {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(args)
    }
    flags = flags_of(type(args))
    return [f"--{flags[name].name}" for name in names if getattr(args, name) != defaults[name]]


def human_int(text: str) -> int:
    """Read a size as vLLM does: `4096`, `1k` = 1000, `25.6k` = 25600, `1K` = 1024."""
    match = re.fullmatch(r"([+-]?\d+)(\.\d+)?([kKmMgGtT]?)", str(text).strip())
    if match is None or (match[2] and match[3] not in DECIMAL):
        raise ValueError(
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
        raise ValueError(f"{text!r} is not a whole number")
    return scaled // parts


def optional_text(text: str) -> str | None:
    """Read a value that may be None, which vLLM's flags spell so."""
    return None if text.lower() in ("", "none") else text


def context_length(text: str) -> int | None:
    """Read a size in tokens; None for `auto` and -1: as long as the model and the KV cache allow."""
    length = None if str(text).strip().lower() == "auto" else human_int(text)
    return None if length == -1 else length


def queue_length(text: str) -> int | str:
    """Read a number of requests, or `auto`."""
    return AUTO_QUEUE if str(text).strip().lower() == AUTO_QUEUE else human_int(text)


def json_value(text: str) -> Any:
    """Read any JSON value."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise ValueError(f"{shortened(text)} is not JSON ({reason})") from None


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    value = json_value(text)
    if not isinstance(value, dict):
        raise ValueError(f"{shortened(text)} is not a JSON object")
    return value


def shortened(text: str) -> str:
    """Quote a text for an error message, at most 200 characters of it."""
    return repr(text if len(text) <= 200 else text[:200] + "...")
