"""Tabulates the bytes that each token contributes to the text, for the fast detokenizer.

For two kinds of decoder the text of a sequence is the concatenation of its tokens' bytes, read as UTF-8:
byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece BPE with byte fallback (Llama 2, Mistral).
Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import decoders


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Bytes by token id. An id that is not in the vocabulary has none."""

    all: list[bytes]
    visible: list[bytes]  # the same, without the special tokens
    strips_space: bool  # one space at the very start of a text is not shown (SentencePiece's prefix)


def build_token_bytes(
    decoder: Any, vocab: Mapping[str, int], special_ids: Collection[int]
) -> TokenBytes | None:
    """Return the table for a `tokenizers` decoder, or None if its text is not a concatenation of bytes."""
    strips_space = False
    to_bytes: Callable[[str], bytes]
    chain: list[dict[str, Any]] = []
    if isinstance(decoder, decoders.Sequence):
        chain = json.loads(decoder.__getstate__())["decoders"]
    if isinstance(decoder, decoders.ByteLevel) or [link["type"] for link in chain] == ["ByteLevel"]:
        to_bytes = ByteLevelAlphabet().to_bytes
    elif chain:
        if chain[-1] == {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            strips_space = True
            chain = chain[:-1]
        if chain != _SENTENCEPIECE_CHAIN:
            return None
        to_bytes = _piece_bytes
    else:
        return None
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, index in vocab.items():
        table[index] = to_bytes(token)
    visible = table.copy()
    for index in special_ids:
        visible[index] = b""
    return TokenBytes(table, visible, strips_space)


_SENTENCEPIECE_CHAIN = [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _piece_bytes(token: str) -> bytes:
    """SentencePiece writes a space as U+2581, and a byte without a piece as "<0x0A>"."""
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte is not None:
        return bytes.fromhex(byte[1])
    return token.replace("\u2581", " ").encode("utf-8", "replace")


class ByteLevelAlphabet:
    """GPT-2's alphabet: each byte is one printable character (Radford et al., 2019).

    The bytes that are printable in Latin-1 stand for themselves, the others are U+0100, U+0101, ... in order.
    A token with a character outside the alphabet (an added token) is plain text.
    """

    def __init__(self) -> None:
        printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = [byte for byte in range(256) if byte not in printable]
        self._to_latin1 = {0x100 + index: byte for index, byte in enumerate(others)}
        self._from_latin1 = {byte: code for code, byte in self._to_latin1.items()}
        self._alphabet = frozenset(map(chr, [*printable, *self._to_latin1]))

    def to_bytes(self, token: str) -> bytes:
        if self._alphabet.issuperset(token):
            return token.translate(self._to_latin1).encode("latin-1")
        return token.encode("utf-8", "replace")

    def from_bytes(self, token: bytes) -> str:
        """Return how a vocabulary spells a token of these bytes."""
        return token.decode("latin-1").translate(self._from_latin1)
