"""`LLMEngine`: vLLM's engine step by step: add requests, call `step` until none is unfinished."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.metrics.metric_families import EngineCollector, Metric, read_metrics
from microvllm.runtime.offline.core_thread import OfflineSequence
from microvllm.runtime.offline.prompts import OfflinePrompt, Prompt, read_prompt
from microvllm.runtime.offline.request_output import OutputBuilder, RequestOutput
from microvllm.runtime.offline.sampling_params import RequestOutputKind, SamplingParams
from microvllm.runtime.request import SamplingParams as EngineParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What users read of vLLM's `model_config`."""

    model: str
    tokenizer: str
    max_model_len: int
    dtype: str
    seed: int
    runner_type: str = "generate"


class LLMEngine:
    """Wraps an `InferenceEngine`; `step` returns `RequestOutput`s as each request's `output_kind` says.

    The requests of one `LLMEngine` belong to one thread; those of `LLM.generate` are apart from them.
    """

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self._run = engine.open_run()
        weakref.finalize(self, self._run.post, self._run.close_message())
        self._builders: dict[str, OutputBuilder] = {}
        self._owners: dict[OfflineSequence, OutputBuilder] = {}
        self._tokenizer: PreTrainedTokenizerFast | None = None

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        fields = dataclasses.asdict(engine_args)
        return cls(InferenceEngine(fields.pop("model"), fields.pop("max_num_seqs"), **fields))

    @property
    def model_config(self) -> ModelInfo:
        config = self.engine.config
        runner = "generate" if config.spec.pooling is None else "pooling"
        paths = config.model, config.tokenizer_path
        return ModelInfo(*paths, config.max_model_len, config.dtype, config.seed, runner)

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the model's tokenizer as one of transformers'; made at the first call."""
        if self._tokenizer is None:
            from microvllm.runtime.text.hf_tokenizer import as_transformers

            self._tokenizer = as_transformers(self.engine.tokenizer, self.engine.config.max_model_len)
        return self._tokenizer

    def get_metrics(self) -> list[Metric]:
        """Return the metrics since the start, under the names of /metrics."""
        engine = self.engine
        collector = EngineCollector([engine.metrics], engine.config.model, engine.config)
        return engine.call(lambda: read_metrics(collector.collect()))

    def reset_prefix_cache(self) -> bool:
        self.engine.call(self.engine.core.reset_prefix_cache)
        return True

    # ---- requests ------------------------------------------------------------------------------

    def build(
        self,
        request_id: str,
        prompt: OfflinePrompt,
        params: SamplingParams,
        resolved: EngineParams,
        priority: int,
    ) -> OutputBuilder:
        """Return the sequences of one prompt and what builds its output. Raises `InvalidRequestError`."""
        ids = prompt.ids
        if ids is None:
            ids = self.engine.processor.tokenize_prompt(prompt.text or "")
        if not params.spaces_between_special_tokens and self.engine.tokenizer.token_bytes is None:
            raise InvalidRequestError(
                "spaces_between_special_tokens=False is not supported for this model's tokenizer.",
                "spaces_between_special_tokens",
            )
        # No other request has this salt, so nothing in the cache matches.
        salt = uuid4().hex if params.skip_reading_prefix_cache else prompt.cache_salt
        sequences = self.engine.sequences(ids, resolved, priority=priority, cache_salt=salt)
        return OutputBuilder(request_id, prompt.text, copy.copy(params), sequences, self.engine.tokenizer)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: dict[str, str] | None = None,
        priority: int = 0,
    ) -> str:
        """Queue a request; returns its id. Raises `InvalidRequestError` naming what is wrong with it."""
        for name, value in (("lora_request", lora_request), ("tokenization_kwargs", tokenization_kwargs)):
            if value:
                raise InvalidRequestError(f"{name} is not supported.", name)
        if request_id in self._builders:
            raise InvalidRequestError(f"request id {request_id} is already in use.", "request_id")
        builder = self.build(request_id, read_prompt(prompt), params, params.resolve(), priority)
        if arrival_time is not None:
            builder.arrival_time = arrival_time
        self._builders[request_id] = builder
        self._owners |= dict.fromkeys(builder.sequences, builder)
        self._run.add_sequences(builder.sequences)
        return request_id

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests now; `step` returns nothing more of them. Unknown ids are passed over."""
        for request_id in [request_ids] if isinstance(request_ids, str) else list(request_ids):
            builder = self._builders.get(request_id)
            if builder is not None:
                for sequence in builder.sequences:
                    self._run.abort(sequence)
                self._forget(request_id)

    def get_num_unfinished_requests(self) -> int:
        return len(self._builders)

    def has_unfinished_requests(self) -> bool:
        return bool(self._builders)

    def step(self) -> list[RequestOutput]:
        """Wait for the next step with tokens; returns what each request's `output_kind` asks for."""
        if not self._builders:
            return []
        updated: dict[OutputBuilder, None] = {}
        for sequence, delta in self._run.next_deltas():
            builder = self._owners[sequence]
            builder.add_delta(sequence, delta)
            updated[builder] = None
        found = [self._output_of(builder) for builder in updated]
        return [output for output in found if output is not None]

    def _output_of(self, builder: OutputBuilder) -> RequestOutput | None:
        """Return what `output_kind` asks for, or None if that is nothing yet."""
        kind, interval = builder.params.output_kind, builder.params.stream_interval or 1
        made, returned = sum(len(output.token_ids) for output in builder.result.outputs), builder.num_returned
        if builder.result.finished:
            self._forget(builder.result.request_id)
        elif kind is RequestOutputKind.FINAL_ONLY or (returned and made - returned < interval):
            return None
        builder.num_returned = made
        return builder.snapshot(delta=kind is RequestOutputKind.DELTA)

    def _forget(self, request_id: str) -> None:
        for sequence in self._builders.pop(request_id).sequences:
            del self._owners[sequence]


def one_each(value: Any, count: int, name: str) -> list[Any]:
    """`value` for each of `count` prompts, or the values of a list. Raises `InvalidRequestError`."""
    if not isinstance(value, Sequence):
        return list(itertools.repeat(value, count))
    if len(value) != count:
        raise InvalidRequestError(f"{name} has {len(value)} entries for {count} prompts", name)
    return list(value)
