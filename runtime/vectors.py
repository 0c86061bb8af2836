"""Turns what the engine pooled into the vector that a request asks for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from microvllm.adapters.spec import ModelSpec
from microvllm.runtime.errors import EngineError, InvalidRequestError
from microvllm.runtime.request import SamplingParams

# What the engine is sent for a text: it ends when its prompt is computed, so that nothing is sampled.
POOLING_PARAMS = SamplingParams(temperature=0.0, max_tokens=1)
MIN_LENGTH = 1e-12  # a shorter vector is divided by this, as in torch's normalize


@dataclass(frozen=True)
class VectorForm:
    """The requested form of vectors: the first `size` numbers (None: all), of length 1 or not."""

    size: int | None
    normalize: bool

    @classmethod
    def of(cls, spec: ModelSpec, dimensions: int | None, use_activation: bool | None) -> VectorForm:
        """Read the fields of a request over the model's defaults. Raises `InvalidRequestError` naming one."""
        pooling = spec.pooling
        if pooling is None:
            raise InvalidRequestError("this model generates texts: embeddings need --runner pooling", "model")
        if dimensions is None:
            dimensions = pooling.size
        elif problem := pooling.size_problem(dimensions, spec.hidden_size):
            raise InvalidRequestError(f"dimensions={dimensions}: {problem}.", "dimensions")
        return cls(dimensions, pooling.normalize if use_activation is None else use_activation)

    def read(self, pooled: bytes | None) -> np.ndarray:
        """pooled: [hidden] float32, as in `StepOutput` -> [size] float32. Raises `EngineError` for None."""
        if pooled is None:
            raise EngineError("the engine ended a request without its vector")
        vector = np.frombuffer(pooled, np.float32)[: self.size]
        if not self.normalize:
            return vector
        length = max(float(np.linalg.norm(vector.astype(np.float64))), MIN_LENGTH)
        normal: np.ndarray = (vector / length).astype(np.float32)
        return normal


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """The cosine of the angle between two vectors, 0 where one has no direction."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = max(float(np.linalg.norm(a)), MIN_LENGTH) * max(float(np.linalg.norm(b)), MIN_LENGTH)
    return float(np.clip(a @ b / lengths, -1.0, 1.0))
