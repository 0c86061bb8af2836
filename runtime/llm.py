"""vLLM's offline API on our engine: `LLM`, `RequestOutput`, `CompletionOutput`."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rich.progress import Progress

from microvllm.runtime.chat_template import normalize_messages
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.content_format import AUTO, CONTENT_FORMATS
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError, InvalidRequestError
from microvllm.runtime.request import EngineRequest, SamplingParams, TokenLogprobs
from microvllm.runtime.tokenizer import Tokenizer
from microvllm.runtime.vllm_environment import ignored_variables

logger = logging.getLogger("microvllm.llm")

Prompt: TypeAlias = "str | list[int] | Mapping[str, Any]"
_WRONG_PROMPT = "a prompt must be a text, a list of token ids, or a dict with either"


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log probability; rank 1 is the most likely, None where it was not computed."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs: TypeAlias = "dict[int, Logprob]"


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence; `finish_reason` is "stop", "length" or "repetition".

    With `SamplingParams.logprobs`, `logprobs` has one {token id: Logprob} a token, the sampled one first,
    and `cumulative_logprob` is the sum over the sampled ones.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """All sequences of one prompt.

    With `SamplingParams.prompt_logprobs`, `prompt_logprobs` has one entry a prompt token, None for the first.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[PositionLogprobs | None] | None = None


# Options of vllm.LLM that are about memory, downloads or logging, and change no answer here.
WITHOUT_EFFECT = frozenset(
    (
        *("disable_log_stats", "trust_remote_code", "revision"),
        *("swap_space", "cpu_offload_gb", "compilation_config", "disable_custom_all_reduce", "download_dir"),
    )
)
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


class LLM:
    """Drop-in for `vllm.LLM` for text generation; options are the fields of `EngineArgs`.

    An option of vLLM that has no effect here is ignored with a warning, any other unknown one raises
    `ConfigError`.
    """

    def __init__(self, model: str, **options: Any) -> None:
        if problem := ignored_variables(os.environ):
            logger.warning("LLM: %s", problem)
        for name in sorted(WITHOUT_EFFECT & set(options)):
            logger.warning("LLM: %s has no effect and is ignored", name)
            del options[name]
        for name in PARALLEL:
            if options.pop(name, 1) != 1:
                raise ConfigError(f"{name} must be 1: one model runs on one device")
        unknown = sorted(
            set(options) - {each.name for each in dataclasses.fields(EngineArgs)} - {"on_progress"}
        )
        if unknown:
            raise ConfigError(f"LLM() has no option {unknown[0]}")
        self.engine = InferenceEngine(model, **options)
        self._count = 0

    def get_tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults under the model's generation_config.json."""
        return self.engine.sampling_params()

    def reset_prefix_cache(self) -> bool:
        self.engine.call(self.engine.core.reset_prefix_cache)
        return True

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt, in input order.

        A prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}.
        `sampling_params` is one for all or one each.
        """
        batch = [_prompt(prompt) for prompt in _as_list(prompts)]
        tokenize = self.engine.processor.tokenize_prompt
        ids = [prompt if isinstance(prompt, list) else tokenize(prompt) for prompt in batch]
        texts = [prompt if isinstance(prompt, str) else None for prompt in batch]
        return self._run(texts, ids, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template_content_format: str = AUTO,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them.

        The chat template gets contents as "string", as "openai" (lists of parts), or as it was written for
        ("auto").
        """
        if chat_template_content_format not in CONTENT_FORMATS:
            raise InvalidRequestError(
                f"chat_template_content_format must be one of {', '.join(CONTENT_FORMATS)}, "
                f"got {chat_template_content_format!r}.",
                "chat_template_content_format",
            )
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if one else list(messages)
        ids = [
            self.engine.processor.render_chat(
                normalize_messages(list(conversation)),
                chat_template_content_format=chat_template_content_format,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self._run([None] * len(ids), ids, sampling_params, use_tqdm, None)

    def _run(
        self,
        texts: Sequence[str | None],
        prompt_ids: Sequence[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        show_progress: bool,
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        params = _one_each(
            sampling_params or self.get_default_sampling_params(), len(prompt_ids), "sampling_params"
        )
        priorities = _one_each(0 if priority is None else priority, len(prompt_ids), "priority")
        results: list[RequestOutput] = []
        requests: list[EngineRequest] = []
        targets: list[tuple[RequestOutput, CompletionOutput]] = []
        for text, ids, wish, rank in zip(texts, prompt_ids, params, priorities, strict=True):
            children = self.engine.processor.requests(ids, wish, priority=rank)
            outputs = [CompletionOutput(index) for index in range(len(children))]
            for output in outputs:
                output.logprobs = None if wish.logprobs is None else []
            result = RequestOutput(str(self._count), text, ids, outputs)
            self._count += 1
            results.append(result)
            requests += children
            targets += [(result, output) for output in outputs]
        with Progress(disable=not show_progress, transient=True) as progress:
            task = progress.add_task("Generating", total=len(targets))
            for index, delta in self.engine.run(requests):
                result, output = targets[index]
                output.text += delta.text
                output.token_ids += delta.token_ids
                if delta.prompt_logprobs is not None:
                    entries = [self._position(entry, True) for entry in delta.prompt_logprobs]
                    result.prompt_logprobs = [None, *entries]
                if delta.logprobs is not None and output.logprobs is not None:
                    ranked = requests[index].params.logprob_token_ids is None
                    output.logprobs += [self._position(entry, ranked) for entry in delta.logprobs]
                    output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(
                        entry.logprobs[0] for entry in delta.logprobs
                    )
                if delta.finish_reason is not None:
                    output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
                    result.finished = all(each.finished() for each in result.outputs)
                    progress.advance(task)
        return results

    def _position(self, entry: TokenLogprobs, ranked: bool) -> PositionLogprobs:
        """`ranked`: the tokens after the first are the most likely ones in order."""
        others = range(1, len(entry.token_ids))
        ranks = [entry.rank, *(rank if ranked else None for rank in others)]
        found: PositionLogprobs = {}
        for token, value, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True):
            if token not in found:
                text = self.engine.tokenizer.decode([token], skip_special_tokens=False)
                found[token] = Logprob(value, rank, text)
        return found


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError(_WRONG_PROMPT, "prompt")
    # A flat list of ids is one prompt.
    return [list(prompts)] if prompts and all(type(item) is int for item in prompts) else list(prompts)


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and all(type(item) is int for item in prompt):
        return list(prompt)
    raise InvalidRequestError(_WRONG_PROMPT, "prompt")


def _one_each(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(f"{name} has {len(value)} entries for {count} prompts", name)
    return list(value)
