"""The output of one sequence, as the API process reads it. Imports no torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from microvllm.runtime.errors import EngineError, RequestError
from microvllm.runtime.metrics.observer import EngineObserver, SampleGroup, TrackedSequence
from microvllm.runtime.request import EngineRequest, StepOutput, TokenLogprobs
from microvllm.runtime.text.detokenizer import OutputProcessor, TextDelta
from microvllm.runtime.text.tokenizer import Tokenizer

logger = logging.getLogger("microvllm.engine")

# Deltas that wait for their consumer one by one: more than a busy event loop is ever behind a fast engine.
MAX_BACKLOG = 64


class StreamOwner(Protocol):
    """The engine that computes a stream, as `microvllm.runtime.process.replica.Replica`."""

    tokenizer: Tokenizer
    observer: EngineObserver

    def abort_request(self, request_id: int) -> None: ...

    def forget_request(self, request_id: int) -> None: ...

    def leave_queue(self, stream: TokenStream, *, started: bool) -> None: ...


class TokenStream(TrackedSequence):
    """The output of one sequence: an async iterator of `TextDelta`, one per step of the engine.

    Beyond `MAX_BACKLOG` waiting deltas, new ones are merged into the last, so that a client that has stopped
    reading costs bounded memory and never holds up the engine. `owner` may change until the first output.
    """

    def __init__(self, owner: StreamOwner, request: EngineRequest, group: SampleGroup) -> None:
        super().__init__(request, group, time.monotonic())
        # One entry per prompt token from the second on, if requested; set when the first delta is.
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.owner = owner
        self.request_id = request.request_id
        self.request = request
        self._text: OutputProcessor | None = None  # made for the first output: a queued request has none
        # A deque would take 0.7 KB in every waiting request.
        self._pending: list[TextDelta] = []
        self._error: EngineError | RequestError | None = None
        self._ended = False
        self.queued = True  # until the first output
        self.queue_tokens = len(request.prompt_token_ids)  # what it counts in the queue
        self.prefill_tokens = 0  # of them: to compute, as far as that is estimated
        self.stays = False  # with its owner, whatever becomes of that
        self._waiter: asyncio.Future[None] | None = None  # of the one consumer, while nothing is pending
        # Takes a delta in the consumer's stead while it waits for one, if it can; never the last one.
        self.direct: Callable[[TextDelta], bool] | None = None

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TextDelta:
        """Return the next delta. Raises `EngineError` or `RequestError` when the request failed."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._pending.pop(0)

    def abort(self) -> None:
        """End the request now; its blocks are free within one step. May be called at any time."""
        if not self._ended:
            self.owner.abort_request(self.request_id)
            self._end("abort")
        self._wake()

    def on_output(self, output: StepOutput, now: float) -> None:
        """Turn the output of a step into a delta and wake the consumer."""
        if self.queued:
            self.queued = False
            self.owner.leave_queue(self, started=bool(output.token_ids or output.pooled))
        try:
            if self._text is None:
                self._text = OutputProcessor(self.owner.tokenizer, self.request)
            delta = self._text.process(output)
        except (EngineError, RequestError) as error:
            if output.finish_reason is None:  # its text failed: the engine does not know
                self.owner.abort_request(self.request_id)
            self.fail(error)
            return
        except Exception as error:  # this request's text logic failed: no other request is concerned
            logger.exception("Detokenising request %d failed.", self.request_id)
            self.owner.abort_request(self.request_id)
            self.fail(EngineError(f"the output could not be turned into text ({type(error).__name__})"))
            return
        self.record_output(output, len(delta.token_ids), now, self.owner.observer)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if delta.finish_reason is None and self._taken(delta):
            return
        if len(self._pending) < MAX_BACKLOG:
            self._pending.append(delta)
        else:
            self._pending[-1].merge(delta)
        if delta.finish_reason is not None:
            if output.finish_reason is None:  # a stop string: the engine does not know yet
                self.owner.abort_request(self.request_id)
            else:
                self.owner.forget_request(self.request_id)
            self._end(delta.finish_reason)
        self._wake()

    def _taken(self, delta: TextDelta) -> bool:
        if self.direct is None or self._waiter is None or self._waiter.done():
            return False
        try:
            return self.direct(delta)
        except Exception:  # the consumer will meet it, too: no other request is concerned
            logger.exception("Writing request %d failed.", self.request_id)
            self.direct = None
            return False

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # done: its consumer was cancelled
            waiter.set_result(None)

    def fail(self, error: EngineError | RequestError) -> None:
        """End the request with an error, which its consumer gets after the deltas before it."""
        self.owner.forget_request(self.request_id)
        self._error = error
        self._end(error.reason)
        self._wake()

    def _end(self, reason: str) -> None:
        self._ended = True
        self.direct = None
        if self.queued:
            self.queued = False
            self.owner.leave_queue(self, started=False)
        self.record_end(reason, self.owner.observer)
