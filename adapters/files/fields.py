"""Checked reads from the key-value part of a model file, so that every complaint names file and key.

Imports no torch.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from microvllm.adapters.errors import ModelFileError

logger = logging.getLogger("microvllm.model")

MAX_SIZE = (1 << 31) - 1  # no dimension of a dense model is near this; larger values are damage
MAX_LAYERS = 1 << 12
MAX_EXPERTS = 1 << 14  # each of a layer is a part of its own, of which a list is made before any is read
MAX_NUMBER = 1e12
MAX_ROPE_FACTOR = 1e4


class Fields:
    """One mapping of a model file: `config.json`, a part of it, or the metadata of a GGUF file.

    A null value counts as absent. `where` is put before the key in messages ("rope_scaling.", "llama.").
    Every reader raises `ModelFileError` for a value of the wrong type or range.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], where: str = "") -> None:
        self.path = path
        self.where = where
        self._values = {key: value for key, value in values.items() if value is not None}
        self._nulls = values.keys() - self._values.keys()
        self.read: set[str] = set()  # keys that were asked for

    def __contains__(self, key: str) -> bool:
        self.read.add(key)
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    @property
    def values(self) -> Mapping[str, Any]:
        """All of them; a null may differ from leaving the key out: see `is_null`."""
        return {**self._values, **dict.fromkeys(self._nulls)}

    def with_value(self, key: str, value: Any) -> Fields:
        """The same mapping, in which a key has this value; what is read of it counts as read of this."""
        changed = Fields(self.path, {**self.values, key: value}, self.where)
        changed.read = self.read
        return changed

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is, or the default."""
        self.read.add(key)
        return self._values.get(key, default)

    def is_null(self, key: str) -> bool:
        """Whether the key is written as null, for the few where that differs from leaving it out."""
        return key in self._nulls

    def error(self, key: str, problem: str) -> ModelFileError:
        """The error to raise about one key."""
        return ModelFileError(self.path, f"{self.where}{key} {problem}")

    def size(
        self, key: str, default: int | None = None, *, at_least: int = 1, at_most: int = MAX_SIZE
    ) -> int:
        """An integer within the bounds; without a default it must be there."""
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if type(value) is not int or not at_least <= value <= at_most:
            kind = "a positive integer" if at_least == 1 else f"an integer of at least {at_least}"
            limit = f" and at most {at_most}" if at_most < MAX_SIZE else ""
            raise self.error(key, f"must be {kind}{limit}, got {shorten(value)}")
        return value

    def number(
        self, key: str, default: float | None = None, *, at_least: float = 0.0, at_most: float = MAX_NUMBER
    ) -> float:
        """A finite number above zero and within the bounds; without a default it must be there."""
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if type(value) not in (int, float) or not 0 < value <= at_most or value < at_least:
            bounds = f"in [{at_least:g}, {at_most:g}]" if at_least else "above 0"
            raise self.error(key, f"must be a finite number {bounds}, got {shorten(value)}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; a null, which other readers take for false, is not taken for a default of true."""
        value = None if default and self.is_null(key) else self.get(key, default)
        if type(value) is not bool:
            raise self.error(key, f"must be true or false, got {shorten(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if type(value) is not str:
            raise self.error(key, f"must be a string, got {shorten(value)}")
        return value

    def part(self, key: str) -> Fields | None:
        """A nested mapping, or None if it is absent or empty."""
        value = self.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, got {shorten(value)}")
        return Fields(self.path, value, f"{self.where}{key}.")

    def token_id(self, key: str, vocab_size: int) -> int | None:
        """A token id below `vocab_size`, or None; of a list the first."""
        ids = self.token_ids(key, vocab_size)
        return ids[0] if ids else None

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids below `vocab_size`, from one integer or a list of them.

        Others (-1 for "none", padding beyond the vocabulary) name no token that could ever be seen or
        generated: they are ignored with a warning, and null is ignored without one.
        """
        value = self.get(key)
        ids = [token for token in (value if isinstance(value, list) else [value]) if token is not None]
        for token in ids:
            if type(token) is not int:
                raise self.error(key, f"must be a token id, got {shorten(token)}")
            if not 0 <= token < vocab_size:
                warn_once(
                    f"{self.path}: {self.where}{key} {shorten(token)} is ignored: "
                    f"the vocabulary has {vocab_size} tokens"
                )
        return tuple(token for token in ids if 0 <= token < vocab_size)


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning; the same file is read for the model and for the tokenizer."""
    logger.warning("%s", message)


def shorten(value: object) -> str:
    """A value for an error message: one line, at most 60 characters, whatever was in the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) > 10**40:
        return "an integer of more than 40 digits"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."
