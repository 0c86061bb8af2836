"""vLLM's offline API on our engine: `LLM`."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError, EngineError, InvalidRequestError
from microvllm.runtime.metrics.metric_families import Metric
from microvllm.runtime.offline.beams import BeamSearchOutput, OfflineSearch
from microvllm.runtime.offline.calls import UseTqdm, add_special_tokens, progress, refuse_given, tokenized
from microvllm.runtime.offline.core_thread import OfflineSequence
from microvllm.runtime.offline.llm_engine import LLMEngine, one_each
from microvllm.runtime.offline.llm_options import engine_options
from microvllm.runtime.offline.pooling import PoolingMethods
from microvllm.runtime.offline.prompts import OfflinePrompt, Prompt
from microvllm.runtime.offline.request_output import OutputBuilder, RequestOutput
from microvllm.runtime.offline.sampling_params import BeamSearchParams, SamplingParams
from microvllm.runtime.options.vllm_environment import ignored_variables
from microvllm.runtime.request import TokenLogprobs
from microvllm.runtime.text.chat_template import normalize_messages, template_problem
from microvllm.runtime.text.content_format import AUTO, CONTENT_FORMATS
from microvllm.runtime.worker.profiler import Profiler, ProfilerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("microvllm.llm")

Params: TypeAlias = "SamplingParams | Sequence[SamplingParams] | None"
Message: TypeAlias = "Mapping[str, Any]"
SLEEP_LEVELS = (0, 1)


class LLM(PoolingMethods):
    """Drop-in for `vllm.LLM` for texts and vectors; options are the fields of `EngineArgs`.

    An option of vLLM that only tunes is ignored with a warning; one that would change what is generated, and
    an unknown one, raise `ConfigError`, unless the value asks for nothing. `chat_template` is a file or the
    template itself. May be used from several threads.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        strict = options.pop("fail_on_environ_validation", False)
        if problem := ignored_variables(os.environ):
            if strict:
                raise ConfigError(f"LLM: {problem}")
            logger.warning("LLM: %s", problem)
        self._profiler, profiling = Profiler(), options.pop("profiler_config", None)
        self._profiler_config = None if profiling is None else ProfilerConfig.read(dict(profiling))
        template = options.pop("chat_template", None)
        self._chat_template = None if template is None else _chat_template(template)
        on_progress = options.pop("on_progress", None)
        self.engine = InferenceEngine(os.fspath(model), on_progress=on_progress, **engine_options(options))
        self.llm_engine = LLMEngine(self.engine)
        self._ids = itertools.count()
        self._queued: list[OutputBuilder] = []
        self._sleep_level: int | None = None

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        return cls(**dataclasses.asdict(engine_args))

    @property
    def model_config(self) -> Any:
        return self.llm_engine.model_config

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the model's tokenizer as one of transformers'."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults under the model's generation_config.json; a new object at each call."""
        return SamplingParams(**self.engine.processor.default_params())

    def get_metrics(self) -> list[Metric]:
        """Return the metrics since the start: vLLM's counters, gauges and histograms."""
        return self.llm_engine.get_metrics()

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached prefixes. Running requests keep their own blocks."""
        for name, value in (
            ("reset_running_requests", reset_running_requests),
            ("reset_connector", reset_connector),
        ):
            if value:
                raise InvalidRequestError(f"{name} is not supported.", name)
        return self.llm_engine.reset_prefix_cache()

    def start_profile(self, profile_prefix: str | None = None) -> str:
        """Start a profile of the engine's thread; returns the file that `stop_profile` will write.

        Raises `ConfigError` without the option `profiler_config`, `ProfilerStateError` if one runs.
        """
        config = self._profiler_config
        if config is None:
            raise ConfigError("start_profile needs LLM(profiler_config={'profiler': 'torch', ...})")
        return self.engine.call(lambda: self._profiler.start(config, profile_prefix or ""))

    def stop_profile(self) -> str:
        """End the profile and write it; returns its file. Raises `ProfilerStateError` if none runs."""
        return self.engine.call(self._profiler.stop)

    # ---- generate and chat ---------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt, in input order.

        A prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}.
        `sampling_params` and `priority` are one for all or one each. `use_tqdm` may be what makes a progress
        bar: it is called with `total` and `desc`, as tqdm is. Raises `InvalidRequestError` naming what is
        wrong, before any prompt is computed.
        """
        self._check_awake()
        given = tokenized(self.engine, prompts, tokenization_kwargs, lora_request, mm_processor_kwargs)
        return self._complete(self._build(given, sampling_params, priority), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = AUTO,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them.

        The chat template (the model's, or `chat_template`) gets contents as "string", as "openai" (lists of
        parts), or as it was written for ("auto"). `tools` are shown to it, and refused where it shows none;
        calls are not parsed.
        """
        self._check_awake()
        given = self._render(
            messages,
            tokenization_kwargs,
            lora_request,
            mm_processor_kwargs,
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._complete(self._build(given, sampling_params, priority), use_tqdm)

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        use_tqdm: UseTqdm = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Take prompts in without computing them; returns their request ids. See `wait_for_completion`."""
        given = tokenized(self.engine, prompts, tokenization_kwargs, lora_request, mm_processor_kwargs)
        return self._enqueue(self._build(given, sampling_params, priority))

    def enqueue_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        **options: Any,
    ) -> list[str]:
        """Take conversations in without answering them; `options` are those of `chat`."""
        given = self._render(
            messages,
            options.pop("tokenization_kwargs", None),
            lora_request,
            options.pop("mm_processor_kwargs", None),
            **options,
        )
        return self._enqueue(self._build(given, sampling_params, priority))

    def wait_for_completion(
        self, output_type: type[Any] | None = None, *, use_tqdm: UseTqdm = True
    ) -> list[RequestOutput]:
        """Generate for all that was enqueued, in that order."""
        self._check_awake()
        if output_type not in (None, RequestOutput):
            raise InvalidRequestError(f"output_type must be RequestOutput, got {output_type}", "output_type")
        queued, self._queued = self._queued, []
        return self._complete(queued, use_tqdm)

    def _enqueue(self, builders: list[OutputBuilder]) -> list[str]:
        if self._sleep_level:
            self._check_awake()
        self._queued += builders
        return [builder.result.request_id for builder in builders]

    def _build(
        self,
        prompts: Sequence[OfflinePrompt],
        sampling_params: Params,
        priority: int | Sequence[int] | None,
    ) -> list[OutputBuilder]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = one_each(sampling_params, len(prompts), "sampling_params")
        priorities = one_each(0 if priority is None else priority, len(prompts), "priority")
        for each in params:
            if not isinstance(each, SamplingParams):
                raise InvalidRequestError(
                    f"sampling_params must be SamplingParams, got {type(each).__name__}", "sampling_params"
                )
        # Once, where many prompts share one.
        resolved = {key: each.resolve() for key, each in {id(each): each for each in params}.items()}
        return [
            self.llm_engine.build(str(next(self._ids)), prompt, each, resolved[id(each)], rank)
            for prompt, each, rank in zip(prompts, params, priorities, strict=True)
        ]

    def _complete(self, builders: Sequence[OutputBuilder], use_tqdm: UseTqdm) -> list[RequestOutput]:
        owners = {sequence: builder for builder in builders for sequence in builder.sequences}
        with progress(use_tqdm, len(builders)) as advance:
            for sequence, delta in self.engine.generate_deltas(list(owners)):
                builder = owners[sequence]
                builder.add_delta(sequence, delta)
                if delta.finish_reason is not None and builder.result.finished:
                    advance()
        return [builder.result for builder in builders]

    def _render(
        self,
        messages: Any,
        tokenization_kwargs: Mapping[str, Any] | None,
        lora_request: None,
        mm_processor_kwargs: Mapping[str, Any] | None,
        *,
        chat_template_content_format: str = AUTO,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[OfflinePrompt]:
        """Conversations as prompts."""
        refuse_given(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        if chat_template_content_format not in CONTENT_FORMATS:
            raise InvalidRequestError(
                f"chat_template_content_format must be one of {', '.join(CONTENT_FORMATS)}, "
                f"got {chat_template_content_format!r}.",
                "chat_template_content_format",
            )
        options["tools"] = options.get("tools") or None
        options["chat_template"] = options.get("chat_template") or self._chat_template
        source = options["chat_template"] or self.engine.processor.template_source
        if options["tools"] and "tools" not in source:
            raise InvalidRequestError("tools: the chat template does not show tools.", "tools")
        one = bool(messages) and isinstance(messages[0], Mapping)
        special = add_special_tokens(tokenization_kwargs, False)
        found = []
        for conversation in [messages] if one else list(messages):
            text = self.engine.processor.render_text(
                normalize_messages(list(conversation)),
                chat_template_content_format=chat_template_content_format,
                **options,
                **(chat_template_kwargs or {}),
            )
            found.append(OfflinePrompt(text, self.engine.processor.tokenize_prompt(text, special)))
        return found

    # ---- beam search ---------------------------------------------------------------------------

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: UseTqdm = False,
        concurrency_limit: int | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """Return the `params.beam_width` likeliest continuations of each prompt, best first.

        At most `concurrency_limit` prompts are searched at a time. The tokens of a beam hold its end token.
        """
        self._check_awake()
        given = tokenized(self.engine, prompts, None, lora_request, None)
        priorities = one_each(0 if priority is None else priority, len(given), "priority")
        searches = [
            OfflineSearch(self.engine, prompt, params, rank)
            for prompt, rank in zip(given, priorities, strict=True)
        ]
        limit = concurrency_limit or max(1, len(searches))
        with progress(use_tqdm, len(searches)) as advance:
            for first in range(0, len(searches), limit):
                self._search(searches[first : first + limit], params)
                for _ in searches[first : first + limit]:
                    advance()
        return [search.output() for search in searches]

    def _search(self, searches: Sequence[OfflineSearch], params: BeamSearchParams) -> None:
        step = params.step_params().resolve()
        while open_ones := [search for search in searches if search.live]:
            batches = [
                [
                    self.engine.sequences([*search.ids, *beam.tokens], step, **search.options)[0]
                    for beam in search.live
                ]
                for search in open_ones
            ]
            entries: dict[OfflineSequence, TokenLogprobs] = {}
            for sequence, delta in self.engine.generate_deltas(list(itertools.chain(*batches))):
                for entry in delta.logprobs or []:
                    entries[sequence] = entry
            for search, batch in zip(open_ones, batches, strict=True):
                search.advance([entries[sequence] for sequence in batch])

    # ---- sleep ---------------------------------------------------------------------------------

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Stop generating until `wake_up`. Level 0 still takes prompts in by `enqueue`.

        Level 1 drops what was enqueued (but with `mode` "keep") and forgets the prefix cache; the memory of
        weights and KV cache stays reserved, which a warning says. Level 2, which discards the weights, is
        refused.
        """
        if level not in SLEEP_LEVELS:
            raise InvalidRequestError(f"sleep: level must be 0 or 1, got {level!r}.", "level")
        if mode not in ("abort", "wait", "keep"):
            raise InvalidRequestError(f"sleep: mode must be abort, wait or keep, got {mode!r}.", "mode")
        if mode == "wait" and self._queued:
            raise InvalidRequestError("sleep: call wait_for_completion() before sleeping.", "mode")
        if level == 1:
            logger.warning("sleep: the memory of the weights and of the KV cache stays reserved")
            if mode == "abort":
                self._queued.clear()
            self.reset_prefix_cache()
        self._sleep_level = level

    def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        """End `sleep`; returns whether the engine is awake. `tags` other than all wake nothing yet."""
        unknown = sorted(set(tags or ()) - {"weights", "kv_cache", "scheduling"})
        if unknown:
            raise InvalidRequestError(f"wake_up: {unknown[0]!r} is no tag.", "tags")
        if not tags or "scheduling" in tags or (self._sleep_level == 1 and "kv_cache" in tags):
            self._sleep_level = None
        return self._sleep_level is None

    def _check_awake(self) -> None:
        if self._sleep_level is not None:
            raise EngineError("the engine sleeps: call wake_up() first")


def _chat_template(source: str | Path) -> str:
    """Read a template, given as its text or as a file. Raises `ConfigError` if it does not compile."""
    text = str(source)
    if isinstance(source, Path) or not set("{\n") & set(text):
        try:
            text = Path(source).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"chat_template {source}: {error}") from error
    problem = template_problem(text)
    if problem is not None:
        raise ConfigError(f"chat_template: {problem}")
    return text
