"""Serves POST /v1/completions: continues texts or token ids, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.generation import Generation, ObjectChunks
from microvllm.openai_compat.api.logprobs import CompletionLogprobs, TokenText, as_token_ids, prompt_logprobs
from microvllm.openai_compat.api.prompts import (
    Truncation,
    check_total,
    prompt_texts,
    split_prompts,
    tokenize_prompts,
)
from microvllm.openai_compat.api.requests import CompletionRequest
from microvllm.openai_compat.api.sampling import sampling_params
from microvllm.openai_compat.api.streams import Outcome
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.text.detokenizer import TextDelta

if TYPE_CHECKING:
    from microvllm.openai_compat.api.streams import Stream
    from microvllm.runtime.request import SamplingParams, TokenLogprobs

MAX_SEQUENCES = 4096  # prompts times n
DEFAULT_MAX_TOKENS = 16

_PLAIN_END = (
    b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null,'
    b'"weight_versions":null}],"kv_transfer_params":null}\n\n'
)


async def create_completion(request: Request, state: ServerState, body: CompletionRequest) -> Response:
    """Continues one or several texts, whole or as a stream of events."""
    return await Completion(request, state, body).respond()


class Completion(Generation[CompletionRequest]):
    """A request with prompts. `prompt_only`: it scores its prompts and generates nothing."""

    id_prefix = "cmpl"
    scores_prompt_only = True  # whether `echo` with `max_tokens` 0 does so

    def __init__(self, request: Request, state: ServerState, body: CompletionRequest) -> None:
        self.prompt_only = self.scores_prompt_only and body.echo and body.max_tokens == 0
        self._echoes: list[str] = []
        super().__init__(request, state, body)

    def sampling_params(self) -> SamplingParams:
        body = self.body
        if self.prompt_only and body.logprob_token_ids:
            raise InvalidRequestError(
                "`logprob_token_ids` is not supported with `echo` and `max_tokens=0`, "
                "which generate no tokens.",
                "logprob_token_ids",
            )
        of_prompt = body.prompt_logprobs
        if of_prompt is None and body.echo:
            of_prompt = body.logprobs
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        return sampling_params(
            body,
            self.state.client,
            max_tokens=1 if self.prompt_only else max_tokens,  # the engine generates at least one token
            max_tokens_field="max_tokens",
            logprobs=body.logprobs,
            prompt_logprobs=of_prompt,
        )

    async def read_prompts(self) -> list[list[int]]:
        body, n = self.body, self.params.n
        client = self.state.client
        limit = client.config.max_model_len
        truncation = Truncation.of(body, limit)
        given = split_prompts(body.prompt, limit, truncation)
        if len(given) * n > MAX_SEQUENCES:
            raise InvalidRequestError(
                f"{len(given)} prompts with n={n} are more than {MAX_SEQUENCES} sequences.", "n"
            )
        check_total(sum(len(prompt) for prompt in given if type(prompt) is list), n)
        ids = await client.run_blocking(tokenize_prompts, client, given, body.add_special_tokens, truncation)
        check_total(sum(map(len, ids)), n)
        if body.echo:
            self._echoes = await client.run_blocking(prompt_texts, client, given, ids, truncation)
        return ids

    async def submit(self, prompts: Sequence[list[int]]) -> None:
        await super().submit(prompts)
        if self.prompt_only:
            self.streams = [cast("Stream", PromptOnly(stream)) for stream in self.streams]

    def answer(
        self, outcomes: Sequence[Outcome], usage: dict[str, Any], metrics: dict[str, float | None] | None
    ) -> bytes:
        """Return the body; its members and their order are vLLM's, nulls included."""
        with_ids = self.body.return_token_ids
        members: list[orjson.Fragment] = []
        for index, (stream, choice, outcome) in enumerate(
            zip(self.streams, self.choices(), outcomes, strict=True)
        ):
            text, logprobs = choice.format_piece(outcome.text, outcome.token_ids, outcome.logprobs)
            member = {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": outcome.finish_reason,
                "stop_reason": outcome.stop_reason,
                "token_ids": outcome.token_ids if with_ids else None,
                "prompt_logprobs": prompt_logprobs(self.state.client.tokenizer, stream),
                "prompt_token_ids": stream.prompt_token_ids if with_ids else None,
                "routed_experts": None,
                "weight_versions": None,
            }
            # One by one: the interpreter's lock is held while JSON is written, and the event loop waits.
            members.append(orjson.Fragment(orjson.dumps(member)))
        return orjson.dumps(
            {
                "id": self.id,
                "object": "text_completion",
                "created": self.created,
                "model": self.model,
                "choices": members,
                "service_tier": None,
                "system_fingerprint": self.state.fingerprint,
                "usage": usage,
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": metrics,
            }
        )

    def chunks(self) -> CompletionChunks:
        return CompletionChunks(self)

    def choices(self) -> list[Choice]:
        """Return one writer per stream."""
        with_logprobs = self.body.logprobs is not None
        as_ids = as_token_ids(self.body, self.state.args)
        tokenizer = self.state.client.tokenizer
        return [
            Choice(
                stream,
                self._echoes[index // self.params.n] if self._echoes else None,
                CompletionLogprobs(TokenText(tokenizer, as_ids)) if with_logprobs else None,
            )
            for index, stream in enumerate(self.streams)
        ]


class Choice:
    """Writes the text and log probabilities of one choice; `echo` is the prompt's text, which comes first.

    `logprobs` is None unless they were requested. With `echo` those of the prompt come first, too.
    """

    def __init__(self, stream: Stream, echo: str | None, logprobs: CompletionLogprobs | None) -> None:
        self.plain = echo is None and logprobs is None
        self.echoes = echo is not None
        self.begun = False
        self._stream = stream
        self._echo = echo
        self._logprobs = logprobs

    def format_piece(
        self, text: str, token_ids: Sequence[int], entries: Sequence[TokenLogprobs] | None
    ) -> tuple[str, dict[str, Any] | None]:
        """Return the text and the `logprobs` object of the next tokens."""
        known: list[TokenLogprobs | None] = list(entries or [])
        if self._echo is not None and not self.begun:
            text = self._echo + text
            token_ids = [*self._stream.prompt_token_ids, *token_ids]
            known = [None, *(self._stream.prompt_logprobs or []), *known]
        self.begun = True
        return text, None if self._logprobs is None else self._logprobs.format_tokens(token_ids, known)


class CompletionChunks(ObjectChunks):
    """Writes one chunk per delta."""

    def __init__(self, completion: Completion) -> None:
        super().__init__(completion, "text_completion")
        self._choices = completion.choices()
        self._plain = not self._with_ids and all(choice.plain for choice in self._choices)

    @property
    def stateless(self) -> bool:
        return self._plain

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        if self._plain and delta.finish_reason is None and not usage:
            return b'%s%d,"text":%s%s' % (self._head, index, orjson.dumps(delta.text), _PLAIN_END)
        choice = self._choices[index]
        token_ids = delta.token_ids if self._with_ids else None
        prompt_ids = None
        if not choice.begun and (self._with_ids or choice.echoes):  # with `echo` always, as in vLLM
            prompt_ids = self._streams[index].prompt_token_ids
        text, logprobs = choice.format_piece(delta.text, delta.token_ids, delta.logprobs)
        return (
            b'%s%d,"text":%s,"logprobs":%s,"finish_reason":%s,"stop_reason":%s,"prompt_token_ids":%s,'
            b'"token_ids":%s,"weight_versions":null}]%s%s,"kv_transfer_params":null}\n\n'
        ) % (
            self._head,
            index,
            orjson.dumps(text),
            orjson.dumps(logprobs),
            orjson.dumps(delta.finish_reason),
            orjson.dumps(delta.stop_reason),
            orjson.dumps(prompt_ids),
            orjson.dumps(token_ids),
            usage,
            b"" if delta.finish_reason is None else self._last,
        )


class PromptOnly:
    """Presents a stream of one token as a stream of none, for `echo` with `max_tokens` 0."""

    num_generated_tokens = 0

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        async for _ in self._stream:
            pass
        yield TextDelta(token_ids=[], text="", finish_reason="length")


ENDPOINTS = (
    Endpoint(
        path="/v1/completions",
        methods=("POST",),
        handler=create_completion,
        body=CompletionRequest,
        answer="CompletionResponse",
        event="CompletionStreamResponse",
        generates=True,
    ),
)
