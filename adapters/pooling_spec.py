"""Describes how the hidden states of a text become one vector. Imports no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

PoolingMethod = Literal["last", "mean", "first"]


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """How the hidden states of a text, behind the last norm, become one: one token's, or the mean of all.

    `normalize`: to length 1, unless a request decides otherwise. `matryoshka`: the sizes that a vector may be
    cut to (Kusupati et al., 2022, arXiv:2205.13147); empty for any, None if it must not be cut. `size`: what
    it is cut to if a request names none.
    """

    method: PoolingMethod = "last"
    normalize: bool = True
    matryoshka: tuple[int, ...] | None = None
    size: int | None = None

    @property
    def needs_all(self) -> bool:
        """Whether the hidden states of all tokens are needed, so that none may come from a cached prefix."""
        return self.method != "last"

    def size_problem(self, size: int, hidden_size: int) -> str | None:
        """Return why the vectors must not be cut to `size` numbers; None if they may be."""
        if self.matryoshka is None:
            return (
                "the model does not support Matryoshka embeddings (is_matryoshka or matryoshka_dimensions in "
                "its config.json or --hf-overrides)"
            )
        if not 1 <= size <= hidden_size:
            return f"the model's vectors have 1 to {hidden_size} dimensions"
        if self.matryoshka and size not in self.matryoshka:
            return f"the model's vectors can be cut to {', '.join(map(str, self.matryoshka))} dimensions"
        return None
