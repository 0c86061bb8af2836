"""An engine client without an engine: tokens are a hash of everything that may change them.

It has the interface of `microvllm.runtime.process.client.EngineClient` and keeps its promises (limits,
stops, `n`, seeds, aborts), so that a test of the HTTP surface sees a wrong parameter as a wrong token. It can
be made to stall or to fail, and it counts what is running and what was aborted.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from microvllm.adapters.pooling_spec import Pooling
from microvllm.runtime.errors import EngineAsleepError, EngineBusyError, EngineDeadError, EngineError
from microvllm.runtime.grammar.checker import GrammarChecker
from microvllm.runtime.kv_events.config import KVEventsConfig
from microvllm.runtime.metrics.observer import EngineObserver, RequestTiming
from microvllm.runtime.metrics.stats import EngineStats
from microvllm.runtime.request import EngineRequest, FinishReason, SamplingParams, StepOutput, TokenLogprobs
from microvllm.runtime.text.chat_template import ChatTemplate, content_text
from microvllm.runtime.text.detokenizer import REPEATED, OutputProcessor, TextDelta
from microvllm.runtime.text.input_processor import InputProcessor
from microvllm.runtime.text.token_bytes import TokenBytes, build_token_bytes

BOS, EOS = 256, 257
VOCAB_SIZE = 258
LETTERS = [*range(ord("a"), ord("z") + 1), ord(" ")]
IMPOSSIBLE = 255  # the token whose log probability is always -inf


@dataclass(frozen=True)
class FakeSpec:
    vocab_size: int = VOCAB_SIZE
    eos_token_ids: tuple[int, ...] = (EOS,)
    hidden_size: int = 8
    pooling: Pooling | None = None


@dataclass(frozen=True)
class FakeConfig:
    model: str = "fake-model"
    tokenizer_path: str = "fake-model"
    max_model_len: int = 256
    num_blocks: int = 64
    block_size: int = 16
    max_num_seqs: int = 32
    dtype: str = "float32"
    kv_dtype: str = "float32"
    device: str = "cuda"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_prefix_caching: bool = True
    spec: FakeSpec = field(default_factory=FakeSpec)
    max_logprobs: int = 20
    request_timeout: float = 0.0
    logprobs_mode: str = "raw_logprobs"
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)


@functools.cache
def _backend() -> tuple[Tokenizer, TokenBytes | None]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = {_byte(char): char for char in alphabet}
    backend = Tokenizer(models.BPE({by_byte[b]: b for b in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend, build_token_bytes(backend.decoder, backend.get_vocab(), {BOS, EOS})


def _byte(char: str) -> int:
    """ByteLevel shows printable bytes as themselves and the other 68 as U+0100 onwards."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return ord(char) if ord(char) < 256 else [b for b in range(256) if b not in shown][ord(char) - 256]


class FakeTokenizer:
    """One token a byte, and two special ones."""

    def __init__(self) -> None:
        self.backend, self.token_bytes = _backend()
        self.vocab_size = VOCAB_SIZE
        self.special_ids = frozenset((BOS, EOS))
        self.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        self.chat_template, self.chat_templates = None, {}
        self.eos_token_id = EOS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [BOS, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token: int) -> str | None:
        return self.backend.id_to_token(token)


@functools.cache
def _grammars() -> GrammarChecker:
    """One for all processors: it has child processes."""
    return GrammarChecker(FakeTokenizer(), VOCAB_SIZE, has_end=True)  # type: ignore[arg-type]


class FakeProcessor(InputProcessor):
    """The real one, but for a template that shows every variable and for defaults that are given."""

    def __init__(
        self,
        config: FakeConfig,
        tokenizer: FakeTokenizer,
        template: ChatTemplate | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, tokenizer, template)  # type: ignore[arg-type]
        self._grammars = _grammars()
        self.template = template
        self.defaults = defaults or {}

    def default_params(self) -> dict[str, Any]:
        return dict(self.defaults)

    def render_text(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_content_format: str = "auto",
        **kwargs: Any,
    ) -> str:
        if self.template is not None:
            return self.template.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                chat_template_content_format=chat_template_content_format,
                **kwargs,
            )
        text = "\n".join(f"{message['role']}: {content_text(message['content'])}" for message in messages) + (
            "" if continue_final_message else "\n"
        )
        text += "assistant: " if add_generation_prompt else ""
        return text + "".join(f"{name}={value};" for name, value in sorted(kwargs.items()))


class FakeStream:
    """One sequence. `delay` seconds pass before each token; None waits for ever."""

    def __init__(self, client: FakeClient, request: EngineRequest, salt: str) -> None:
        self.name = ""
        self.prompt_token_ids = request.prompt_token_ids
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.timing = RequestTiming(time.monotonic())
        self._client = client
        self._request = request
        self.pooled: bytes | None = None
        if client.config.spec.pooling is None:
            self._deltas = client.generate(request, salt)
        else:
            self._deltas = [TextDelta([], "", "stop")]
            self.pooled = vector_of(request.prompt_token_ids).tobytes()
        self._at = 0
        self.num_preemptions = 0
        self.end_reason: str | None = None
        self.finished = False
        client.running.add(self)

    def __aiter__(self) -> AsyncIterator[TextDelta]:
        return self

    async def __anext__(self) -> TextDelta:
        client = self._client
        if self.finished or self._at == len(self._deltas):
            raise StopAsyncIteration
        if client.fail_after is not None and self._at >= client.fail_after:
            self._end("error")
            raise client.failure
        if client.stall_after is not None and self._at >= client.stall_after:
            await asyncio.Event().wait()
        await asyncio.sleep(client.delay)
        self._at += 1
        client.tokens_made += 1
        timing = self.timing
        timing.last_token = time.monotonic()
        if self._at == 1:
            timing.scheduled, timing.first_token = timing.arrival, timing.last_token
            self.prompt_logprobs = client.score_prompt(self._request)
        if self._at == len(self._deltas):
            self._end(self._deltas[-1].finish_reason)
        return self._deltas[self._at - 1]

    @property
    def num_generated_tokens(self) -> int:
        return self._at

    def abort(self) -> None:
        if not self.finished:
            self._client.aborted += 1
            self._end("abort")

    def _end(self, reason: str | None) -> None:
        self.end_reason = reason
        self.finished = True
        self._client.running.discard(self)


class FakeClient:
    """See the module's docstring. `alive=False` is an engine that has died."""

    def __init__(
        self,
        *,
        max_model_len: int = 256,
        max_logprobs: int = 20,
        defaults: Mapping[str, Any] | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        spec = FakeSpec(pooling=pooling)
        self.config = FakeConfig(max_model_len=max_model_len, max_logprobs=max_logprobs, spec=spec)
        self.tokenizer = FakeTokenizer()
        self.tokenizer_root = "/models/fake-model"
        self.processor = FakeProcessor(self.config, self.tokenizer, defaults=defaults)
        self.replicas = [self]  # more are given by `with_engines`
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
        self.resets = 0
        self.sleep_level = 0
        self.slept: list[Any] = []  # (level, wait), or the tags that were woken
        self.event_sources: dict[int, KVEventsConfig] = {}
        self.submitted: list[tuple[list[int], SamplingParams, int, str]] = []
        self.ranks: list[int | None] = []  # of what was submitted
        self.recorded: list[str] = []  # outputs to play in turn, in place of hashes
        self._played = itertools.count()

    def healthy(self) -> bool:
        return self.alive

    def start_again(self, stream: FakeStream) -> None:
        """Nothing is computed twice."""

    async def wait_given_up(self) -> None:
        await asyncio.Event().wait()

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def kv_event_sources(self) -> dict[int, KVEventsConfig]:
        return self.event_sources

    async def sleep(self, level: int, *, wait: bool = False) -> None:
        self.sleep_level = level
        self.slept.append((level, wait))

    async def wake_up(self, tags: Sequence[str]) -> None:
        self.sleep_level = 0
        self.slept.append(list(tags))

    async def run_blocking(self, fn: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, fn, *args)

    run_rendering = run_blocking

    async def close(self, drain_s: float = 0) -> None:
        for stream in list(self.running):
            stream.abort()

    def check_room(self) -> None:
        if self.sleep_level:
            raise EngineAsleepError
        if self.busy:
            raise EngineBusyError("The engine is currently busy and cannot accept new requests.")

    def submit(self, prompt_ids: list[int], params: SamplingParams, **options: Any) -> list[FakeStream]:
        self.processor.check_prompt(prompt_ids)
        return self._start(prompt_ids, params, **options)

    def _start(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        rank: int | None = None,
    ) -> list[FakeStream]:
        self.ranks.append(rank)
        if not self.alive:
            raise EngineDeadError("The engine is being started again.")
        self.check_room()
        if self.capacity is not None and len(self.running) + params.n > self.capacity:
            raise EngineBusyError("The engine is currently busy and cannot accept new requests.")
        prepared = self.processor.prepare(params, priority=priority, cache_salt=cache_salt)
        requests = self.processor.samples(prompt_ids, prepared)
        self.submitted.append((prompt_ids, params, priority, cache_salt))
        self.stats = EngineStats(prompt_tokens=self.stats.prompt_tokens + len(prompt_ids))
        self.observer.on_step(self.stats)
        # Without a seed the samples differ between children, but not between runs of a test.
        return [
            FakeStream(self, request, f"{i}" if request.seed is None else "")
            for i, request in enumerate(requests)
        ]

    async def submit_all(
        self, prompts: Sequence[list[int]], params: SamplingParams, **options: Any
    ) -> list[FakeStream]:
        streams: list[FakeStream] = []
        try:
            for prompt in prompts:
                await asyncio.sleep(0)
                streams += self._start(prompt, params, **options)
        except BaseException:
            for stream in streams:
                stream.abort()
            raise
        return streams

    def generate(self, request: EngineRequest, salt: str) -> list[TextDelta]:
        """All deltas of a sequence, one token each."""
        if self.recorded:
            return self._play(self.recorded[next(self._played) % len(self.recorded)], request)
        params, prompt = request.params, request.prompt_token_ids
        knobs = _knobs(request, salt)
        made: list[int] = []
        deltas: list[TextDelta] = []
        text = ""
        held = max((len(s) for s in params.stop), default=1) - 1
        shown = 0
        while True:
            context = prompt + made
            token = self._next(context, knobs, params.allowed_token_ids or LETTERS)
            made.append(token)
            may_stop = len(made) >= params.min_tokens
            finish: str | None = None
            reason: int | str | None = None
            if may_stop and token == request.eos_token_id:
                finish = "stop"
            elif may_stop and token in request.stop_token_ids:
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
            if finish is None and _repeats(made, params):
                finish, reason = "repetition", REPEATED
            until = len(text) if finish else max(shown, len(text) - held)
            logprobs = None
            if params.logprobs is not None:
                logprobs = [score(context, token, params.logprobs, params.logprob_token_ids)]
            deltas.append(TextDelta([token], text[shown:until], finish, reason, logprobs))
            shown = until
            if finish:
                return deltas

    def _play(self, text: str, request: EngineRequest) -> list[TextDelta]:
        """The deltas of a recorded output, up to `max_tokens` of it, made by the real detokenizer."""
        processor, params = OutputProcessor(self.tokenizer, request), request.params  # type: ignore[arg-type]
        tokens = [*self.tokenizer.encode(text, False), EOS][: params.max_tokens]
        deltas = []
        for place, token in enumerate(tokens):
            end = None
            if place == len(tokens) - 1:
                end = FinishReason.STOP if token == EOS else FinishReason.LENGTH
            logprobs = None
            if params.logprobs is not None:
                logprobs = [score(request.prompt_token_ids + tokens[:place], token, params.logprobs)]
            deltas.append(processor.process(StepOutput(-1, [token], end, logprobs=logprobs)))
            if deltas[-1].finish_reason is not None:
                break
        return deltas

    @staticmethod
    def score_prompt(request: EngineRequest) -> list[TokenLogprobs] | None:
        ids, count = request.prompt_token_ids, request.params.prompt_logprobs
        if count is None:
            return None
        return [score(ids[:i], ids[i], count) for i in range(1, len(ids))]

    @staticmethod
    def _next(context: list[int], knobs: str, letters: Sequence[int]) -> int:
        digest = hashlib.sha256(f"{context}{knobs}".encode()).digest()
        return EOS if digest[0] < 12 else letters[digest[1] % len(letters)]


def vector_of(ids: Sequence[int]) -> np.ndarray:
    """The vector of a text whose model makes them, [8] float32; not of length 1."""
    numbers = random.Random(repr(list(ids)))
    return np.array([numbers.uniform(-3, 3) for _ in range(8)], np.float32)


def _knobs(request: EngineRequest, salt: str) -> str:
    """Everything that changes which token comes next."""
    params = request.params
    drawn = (params.temperature, params.top_p, params.top_k, params.min_p, request.seed, salt)
    forced = (
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        sorted(params.logit_bias.items()),
        request.bad_word_ids,
        params.thinking,
        request.grammar,
    )
    plain = forced == (0, 0, 1, [], [], None, "")
    return ("greedy" if params.greedy else repr(drawn)) + ("" if plain else repr(forced))


def _repeats(made: list[int], params: SamplingParams) -> bool:
    wish = params.repetition_detection
    if wish is None:
        return False
    for size in range(max(1, wish.min_pattern_size), wish.max_pattern_size + 1):
        tail = made[-size * wish.min_count :]
        if len(tail) == size * wish.min_count and tail == tail[:size] * wish.min_count:
            return True
    return False


def score(context: Sequence[int], token: int, count: int, ids: Sequence[int] | None = None) -> TokenLogprobs:
    """What the engine would report for `token` behind `context`; a hash of the context decides."""
    numbers = random.Random(repr(list(context)))
    logits = [numbers.uniform(-6, 6) for _ in range(VOCAB_SIZE)]
    logits[IMPOSSIBLE] = -math.inf
    total = math.log(sum(map(math.exp, logits)))
    logprobs = [logit - total for logit in logits]
    order = sorted(range(VOCAB_SIZE), key=lambda i: -logprobs[i])
    others = ids if ids is not None else order if count < 0 else order[:count]
    rank = 1 + sum(value > logprobs[token] for value in logprobs)
    shown = [token, *others]
    return TokenLogprobs(shown, [logprobs[i] for i in shown], rank)


def with_engines(count: int) -> FakeClient:
    """A client of several engines; the first stands for all of them."""
    client = FakeClient()
    client.config = replace(client.config, data_parallel_size=count)
    client.replicas += [FakeClient() for _ in range(count - 1)]
    return client


def fresh(**changes: Any) -> FakeClient:
    """A client with attributes set: `fresh(delay=0.01, stall_after=2)`."""
    client = FakeClient()
    for name, value in changes.items():
        if not hasattr(client, name):
            raise AttributeError(name)
        setattr(client, name, value)
    return client


__all__ = [
    "BOS",
    "EOS",
    "IMPOSSIBLE",
    "VOCAB_SIZE",
    "FakeClient",
    "TextDelta",
    "fresh",
    "score",
    "vector_of",
    "with_engines",
]
