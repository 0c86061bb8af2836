"""POST /v1/completions: text (or token ids) in, text out, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api import prompts
from microvllm.openai_compat.api.completion_chunks import Choice, CompletionChunks
from microvllm.openai_compat.api.endpoint import Body, Endpoint
from microvllm.openai_compat.api.generation import Generation, Outcome, Stream, begin, priority_of
from microvllm.openai_compat.api.logprobs import CompletionLogprobs, TokenText, as_token_ids, prompt_logprobs
from microvllm.openai_compat.api.sampling import check_prompt_logprobs, sampling_params
from microvllm.openai_compat.api.schemas import COMPLETIONS
from microvllm.openai_compat.api.sse import EventStream, StreamOptions, event_chunks
from microvllm.openai_compat.api.usage import usage
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.text.detokenizer import TextDelta

if TYPE_CHECKING:
    from microvllm.runtime.observer import RequestTiming
    from microvllm.runtime.request import SamplingParams, TokenLogprobs

MAX_SEQUENCES = 4096  # prompts times n
INLINE_CHOICES = 64  # answers with more are put together in a worker thread
DEFAULT_MAX_TOKENS = 16

COMPLETION_BODY = Body("CompletionRequest", COMPLETIONS)


async def create_completion(request: Request, state: ServerState, fields: Mapping[str, Any]) -> Response:
    """Continues one or several texts, whole or as a stream of events."""
    generation = begin(request, fields, state, "cmpl")
    prompt_only = fields["echo"] and fields["max_tokens"] == 0
    params = completion_params(fields, state, prompt_only)
    priority = priority_of(request, fields)
    ids, texts = await read_prompts(fields, state, params.n)
    await generation.submit(state, ids, params, fields, priority)
    if prompt_only:
        generation.streams = [PromptOnly(stream) for stream in generation.streams]
    choices = _choices(fields, state, generation, texts)
    if fields["stream"]:
        options = StreamOptions.of(fields, state.args)
        writer = CompletionChunks(
            generation,
            choices,
            fingerprint=state.fingerprint,
            with_ids=fields["return_token_ids"],
            usage_follows=options.include_usage,
        )
        return EventStream(generation, event_chunks(generation, writer, options), state.lifecycle)
    try:
        body = await state.lifecycle.run(_answer(generation, state, fields, choices), request.receive)
    finally:
        generation.abort()
    return Response(body, media_type="application/json")


def completion_params(fields: Mapping[str, Any], state: ServerState, prompt_only: bool) -> SamplingParams:
    """The sampling parameters of a completion; `prompt_only` asks for no new token."""
    check_prompt_logprobs(fields)
    if prompt_only and fields["logprob_token_ids"]:
        raise InvalidRequestError(
            "`logprob_token_ids` is not supported with `echo` and `max_tokens=0`, which generate no tokens.",
            "logprob_token_ids",
        )
    of_prompt = fields["prompt_logprobs"]
    if of_prompt is None and fields["echo"]:
        of_prompt = fields["logprobs"]
    max_tokens = DEFAULT_MAX_TOKENS if fields["max_tokens"] is None else fields["max_tokens"]
    return sampling_params(
        fields,
        state.client,
        max_tokens=1 if prompt_only else max_tokens,  # the engine cannot run without making a token
        max_tokens_field="max_tokens",
        logprobs=fields["logprobs"],
        prompt_logprobs=of_prompt,
    )


async def read_prompts(
    fields: Mapping[str, Any], state: ServerState, n: int
) -> tuple[list[list[int]], Sequence[str | None]]:
    """The token ids of every prompt, and its text where `echo` asks for it."""
    client = state.client
    limit = client.config.max_model_len
    truncation = prompts.Truncation.of(fields, limit)
    given = prompts.split_prompts(fields["prompt"], limit, truncation)
    if len(given) * n > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{len(given)} prompts with n={n} are more than {MAX_SEQUENCES} sequences.", "n"
        )
    prompts.check_total(sum(len(prompt) for prompt in given if type(prompt) is list), n)
    ids = await client.run_blocking(
        prompts.tokenize_prompts, client, given, fields["add_special_tokens"], truncation
    )
    prompts.check_total(sum(map(len, ids)), n)
    if not fields["echo"]:
        return ids, [None] * len(ids)
    return ids, await client.run_blocking(prompts.prompt_texts, client, given, ids, truncation)


def _choices(
    fields: Mapping[str, Any], state: ServerState, generation: Generation, texts: Sequence[str | None]
) -> list[Choice]:
    as_ids = as_token_ids(fields, state.args)
    return [
        Choice(
            stream,
            texts[index // generation.n],
            None
            if fields["logprobs"] is None
            else CompletionLogprobs(TokenText(state.client.tokenizer, as_ids)),
        )
        for index, stream in enumerate(generation.streams)
    ]


class PromptOnly:
    """A stream without its only token: `echo` with `max_tokens` 0 asks for no more than the prompt."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.name = stream.name
        self.prompt_token_ids = stream.prompt_token_ids

    @property
    def num_cached_tokens(self) -> int:
        return self._stream.num_cached_tokens

    @property
    def num_generated_tokens(self) -> int:
        return 0

    @property
    def num_preemptions(self) -> int:
        return self._stream.num_preemptions

    @property
    def end_reason(self) -> str | None:
        return self._stream.end_reason

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None:
        return self._stream.prompt_logprobs

    @property
    def timing(self) -> RequestTiming:
        return self._stream.timing

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        async for _ in self._stream:
            pass
        yield TextDelta(token_ids=[], text="", finish_reason="length")

    def abort(self) -> None:
        self._stream.abort()


async def _answer(
    generation: Generation, state: ServerState, fields: Mapping[str, Any], choices: Sequence[Choice]
) -> bytes:
    outcomes = await generation.collect()
    small = len(outcomes) <= INLINE_CHOICES and not fields["return_token_ids"]
    if small and fields["logprobs"] is None and fields["prompt_logprobs"] is None:
        return _body(generation, state, fields, choices, outcomes)
    # Log probabilities can be a hundred times as much text as the answer.
    return await state.client.run_blocking(_body, generation, state, fields, choices, outcomes)


def _body(
    generation: Generation,
    state: ServerState,
    fields: Mapping[str, Any],
    choices: Sequence[Choice],
    outcomes: Sequence[Outcome],
) -> bytes:
    """The JSON body of a whole answer; members and their order are vLLM's, nulls included."""
    with_ids = fields["return_token_ids"]
    members: list[orjson.Fragment] = []
    for index, (stream, choice, outcome) in enumerate(
        zip(generation.streams, choices, outcomes, strict=True)
    ):
        text, logprobs = choice.take(outcome.text, outcome.token_ids, outcome.logprobs)
        of_prompt = stream.prompt_logprobs
        member = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": outcome.finish_reason,
            "stop_reason": outcome.stop_reason,
            "token_ids": outcome.token_ids if with_ids else None,
            "prompt_logprobs": None
            if of_prompt is None
            else prompt_logprobs(state.client.tokenizer, stream.prompt_token_ids, of_prompt),
            "prompt_token_ids": stream.prompt_token_ids if with_ids else None,
            "routed_experts": None,
            "weight_versions": None,
        }
        # One by one: the interpreter's lock is held while JSON is written, and the event loop waits for it.
        members.append(orjson.Fragment(orjson.dumps(member)))
    completion_tokens = sum(len(outcome.token_ids) for outcome in outcomes)
    cached = generation.cached_tokens if state.args.enable_prompt_tokens_details else None
    return orjson.dumps(
        {
            "id": generation.id,
            "object": "text_completion",
            "created": generation.created,
            "model": generation.model,
            "choices": members,
            "service_tier": None,
            "system_fingerprint": state.fingerprint,
            "usage": usage(generation.prompt_tokens, completion_tokens, cached),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": generation.metrics(completion_tokens)
            if state.args.enable_per_request_metrics
            else None,
        }
    )


ENDPOINTS = (
    Endpoint(
        path="/v1/completions",
        methods=("POST",),
        handler=create_completion,
        body=COMPLETION_BODY,
        answer="CompletionResponse",
        event="CompletionStreamResponse",
        generates=True,
    ),
)
