"""Turns prompts and sampling parameters into engine requests, with every check that needs no engine.

The same for the server and for offline use. Imports no torch; the methods that tokenise or render take
milliseconds to seconds, so the server calls them in a worker thread.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import ContextLengthError, InvalidRequestError
from microvllm.runtime.grammar.checker import GrammarChecker
from microvllm.runtime.machine import return_freed_memory
from microvllm.runtime.options.generation_config import GENERATION_FIELDS
from microvllm.runtime.request import EngineRequest, SamplingParams
from microvllm.runtime.text.chat_template import ChatTemplate
from microvllm.runtime.text.end_tokens import end_tokens
from microvllm.runtime.text.template_process import SandboxProcesses
from microvllm.runtime.text.tokenizer import Tokenizer
from microvllm.runtime.text.tokenizer_files import loadable_path

logger = logging.getLogger("microvllm.engine")

_NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat "
    "template: this model has none, and the server was started without --chat-template."
)


def load_text(config: EngineConfig, chat_template: str | None) -> tuple[Tokenizer, InputProcessor, str]:
    """Load the tokenizer; returns it, its processor and a folder that transformers can load it from.

    `chat_template` replaces the model's own.
    """
    path = Path(config.tokenizer_path)
    tokenizer = Tokenizer.load(path)
    root = loadable_path(tokenizer, path, config.spec.max_position)
    template = None
    if chat_template is not None:
        template = ChatTemplate(chat_template, tokenizer.special_tokens, SandboxProcesses())
    processor = InputProcessor(config, tokenizer, template)
    if processor.template is not None and (problem := processor.template.error):
        logger.warning("Chat is not available: %s", problem)
    return_freed_memory()  # the vocabulary as it was read
    return tokenizer, processor, root


class InputProcessor:
    """Knows the model's tokenizer, template, limits and defaults.

    `max_chars` is the length in characters that no prompt within the context can exceed, `template` the one
    for conversations without tools: `template` as it was given, or the model's own.
    """

    def __init__(
        self, config: EngineConfig, tokenizer: Tokenizer, template: ChatTemplate | None = None
    ) -> None:
        self._tokenizer = tokenizer
        sandbox = SandboxProcesses()
        self._compiled = functools.lru_cache(8)(
            lambda source: ChatTemplate(source, tokenizer.special_tokens, sandbox)
        )
        self._replaces_own = template is not None
        if template is None and tokenizer.chat_template is not None:
            template = self._compiled(tokenizer.chat_template)
        self.template = template
        self.use_config(config)
        self._eos, self._further_ends = end_tokens(config, tokenizer)
        self._grammars = GrammarChecker(tokenizer, config.spec.vocab_size, self._eos is not None)
        self._ids = itertools.count()

    def use_config(self, config: EngineConfig) -> None:
        """Take over the engine's own configuration, once it has measured how long the context can be."""
        self._config = config
        longest = max(map(len, self._tokenizer.backend.get_vocab()), default=1)
        self.max_chars = config.max_model_len * longest

    def default_params(self) -> dict[str, Any]:
        """Sampling defaults of the model's `generation_config.json`, under `SamplingParams`' names."""
        values = self._config.generation_defaults
        return {ours: values[theirs] for theirs, ours in GENERATION_FIELDS.items() if theirs in values}

    def tokenize_prompt(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Text -> token ids. Raises `ContextLengthError` before tokenising a text that cannot fit."""
        if len(prompt) > self.max_chars:
            raise ContextLengthError(
                f"This model's maximum context length is {self._config.max_model_len} tokens. However, your "
                f"prompt has {len(prompt)} characters, more than that many tokens can hold. Please reduce "
                "the length of the input prompt.",
                "input_text",
            )
        return self._tokenizer.encode(prompt, add_special_tokens)

    def render_text(
        self,
        messages: list[dict[str, Any]],
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """Conversation -> text, through the chat template; `options` go to `ChatTemplate.render`.

        `chat_template` is a template, or the name of one of the model's own.
        """
        return self._choose(chat_template, tools is not None).render(messages, tools=tools, **options)

    def _choose(self, chat_template: str | None, with_tools: bool) -> ChatTemplate:
        """As transformers chooses: of the model's templates, the one named `tool_use` is for tools."""
        own = self._tokenizer.chat_templates
        if chat_template is not None:
            return self._compiled(own.get(chat_template, chat_template))
        if with_tools and "tool_use" in own and not self._replaces_own:
            return self._compiled(own["tool_use"])
        if self.template is None:
            names = f" Its templates are {', '.join(sorted(own))}; none is the default." if own else ""
            raise InvalidRequestError(_NO_TEMPLATE + names)
        return self.template

    @property
    def template_source(self) -> str:
        """The text of the chat templates that `render_text` chooses from by itself; "" without one."""
        own = {} if self._replaces_own else self._tokenizer.chat_templates
        default = "" if self.template is None else self.template.source
        return "\n".join(filter(None, (default, own.get("tool_use"))))

    def check_prompt(self, ids: Sequence[int], field: str = "prompt") -> None:
        """Raise `InvalidRequestError` unless the ids are a prompt that leaves room for one token.

        A model that makes vectors needs no room. `field` is the request's, for the error.
        """
        limit, vocab = self._config.max_model_len, self._config.spec.vocab_size
        if not ids:
            either = "Either prompt or prompt_embeds" if field == "prompt" else field
            raise InvalidRequestError(f"{either} must be provided and non-empty.", field)
        if len(ids) > limit:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, your prompt contains "
                f"{len(ids)} input tokens, which exceeds this limit even without any output tokens. Please "
                "reduce the length of the input prompt.",
                "input_tokens",
            )
        if len(ids) == limit and self._config.spec.pooling is None:
            raise ContextLengthError(
                "max_tokens must be at least 1, got 0. The prompt alone fills the model's context of "
                f"{limit} tokens.",
                "max_tokens",
            )
        # min and max walk at C speed: a loop here would hold up every other request for tens of milliseconds.
        low, high = min(ids), max(ids)
        if low < 0 or high >= vocab:
            wrong = low if low < 0 else high
            raise InvalidRequestError(f"Token id {wrong} is out of vocabulary (size {vocab}).", field)

    def requests(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[EngineRequest]:
        """Check a prompt and its parameters; returns `params.n` engine requests."""
        self.check_prompt(prompt_ids)
        return self.samples(prompt_ids, self.prepare(params, priority=priority, cache_salt=cache_salt))

    def prepare(self, params: SamplingParams, *, priority: int = 0, cache_salt: str = "") -> EngineRequest:
        """Check what does not depend on the prompt; returns a request that has none yet, for `samples`.

        Raises `InvalidRequestError` naming the field. Long lists of ids and bad words take milliseconds, a
        new grammar up to seconds.
        """
        self._check_ids(params)
        self._check_logprobs(params)
        form = params.structured_outputs
        grammar = "" if form is None else self._grammars.check(form)
        bad_word_ids = self._bad_word_ids(params.bad_words)
        eos = None if params.ignore_eos else self._eos
        ends = params.stop_token_ids if params.ignore_eos else [*params.stop_token_ids, *self._further_ends]
        wrong = next((token for token in ends if token >= self._config.spec.vocab_size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"stop_token_ids: token id {wrong} is out of vocabulary.", "stop_token_ids"
            )
        return EngineRequest(-1, [], params, eos, ends, priority, cache_salt, bad_word_ids, grammar=grammar)

    def samples(self, prompt_ids: list[int], prepared: EngineRequest) -> list[EngineRequest]:
        """Return the `params.n` requests of a prompt that has passed `check_prompt`, made from `prepared`.

        `max_tokens` is clamped to what is left of the context, as vLLM 0.33 does.
        """
        params = prepared.params
        room = self._config.max_model_len - len(prompt_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {params.min_tokens}.",
                "min_tokens",
            )
        params = params.with_max_tokens(max_tokens)
        return [
            msgspec.structs.replace(
                prepared,
                request_id=next(self._ids),
                prompt_token_ids=prompt_ids,
                params=params,
                sample=sample,
            )
            for sample in range(params.n)
        ]

    def _check_ids(self, params: SamplingParams) -> None:
        """Raise `InvalidRequestError` for a token id that the model does not have, naming the field."""
        vocab = self._config.spec.vocab_size
        thinking = params.thinking
        checked: dict[str, Collection[int] | None] = {
            "logit_bias": params.logit_bias,
            "allowed_token_ids": params.allowed_token_ids,
            "logprob_token_ids": params.logprob_token_ids,
            "thinking": [*thinking.start, *thinking.end] if thinking is not None else None,
        }
        for name, ids in checked.items():
            if ids and not 0 <= min(ids) <= max(ids) < vocab:
                wrong = ", ".join(str(token) for token in sorted(ids) if not 0 <= token < vocab)
                raise InvalidRequestError(
                    f"{name}: token ids out of vocabulary: {wrong[:200]}. "
                    f"The vocabulary size is {vocab}: ids are 0 to {vocab - 1}.",
                    name,
                )

    def _check_logprobs(self, params: SamplingParams) -> None:
        vocab, limit = self._config.spec.vocab_size, self._config.max_logprobs
        for name, what in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            requested = getattr(params, name)
            count = vocab if requested == -1 else requested or 0
            if limit != -1 and count > limit:
                raise InvalidRequestError(
                    f"Requested {what} logprobs of {requested}, which is greater than max allowed: {limit}",
                    name,
                )

    def _bad_word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Each word as it is spelt at the start of a text and after a space."""
        found: list[list[int]] = []
        for word in words:
            for text in (word.lstrip(), " " + word.lstrip()):
                ids = self._tokenizer.encode(text, False)
                # A token that the model has no logit for cannot come anyway.
                if ids and ids not in found and max(ids) < self._config.spec.vocab_size:
                    found.append(ids)
        return found
