"""Computes the least time of a run on a GPU: that of reading the weights and the KV cache once per step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READ_BYTES_S = {"H100": 3.1e12, "H200": 4.594e12}
"""Bytes a second that a kernel which only reads 8 GB reaches, measured, by a part of the GPU's name."""

OTHER_SIZES = {"num_experts", "num_local_experts", "quantization_config", "sliding_window_pattern"}
"""Keys of models that do not read all their weights or cache in a step, or not in 16 bits."""


def read_rate(gpu: str) -> float | None:
    """The entry of a GPU's name, if that GPU was measured."""
    return next((rate for part, rate in READ_BYTES_S.items() if part in gpu), None)


@dataclass(frozen=True, slots=True)
class Floor:
    weights: int
    """Bytes of weights that a decode step reads: all but an embedding table that is not the head, too."""
    kv: int
    """Bytes of keys and values of one token."""
    bytes_s: float
    """Bytes a second that the GPU reads."""

    @classmethod
    def of(cls, model: Path, gpus: Sequence[str], bytes_s: float | None = None) -> Floor | None:
        """Of a dense model in 16 bits; None for another, and on a GPU whose read rate is not known."""
        rate = bytes_s or (read_rate(gpus[0]) if gpus else None)
        config = model / "config.json"
        if rate is None or not config.exists():
            return None
        fields = json.loads(config.read_text())
        full = {"full_attention"}.issuperset(fields.get("layer_types") or ())
        if OTHER_SIZES & fields.keys() or not full:
            return None
        try:
            return cls(weight_bytes(fields), kv_bytes(fields), rate)
        except KeyError:
            return None

    def seconds(self, inputs: Sequence[int], outputs: Sequence[int], concurrency: int) -> float:
        """The least time of these requests, `concurrency` at a time; prompts count nothing."""
        # The first token of a request comes with its prompt.
        steps = max(max(outputs) - 1, sum(n - 1 for n in outputs) / concurrency)
        cached = sum(
            (2 * before + after) * (after - 1) / 2 for before, after in zip(inputs, outputs, strict=True)
        )
        return (steps * self.weights + cached * self.kv) / self.bytes_s


def weight_bytes(config: dict[str, Any]) -> int:
    """See `Floor.weights`. Raises `KeyError` for a configuration without its numbers."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or hidden // heads
    layer = hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden + 3 * hidden * width
    return 2 * int(config["num_hidden_layers"] * layer + config["vocab_size"] * hidden)


def kv_bytes(config: dict[str, Any]) -> int:
    """See `Floor.kv`."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * int(config["num_hidden_layers"] * config["num_key_value_heads"] * dim)
