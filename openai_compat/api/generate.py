"""Serves POST /generate and /generate_stream: continues one prompt, without OpenAI's choices around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.completions import DEFAULT_MAX_TOKENS
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.generation import Chunks, Generation
from microvllm.openai_compat.api.prompts import Truncation, tokenize_prompts
from microvllm.openai_compat.api.requests import PromptRequest, PromptStreamRequest
from microvllm.openai_compat.api.sampling import sampling_params
from microvllm.openai_compat.state import ServerState

if TYPE_CHECKING:
    from microvllm.openai_compat.api.streams import Outcome
    from microvllm.runtime.request import SamplingParams
    from microvllm.runtime.text.detokenizer import TextDelta


async def generate(request: Request, state: ServerState, body: PromptRequest) -> Response:
    """Continues one text; returns the new text, whole unless `stream` is true.

    The text does not repeat the prompt. Nothing is put around the prompt but what the tokenizer adds: a chat
    template is for `/v1/chat/completions`.
    """
    return await Text(request, state, body).respond()


async def generate_stream(request: Request, state: ServerState, body: PromptStreamRequest) -> Response:
    """Continues one text as a stream of events, one a token.

    The same as `/generate`, but for the default of `stream`. The last token's event has a `finish_reason`;
    then comes `[DONE]`. The text of an event is empty inside of a character of several tokens.
    """
    return await Text(request, state, body).respond()


class Text(Generation[PromptRequest]):
    """A request with one prompt."""

    id_prefix = "gen"

    def sampling_params(self) -> SamplingParams:
        max_tokens = self.body.max_tokens
        return sampling_params(
            self.body,
            self.state.client,
            max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            max_tokens_field="max_tokens",
            logprobs=None,
            prompt_logprobs=None,
        )

    async def read_prompts(self) -> list[list[int]]:
        client, body = self.state.client, self.body
        truncation = Truncation.of(body, client.config.max_model_len)
        return await client.run_blocking(
            tokenize_prompts, client, [body.prompt], body.add_special_tokens, truncation
        )

    def answer(
        self, outcomes: Sequence[Outcome], usage: dict[str, Any], metrics: dict[str, float | None] | None
    ) -> bytes:
        (outcome,) = outcomes
        return orjson.dumps(
            {
                "id": self.id,
                "text": outcome.text,
                "finish_reason": outcome.finish_reason,
                "stop_reason": outcome.stop_reason,
                "token_ids": outcome.token_ids if self.body.return_token_ids else None,
                "usage": usage,
                "metrics": metrics,
            }
        )

    def chunks(self) -> TextChunks:
        return TextChunks(self.id, self.body.return_token_ids)


class TextChunks(Chunks):
    """Writes one event per delta, with a whole response's members; `usage` and `metrics` if requested."""

    def __init__(self, id_: str, with_ids: bool) -> None:
        self._head = b'data: {"id":%s,"text":' % orjson.dumps(id_)
        self._with_ids = with_ids

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        return b'%s%s,"finish_reason":%s,"stop_reason":%s,"token_ids":%s%s}\n\n' % (
            self._head,
            orjson.dumps(delta.text),
            orjson.dumps(delta.finish_reason),
            orjson.dumps(delta.stop_reason),
            orjson.dumps(delta.token_ids) if self._with_ids else b"null",
            usage,
        )

    def final_usage(self, counts: bytes, metrics: bytes) -> bytes:
        end = b'"","finish_reason":null,"stop_reason":null,"token_ids":null,"usage":'
        return self._head + end + counts + metrics + b"}\n\n"


ENDPOINTS = (
    Endpoint(
        path="/generate",
        methods=("POST",),
        handler=generate,
        body=PromptRequest,
        answer="Generation",
        event="GenerationChunk",
        generates=True,
    ),
    Endpoint(
        path="/generate_stream",
        methods=("POST",),
        handler=generate_stream,
        body=PromptStreamRequest,
        answer="Generation",
        event="GenerationChunk",
        generates=True,
    ),
)
