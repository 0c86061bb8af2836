"""An engine client without an engine: tokens are a hash of everything that may change them.

It has the interface of `microvllm.runtime.client.EngineClient` and keeps its promises (limits, stops, `n`,
seeds, aborts), so that a test of the HTTP surface sees a wrong parameter as a wrong token. It can be made to
stall or to fail, and it counts what is running and what was aborted.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from microvllm.runtime.chat_template import ChatTemplate
from microvllm.runtime.errors import (
    ContextLengthError,
    EngineBusyError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
)
from microvllm.runtime.observer import EngineObserver
from microvllm.runtime.output import TextDelta
from microvllm.runtime.request import EngineStats, SamplingParams

BOS, EOS = 256, 257
VOCAB_SIZE = 258
LETTERS = [*range(ord("a"), ord("z") + 1), ord(" ")]


@dataclass(frozen=True)
class FakeSpec:
    vocab_size: int = VOCAB_SIZE


@dataclass(frozen=True)
class FakeConfig:
    model: str = "fake-model"
    max_model_len: int = 256
    num_blocks: int = 64
    block_size: int = 16
    dtype: str = "float32"
    enable_prefix_caching: bool = True
    spec: FakeSpec = field(default_factory=FakeSpec)


class FakeTokenizer:
    """One token a byte, and two special ones."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        by_byte = {self._byte(char): char for char in alphabet}
        self.backend = Tokenizer(models.BPE({by_byte[b]: b for b in range(256)}, []))
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = decoders.ByteLevel()
        self.backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
        self.vocab_size = VOCAB_SIZE
        self.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}

    @staticmethod
    def _byte(char: str) -> int:
        """ByteLevel shows printable bytes as themselves and the other 68 as U+0100 onwards."""
        shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
        return ord(char) if ord(char) < 256 else [b for b in range(256) if b not in shown][ord(char) - 256]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [BOS, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token: int) -> str | None:
        return self.backend.id_to_token(token)


class FakeProcessor:
    def __init__(
        self,
        config: FakeConfig,
        tokenizer: FakeTokenizer,
        template: ChatTemplate | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.tokenizer, self.template = config, tokenizer, template
        self.defaults = defaults or {}

    def default_params(self) -> dict[str, Any]:
        return dict(self.defaults)

    def tokenize_prompt(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        if len(prompt) > 8 * self.config.max_model_len:
            raise ContextLengthError("The prompt is too long.", "input_text")
        return self.tokenizer.encode(prompt, add_special_tokens)

    def check_prompt(self, ids: list[int]) -> None:
        if not ids:
            raise InvalidRequestError("The prompt is empty.", "prompt")
        for token in ids:
            if not 0 <= token < VOCAB_SIZE:
                raise InvalidRequestError(f"Token id {token} is out of vocabulary", "prompt")
        if len(ids) > self.config.max_model_len:
            raise ContextLengthError("The prompt is longer than the context.", "input_tokens")
        if len(ids) == self.config.max_model_len:
            raise ContextLengthError("max_tokens must be at least 1, got 0.", "max_tokens")

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        if self.template is not None:
            text = self.template.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)
            return self.tokenize_prompt(text, add_special_tokens)
        text = "\n".join(f"{message['role']}: {message['content']}" for message in messages) + (
            "" if continue_final_message else "\n"
        )
        text += "assistant: " if add_generation_prompt else ""
        text += "".join(f"{name}={value};" for name, value in sorted(kwargs.items()))
        ids = self.tokenize_prompt(text, add_special_tokens)
        self.check_prompt(ids)
        return ids


class FakeStream:
    """One sequence. `delay` seconds pass before each token; None waits for ever."""

    def __init__(self, client: FakeClient, prompt: list[int], params: SamplingParams, salt: str) -> None:
        self.prompt_token_ids = prompt
        self.num_cached_tokens = 0
        self._client = client
        self._params = params
        self._deltas = list(client.generate(prompt, params, salt))
        self._at = 0
        self.finished = False
        client.running.add(self)

    def __aiter__(self) -> AsyncIterator[TextDelta]:
        return self

    async def __anext__(self) -> TextDelta:
        client = self._client
        if self.finished or self._at == len(self._deltas):
            raise StopAsyncIteration
        if client.fail_after is not None and self._at >= client.fail_after:
            self._end()
            raise client.failure
        if client.stall_after is not None and self._at >= client.stall_after:
            await asyncio.Event().wait()
        await asyncio.sleep(client.delay)
        self._at += 1
        client.tokens_made += 1
        if self._at == len(self._deltas):
            self._end()
        return self._deltas[self._at - 1]

    def abort(self) -> None:
        if not self.finished:
            self._client.aborted += 1
            self._end()

    def _end(self) -> None:
        self.finished = True
        self._client.running.discard(self)


class FakeClient:
    """See the module's docstring. `alive=False` is an engine that has died."""

    def __init__(self, *, max_model_len: int = 256, defaults: Mapping[str, Any] | None = None) -> None:
        self.config = FakeConfig(max_model_len=max_model_len)
        self.tokenizer = FakeTokenizer()
        self.processor = FakeProcessor(self.config, self.tokenizer, defaults=defaults)
        self.stats = EngineStats()
        self.observer = EngineObserver()
        self.alive = True
        self.busy = False
        self.capacity: int | None = None  # sequences at a time
        self.delay = 0.0
        self.stall_after: int | None = None
        self.fail_after: int | None = None
        self.failure: EngineError = EngineError("The engine failed.")
        self.running: set[FakeStream] = set()
        self.aborted = 0
        self.tokens_made = 0
        self.submitted: list[tuple[list[int], SamplingParams, int, str]] = []

    def healthy(self) -> bool:
        return self.alive

    async def run_blocking(self, fn: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, fn, *args)

    async def close(self, drain_s: float = 0) -> None:
        for stream in list(self.running):
            stream.abort()

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> list[FakeStream]:
        if not self.alive:
            raise EngineDeadError("The engine is being started again.")
        if self.busy or (self.capacity is not None and len(self.running) + params.n > self.capacity):
            raise EngineBusyError("The engine is currently busy and cannot accept new requests.")
        self.processor.check_prompt(prompt_ids)
        room = self.config.max_model_len - len(prompt_ids)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > limit:
            raise InvalidRequestError("min_tokens must be at most max_tokens.", "min_tokens")
        self.submitted.append((prompt_ids, params, priority, cache_salt))
        self.stats = EngineStats(prompt_tokens=self.stats.prompt_tokens + len(prompt_ids))
        self.observer.step(self.stats)
        streams = []
        for i in range(params.n):
            seed = None if params.seed is None else params.seed + i
            # Without a seed the samples differ between children, but not between runs of a test.
            single = msgspec.structs.replace(params, n=1, max_tokens=limit, seed=seed)
            streams.append(FakeStream(self, prompt_ids, single, f"{i}" if seed is None else ""))
        return streams

    def generate(self, prompt: list[int], params: SamplingParams, salt: str) -> list[TextDelta]:
        """All deltas of a sequence, one token each."""
        knobs = (
            "greedy"
            if params.greedy
            else repr((params.temperature, params.top_p, params.top_k, params.min_p, params.seed, salt))
        )
        made: list[int] = []
        deltas: list[TextDelta] = []
        text = ""
        held = max((len(s) for s in params.stop), default=1) - 1
        shown = 0
        while True:
            token = self._next(prompt + made, knobs)
            made.append(token)
            may_stop = len(made) >= params.min_tokens
            finish: str | None = None
            reason: int | str | None = None
            if may_stop and token == EOS and not params.ignore_eos:
                finish = "stop"
            elif may_stop and token in params.stop_token_ids:
                finish, reason = "stop", token
            ends_by_token = finish is not None
            if not ends_by_token or params.include_stop_str_in_output:
                text += self.tokenizer.decode([token], params.skip_special_tokens)
            if finish is None and may_stop:
                hits = [(text.find(s, max(0, shown - held)), s) for s in params.stop if s in text]
                if hits:
                    at, hit = min(hits)
                    finish, reason = "stop", hit
                    text = text[: at + (len(hit) if params.include_stop_str_in_output else 0)]
            if finish is None and len(made) == params.max_tokens:
                finish = "length"
            until = len(text) if finish else max(shown, len(text) - held)
            deltas.append(TextDelta([token], text[shown:until], finish, reason))
            shown = until
            if finish:
                return deltas

    @staticmethod
    def _next(context: list[int], knobs: str) -> int:
        digest = hashlib.sha256(f"{context}{knobs}".encode()).digest()
        return EOS if digest[0] < 12 else LETTERS[digest[1] % len(LETTERS)]


def fresh(**changes: Any) -> FakeClient:
    """A client with attributes set: `fresh(delay=0.01, stall_after=2)`."""
    client = FakeClient()
    for name, value in changes.items():
        if not hasattr(client, name):
            raise AttributeError(name)
        setattr(client, name, value)
    return client


__all__ = ["BOS", "EOS", "VOCAB_SIZE", "FakeClient", "TextDelta", "fresh"]
