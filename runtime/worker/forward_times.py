"""Tells the parts of a forward pass apart where the host computes it; a GPU works behind the host's clock."""

from __future__ import annotations

from microvllm.adapters.decoder import DecoderModel
from microvllm.ops.attention import AttentionBackend, AttentionBatch, StepAttention
from microvllm.runtime.worker.step_clock import StepClock


class TimedAttention:
    """An attention backend whose time the clock takes: q/k norms, rotation, KV write and attention."""

    def __init__(self, backend: AttentionBackend, clock: StepClock) -> None:
        self._backend = backend
        self._clock = clock

    def begin_step(self, batch: AttentionBatch) -> StepAttention:
        return self._clock.timed("attention", self._backend.begin_step(batch))


def time_forward(model: DecoderModel, attention: AttentionBackend, clock: StepClock) -> AttentionBackend:
    """Let the clock time the model's embedding and head (the last norm and the logits) -> timed attention."""
    model.embed = clock.timed("embedding", model.embed)
    model.head = clock.timed("head", model.head)
    return TimedAttention(attention, clock)
