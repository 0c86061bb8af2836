"""Serves POST /v1/responses: answers items as a chat, and writes the output as items."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.chat import Chat
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.generation import Chunks
from microvllm.openai_compat.api.logprobs import ChatLogprobs, TokenText, as_token_ids
from microvllm.openai_compat.api.responses.events import OutputWriter
from microvllm.openai_compat.api.responses.logprobs import OutputLogprobs
from microvllm.openai_compat.api.responses.reading import (
    ReadBody,
    check_fields,
    read_body,
    renamed,
    shortened,
    stores,
)
from microvllm.openai_compat.api.responses.requests import ENCRYPTED, Reasoning, ResponsesRequest
from microvllm.openai_compat.api.responses.store import ID_PREFIX, UNFINISHED, StoredResponse
from microvllm.openai_compat.api.streams import Outcome
from microvllm.openai_compat.errors import INTERNAL
from microvllm.openai_compat.parsers.events import Content
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import ContextLengthError, EngineError, InvalidRequestError, RequestError
from microvllm.runtime.text.detokenizer import TextDelta

logger = logging.getLogger("microvllm.server")


async def create_response(request: Request, state: ServerState, body: ResponsesRequest) -> Response:
    """Answers a conversation that is given as items: whole, as a stream of events, or in the background.

    The response is kept in memory for `previous_response_id` and to be read again, unless `store` is false.
    """
    try:
        return await (await _read(request, state, body)).respond()
    except InvalidRequestError as error:
        raise renamed(error) from None


async def count_input_tokens(request: Request, state: ServerState, body: ResponsesRequest) -> Response:
    """Counts the tokens of the prompt that such a request would have; nothing is generated."""
    try:
        prompts = await (await _read(request, state, body)).prepare()
    except InvalidRequestError as error:
        raise renamed(error) from None
    counted = {"object": "response.input_tokens", "input_tokens": len(prompts[0])}
    return Response(orjson.dumps(counted), media_type="application/json")


async def _read(request: Request, state: ServerState, body: ResponsesRequest) -> ModelResponse:
    check_fields(body, state.responses)
    # In a thread: sealed reasoning, cut-off arguments and stored turns take longer than a turn of the loop.
    read = await state.client.run_blocking(read_body, body, state.responses)
    return ModelResponse(request, state, body, read)


class ModelResponse(Chat):
    """A chat whose output is written as a response. `asked` is the request as it came."""

    id_prefix = "resp"
    end = b""  # the event with the whole response is the last

    def __init__(
        self,
        request: Request,
        state: ServerState,
        asked: ResponsesRequest,
        read: ReadBody,
    ) -> None:
        body = read.chat
        super().__init__(request, state, body)
        # Not of a header: the id gives access to what is stored under it, so no other request may take it.
        suffix = body.request_id or uuid.uuid4().hex
        self.id = ID_PREFIX + suffix
        self._check_id()
        self.include_usage = self.continuous_usage = False  # the last event has it
        self.asked = asked
        self.stores = stores(asked, state.responses)
        self._input = read.items
        self._held = 0  # bytes of it that are counted
        asked.input = ""
        self.writer = OutputWriter(suffix, read.tools, sealed=ENCRYPTED in asked.include)
        self._logprobs: OutputLogprobs | None = None
        self._num_tokens = 0
        self._finish_reason: str | None = None
        self._final: bytes | None = None
        self._kept = False

    def _check_id(self) -> None:
        if self.id in self.state.responses or self.id in self.state.background:
            raise InvalidRequestError(f"There is a response with the id {self.id} already.", "request_id")

    async def read_prompts(self) -> list[list[int]]:
        try:
            return await super().read_prompts()
        except ContextLengthError:
            if self.asked.truncation != "auto":
                raise
        self.body.messages = await self.state.client.run_rendering(shortened, self.state, self.body)
        return await super().read_prompts()

    async def submit(self, prompts: Sequence[list[int]]) -> None:
        self.state.responses.hold(len(self._input))
        self._held = len(self._input)
        try:
            await super().submit(prompts)
        except BaseException:
            self._release()
            raise

    def abort(self) -> None:
        super().abort()
        self._release()

    def _release(self) -> None:
        self.state.responses.release(self._held)
        self._held = 0

    # ---- whole, as a stream, in the background ------------------------------------------------------

    async def respond(self) -> Response:
        if not self.asked.background:
            return await super().respond()
        await self.submit(await self.prepare())
        try:
            self._check_id()  # again: another request with this id may have come meanwhile
        except InvalidRequestError:
            self.abort()
            raise
        queued = self.finished("queued")
        self.state.lifecycle.active += 1  # a server that stops waits for it
        self.state.num_generations += 1
        task = self.state.background[self.id] = asyncio.ensure_future(self._run())
        task.add_done_callback(self._ended_in_background)
        return Response(queued, media_type="application/json")

    async def _run(self) -> None:
        """Generate in the background, and store the end whatever it is."""
        self.finished("in_progress")
        try:
            with self.state.lifecycle.interruptible({}):
                await self._whole_answer()
        except (EngineError, RequestError) as error:
            self.finished("failed", error)
        except Exception:
            logger.exception("Generating %s failed.", self.id)
            self.finished("failed", EngineError(INTERNAL))

    def _ended_in_background(self, task: asyncio.Task[None]) -> None:
        # A task may be cancelled before it has run at all, so this is no part of it.
        if task.cancelled():
            self.finished("cancelled")
        self.abort()
        self.state.background.pop(self.id, None)
        self.state.lifecycle.active -= 1
        self.state.num_generations -= 1

    def answer(
        self, outcomes: Sequence[Outcome], usage: dict[str, Any], metrics: dict[str, float | None] | None
    ) -> bytes:
        for outcome in outcomes:
            piece = TextDelta(
                outcome.token_ids,
                outcome.text,
                outcome.finish_reason,
                outcome.stop_reason,
                outcome.logprobs,
            )
            deque(self.feed(piece), maxlen=0)
        return self._end()

    def _end(self) -> bytes:
        deque(self.close(), maxlen=0)
        return self.finished(self.status)

    async def _whole_answer(self) -> bytes:
        if self.params.logprobs is None or self.parsing.is_plain:
            return await super()._whole_answer()
        # Token by token, to know which log probabilities belong to the text.
        async for delta in self.streams[0]:
            deque(self.feed(delta), maxlen=0)
            await asyncio.sleep(0)
        return self._end()

    def read_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Leave the choices to `answer`, which reads them as a stream's."""

    def chunks(self) -> ResponseChunks:
        return ResponseChunks(self)

    def failure(self, error: RequestError | EngineError) -> bytes:
        """Return the events of a failure: the end of the open item, and the failed response."""
        events = self.opening()
        if self.writer.items:
            events += self.writer.end("incomplete")
        return b"".join((*events, self._last("failed", error)))

    # ---- events -------------------------------------------------------------------------------------

    def opening(self) -> list[bytes]:
        """Return the events that come first, once."""
        if self.writer.begun:
            return []
        response = orjson.Fragment(self.finished("in_progress", store=False))
        return [
            self.writer.event(kind, response=response)
            for kind in ("response.created", "response.in_progress")
        ]

    def feed(self, piece: TextDelta) -> Iterator[bytes]:
        """Yield the events of the next tokens."""
        if not self.parsed:
            self.choices()
        self._num_tokens += len(piece.token_ids)
        self._finish_reason = piece.finish_reason
        choice = self.parsed[0]
        events = choice.feed(piece)
        if self.params.logprobs is None:
            yield from self.writer.feed(events)
            return
        tokenizer, params = self.state.client.tokenizer, self.params
        if self._logprobs is None:
            text = TokenText(tokenizer, as_token_ids(self.body, self.state.args))
            unseen = tokenizer.special_ids if params.skip_special_tokens else frozenset()
            ends_unseen = not params.include_stop_str_in_output
            self._logprobs = OutputLogprobs(ChatLogprobs(text, params.logprobs or 0), unseen, ends_unseen)
        self._logprobs.add(piece)
        if self.parsing.is_plain:
            yield from self.writer.feed([Content(piece.text)], self._logprobs.take_all())
            return
        for event, entries in zip(events, self._logprobs.take(events, choice.held), strict=True):
            yield from self.writer.feed([event], entries)

    def close(self) -> Iterator[bytes]:
        """Yield the events that end the last item."""
        yield from self.writer.end("incomplete" if self.status == "incomplete" else "completed")

    def closing(self) -> list[bytes]:
        """Return the last events of a stream."""
        return [*self.close(), self._last(self.status)]

    def _last(self, status: str, error: RequestError | EngineError | None = None) -> bytes:
        response = orjson.Fragment(self.finished(status, error))
        return self.writer.event(f"response.{status}", response=response)

    @property
    def status(self) -> str:
        return {"length": "incomplete", "abort": "failed"}.get(self._finish_reason or "", "completed")

    # ---- the object ---------------------------------------------------------------------------------

    def finished(
        self, status: str, error: RequestError | EngineError | None = None, *, store: bool = True
    ) -> bytes:
        """Return the response as JSON in this state, and store it if the request stores.

        Its first end is the only one: it may be cancelled while it completes.
        """
        if self._final is not None:
            return self._final
        if status == "failed" and error is None:
            error = EngineError("The engine ended the request.")
        response = orjson.dumps(self._object(status, error))
        if status not in UNFINISHED:
            self._final = response
        # Two requests at a time may have the same `request_id`: the first to end keeps it.
        if store and self.stores and (self._kept or self.id not in self.state.responses):
            self._kept = True
            stored = StoredResponse(response, self._input, self.asked.previous_response_id)
            self.state.responses.put(self.id, stored)
        return response

    def _object(self, status: str, error: RequestError | EngineError | None) -> dict[str, Any]:
        asked, params = self.asked, self.params
        reasoning, text = asked.reasoning or Reasoning(), asked.text
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": asked.background,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None if error is None else {"code": _error_code(error), "message": str(error)},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.model,
            "output": [] if status in UNFINISHED else self.writer.items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": self.stores,
            "temperature": params.temperature,
            "text": {
                "format": (text and text.format) or {"type": "text"},
                "verbosity": text and text.verbosity,
            },
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools,
            "top_logprobs": asked.top_logprobs,
            "top_p": params.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": None if status in UNFINISHED else self._usage(),
            "user": asked.user,
        }

    def _usage(self) -> dict[str, Any]:
        prompt, output = self.prompt_tokens, self._num_tokens
        cached = sum(stream.num_cached_tokens for stream in self.streams)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens or 0},
            "total_tokens": prompt + output,
        }


class ResponseChunks(Chunks):
    """Writes the events of a stream."""

    def __init__(self, response: ModelResponse) -> None:
        self._response = response

    def opening(self) -> Sequence[bytes]:
        return self._response.opening()

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        return b"".join(self._response.feed(delta))

    def closing(self) -> Sequence[bytes]:
        return self._response.closing()

    def final_usage(self, counts: bytes, metrics: bytes) -> bytes:
        return b""


def _error_code(error: RequestError | EngineError) -> str:
    return "rate_limit_exceeded" if error.status == 503 else "server_error"


ENDPOINTS = (
    Endpoint(
        path="/v1/responses",
        methods=("POST",),
        handler=create_response,
        body=ResponsesRequest,
        answer="ResponsesResponse",
        event="ResponsesStreamEvent",
        named_events=True,
        generates=True,
    ),
    Endpoint(
        path="/v1/responses/input_tokens",
        methods=("POST",),
        handler=count_input_tokens,
        body=ResponsesRequest,
        answer="InputTokens",
    ),
)
