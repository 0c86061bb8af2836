"""`InferenceEngine`: the engine in this process, for scripts and notebooks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError, InvalidRequestError
from microvllm.runtime.kv_events.publishing_core import make_core
from microvllm.runtime.metrics.engine_metrics import EngineMetrics
from microvllm.runtime.metrics.observer import SampleGroup
from microvllm.runtime.offline.core_thread import CoreThread, OfflineSequence, Run
from microvllm.runtime.offline.sampling_params import SamplingParams as UserParams
from microvllm.runtime.options.flag import given_flags
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.request import SamplingParams
from microvllm.runtime.text.detokenizer import TextDelta
from microvllm.runtime.text.input_processor import InputProcessor
from microvllm.runtime.text.tokenizer import Tokenizer
from microvllm.runtime.vectors import POOLING_PARAMS
from microvllm.runtime.worker.parallel.runner import start_runner

T = TypeVar("T")
logger = logging.getLogger("microvllm.engine")

QUEUE_BOUNDS = ("max_num_queued_reqs", "max_num_queued_tokens")
INTERRUPTED_WAIT_S = 1.0  # for the step that runs when KeyboardInterrupt comes; a long prompt takes longer


class InferenceEngine:
    """Loads a model by its path and generates.

        engine = InferenceEngine(model_path="smollm2-135m-instruct", max_batch_size=32)
        results = engine.generate(["Hello", "AI is"], max_tokens=100)
        for prompt, text in results.items():
            print(f"{prompt}: {text}")
        for token, text in engine.stream_generate("AI 的未来是", max_tokens=50):
            print(text, end="", flush=True)

    `max_batch_size` is vLLM's `max_num_seqs`; `on_progress` is called as the start advances, see
    `microvllm.runtime.progress`; `options` are further fields of `EngineArgs`. With `log_step_times` a table
    goes to stderr whenever all requests have ended. Sampling options (temperature, top_p, top_k, min_p, seed,
    stop, ...) are those of `microvllm.SamplingParams`; what is not given comes from the model's
    generation_config.json.

    May be used from several threads, whose requests then share steps, and several streams may be open and
    taken from in turns. KeyboardInterrupt ends the requests of the call that it comes to, and only these; the
    engine stays usable. The garbage collector is the caller's: `gc.freeze()` behind the start keeps
    collections of what lives long, 0.2 s each, out of steps. Raises `ConfigError` for a model that cannot be
    loaded and `InvalidRequestError`, naming the field, for a wrong request.
    """

    def __init__(
        self,
        model_path: str,
        max_batch_size: int | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> None:
        args = EngineArgs(model=model_path, **{"max_num_seqs": max_batch_size, **options})
        if args.data_parallel_size != 1:
            raise ConfigError(
                f"data_parallel_size {args.data_parallel_size}: one engine runs in this process",
                remedy="start `microvllm serve --data-parallel-size N`, or one process for each engine",
            )
        if bounds := given_flags(args, QUEUE_BOUNDS):
            logger.warning("%s: no effect without a server: the queue has no bound", ", ".join(bounds))
        # A caller's own list of prompts is no overload: offline, the queue has no bound.
        self.config = msgspec.structs.replace(
            args.prepare(on_progress), max_num_queued_reqs=None, max_num_queued_tokens=None
        )
        self.tokenizer = Tokenizer.load(Path(self.config.tokenizer_path))
        self.processor = InputProcessor(self.config, self.tokenizer)
        runner = start_runner(self.config, on_progress)
        self.config = runner.config
        self.processor.use_config(self.config)
        self.core = make_core(self.config, runner)
        self.metrics = EngineMetrics(self.config.max_model_len, self.core.stats())
        self._core_thread = CoreThread(self.core, self.metrics)

    def generate(
        self, prompts: str | Sequence[str], max_tokens: int | None = 16, **sampling: Any
    ) -> dict[str, str]:
        """Return a text for each prompt, generated together: {prompt: text}.

        Equal prompts are one key and are generated once, which a `UserWarning` says; use `LLM.generate` for
        several answers to one.
        """
        given = [prompts] if isinstance(prompts, str) else [_text(prompt) for prompt in prompts]
        unique = list(dict.fromkeys(given))
        if len(unique) < len(given):
            warnings.warn(
                f"{len(given) - len(unique)} of {len(given)} prompts repeat an earlier one: generate() "
                "gives a text to each different prompt, LLM.generate() to every prompt",
                stacklevel=2,
            )
        params = self.sampling_params(max_tokens=max_tokens, **sampling)
        if params.n != 1:
            raise InvalidRequestError("generate() gives one text a prompt; n must be 1", "n")
        sequences = {self._sequence(prompt, params): prompt for prompt in unique}
        texts = dict.fromkeys(unique, "")
        for sequence, delta in self.generate_deltas(list(sequences)):
            texts[sequences[sequence]] += delta.text
        return texts

    def stream_generate(
        self, prompt: str, max_tokens: int | None = 16, **sampling: Any
    ) -> Iterator[tuple[int, str]]:
        """Each new token id with the text that became known by it.

        That is "" inside a multi-byte character, whose text comes whole with its last token, and while the
        text may still become a stop string. Leaving the loop ends the request.
        """
        params = self.sampling_params(max_tokens=max_tokens, **sampling)
        if params.n != 1:
            raise InvalidRequestError("stream_generate() gives one text; n must be 1", "n")
        for _, delta in self.generate_deltas([self._sequence(prompt, params)]):
            *earlier, last = delta.token_ids
            for token in earlier:
                yield token, ""
            yield last, delta.text

    def sampling_params(self, **fields: Any) -> SamplingParams:
        """The engine's form of `SamplingParams` with the given fields over the model's own defaults."""
        unknown = sorted(set(fields) - set(SamplingParams.__struct_fields__))
        if unknown:
            raise InvalidRequestError(f"{unknown[0]} is not a sampling parameter", unknown[0])
        return UserParams(**{**self.processor.default_params(), **fields}).resolve()

    def generate_deltas(
        self, sequences: Sequence[OfflineSequence]
    ) -> Iterator[tuple[OfflineSequence, TextDelta]]:
        """Generate all sequences together; yields the delta of each.

        Closing the iterator early aborts what still runs.
        """
        run, wait_s = self.open_run(), None
        closing = run.close_message()
        try:
            run.add_sequences(sequences)
            while run.unfinished:
                yield from run.next_deltas()
        except KeyboardInterrupt:
            wait_s = INTERRUPTED_WAIT_S
            raise
        finally:
            run.post(closing)  # first of all, and not by a method: a second interrupt must not skip it
            run.wait_closed(wait_s)

    def open_run(self) -> Run:
        """Return a run without sequences; `run.post(run.close_message())` ends it."""
        return self._core_thread.open_run()

    def call(self, function: Callable[[], T]) -> T:
        """Call a function that uses `core`, between two steps."""
        return self._core_thread.call(function)

    def _sequence(self, prompt: str, params: SamplingParams) -> OfflineSequence:
        (sequence,) = self.sequences(self.processor.tokenize_prompt(_text(prompt)), params)
        return sequence

    def sequences(
        self, prompt_ids: list[int], params: SamplingParams, **options: Any
    ) -> list[OfflineSequence]:
        """Return the `params.n` sequences of one prompt; `options` are those of `InputProcessor.requests`.

        Raises `InvalidRequestError` naming the field.
        """
        if self.config.spec.pooling is not None:
            raise InvalidRequestError("this model makes vectors: texts need --runner generate", "model")
        requests = self.processor.requests(prompt_ids, params, **options)
        group = SampleGroup(len(requests), len(requests))
        return [OfflineSequence(request, group, self.tokenizer) for request in requests]

    def vector_sequence(self, prompt_ids: list[int], cache_salt: str = "") -> OfflineSequence:
        """Return the sequence of a text whose `pooled` will be its vector; see `VectorForm`."""
        (request,) = self.processor.requests(prompt_ids, POOLING_PARAMS, cache_salt=cache_salt)
        return OfflineSequence(request, SampleGroup(1, 1), self.tokenizer)


def _text(prompt: object) -> str:
    """Check a prompt. Raises `InvalidRequestError` if it is no string."""
    if isinstance(prompt, str):
        return prompt
    raise InvalidRequestError(f"a prompt must be a string, got {type(prompt).__name__}", "prompt")
