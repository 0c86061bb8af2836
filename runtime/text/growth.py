"""Bounds how much longer the rules of a model's tokenizer make a text. Imports no torch."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.fields import shorten

# Of a character. Unicode's compatibility decomposition makes one 18, which are 33 bytes.
MAX_GROWTH = 256
MAX_TOKEN_CHARS = 16_384  # those of real vocabularies have some hundreds
CHILDREN = ("normalizers", "decoders")
SIZE_BYTES = 4  # in front of the two parts of SentencePiece's table: the size of the first


def check_growth(backend: Backend, file: Path) -> None:
    """Raise `ModelFileError` for rules or tokens with which a short text would fill the memory."""
    for name in ("normalizer", "decoder"):
        rule = getattr(backend, name)
        growth = 1 if rule is None else _growth(json.loads(rule.__getstate__()))
        if growth > MAX_GROWTH:
            problem = f"its {name} makes {growth} characters of one, more than {MAX_GROWTH}"
            raise ModelFileError(file, f"is not a usable tokenizer: {problem}")
    longest = max(backend.get_vocab(with_added_tokens=True), key=len, default="")
    if len(longest) > MAX_TOKEN_CHARS:
        problem = f"has {len(longest)} characters, more than {MAX_TOKEN_CHARS}"
        raise ModelFileError(file, f"is not a usable tokenizer: token {shorten(longest)} {problem}")


def _growth(rule: dict[str, Any]) -> int:
    """Return how many characters, or bytes if these are stored, a rule makes of one at most."""
    total = 1
    for child in (each for name in CHILDREN for each in rule.get(name) or ()):
        total *= _growth(child)
    if rule["type"] == "Replace":
        text = rule["pattern"].get("String")
        # An empty match stands beside every character.
        total = len(rule["content"]) + 1 if not text else -(-len(rule["content"]) // len(text))
    elif rule["type"] == "Prepend":
        total = len(rule["prepend"]) + 1
    elif rule["type"] == "Precompiled":
        table = base64.b64decode(rule["precompiled_charsmap"])
        start = SIZE_BYTES + int.from_bytes(table[:SIZE_BYTES], "little")
        total = max(map(len, table[start:].split(b"\0")), default=1)
    return max(1, total)
