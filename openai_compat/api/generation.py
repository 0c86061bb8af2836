"""What completions and chat share: one request's token streams, collected whole or merged as they come."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from starlette.requests import Request

from microvllm.openai_compat.api.beam import BeamSearch, check_beam_fields
from microvllm.openai_compat.api.request_log import log_end
from microvllm.openai_compat.api.usage import request_metrics
from microvllm.openai_compat.errors import Fault, clip, shape_error
from microvllm.runtime.errors import InvalidRequestError, ModelNotFoundError
from microvllm.runtime.request import INT64_MAX, INT64_MIN

if TYPE_CHECKING:
    from microvllm.openai_compat.state import ServerState
    from microvllm.runtime.observer import RequestTiming
    from microvllm.runtime.request import SamplingParams, TokenLogprobs
    from microvllm.runtime.text.detokenizer import TextDelta

logger = logging.getLogger("microvllm.server")

DELTAS_AT_ONCE = 1024
MAX_LOGGED = 1000  # characters of a request's parameters
_HEADER_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(slots=True)
class Outcome:
    """One finished choice; `logprobs` has one entry a token if they were asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Stream(Protocol):
    """What is used of the engine client's `TokenStream`."""

    name: str

    @property
    def prompt_token_ids(self) -> list[int]: ...

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None: ...

    @property
    def timing(self) -> RequestTiming: ...

    @property
    def num_cached_tokens(self) -> int: ...

    @property
    def num_generated_tokens(self) -> int: ...

    @property
    def num_preemptions(self) -> int: ...

    @property
    def end_reason(self) -> str | None: ...

    def __aiter__(self) -> AsyncIterator[TextDelta]: ...

    def abort(self) -> None: ...


@dataclass
class Generation:
    """One request on its way: its identity on the wire and a token stream per choice.

    The streams are ordered prompt by prompt: sample i of prompt p is number p * n + i.
    """

    id: str
    created: int
    model: str
    streams: list[Stream] = field(default_factory=list)
    n: int = 1
    ended: bool = False

    async def submit(
        self,
        state: ServerState,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        fields: Mapping[str, Any],
        priority: int,
    ) -> None:
        """Hands every prompt to the engine; all or none, what was accepted before a refusal is aborted."""
        self.n = params.n
        if state.args.enable_log_requests:
            self._log(prompts, params)
        options = {"priority": priority, "cache_salt": fields["cache_salt"]}
        if not fields["use_beam_search"]:
            self.streams += await state.client.submit_all(prompts, params, **options)
            return
        try:
            for index, prompt in enumerate(prompts):
                if index:
                    await asyncio.sleep(0)  # a thousand prompts in one go would hold up every other request
                search = BeamSearch(state.client, prompt, params, fields["length_penalty"], **options)
                self.streams += search.streams
        except BaseException:
            self.abort()
            raise
        for stream in self.streams:
            stream.name = self.id

    def _log(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        """What is asked for, on one line: the parameters that are not defaults, and no prompt."""
        wishes = str(msgspec.to_builtins(params))
        logger.info(
            "Received request %s: %d prompts, %d prompt tokens, %s",
            self.id,
            len(prompts),
            sum(map(len, prompts)),
            wishes if len(wishes) <= MAX_LOGGED else wishes[:MAX_LOGGED] + "...",
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once however many samples it has."""
        return sum(len(stream.prompt_token_ids) for stream in self.streams[:: self.n])

    @property
    def cached_tokens(self) -> int:
        return sum(stream.num_cached_tokens for stream in self.streams[:: self.n])

    def metrics(self, completion_tokens: int) -> dict[str, float | None] | None:
        """The times of the request; None for several sequences, which have no times in common."""
        if len(self.streams) != 1:
            return None
        return request_metrics(self.streams[0].timing, completion_tokens)

    def abort(self) -> None:
        """Frees what the engine still holds for this request and logs its end; may be called again."""
        for stream in self.streams:
            stream.abort()
        if self.streams and not self.ended:
            self.ended = True
            log_end(self.id, self.streams, self.prompt_tokens)

    async def collect(self) -> list[Outcome]:
        """Every choice, whole. Raises `EngineError` if the engine fails; the caller aborts."""
        outcomes, taken = [], 0
        # One after the other loses nothing: the streams fill up by themselves meanwhile.
        for stream in self.streams:
            outcome, parts = Outcome(), []
            async for delta in stream:
                taken += 1
                if taken % DELTAS_AT_ONCE == 0:  # those of thousands of sequences may all be there
                    await asyncio.sleep(0)
                parts.append(delta.text)
                outcome.token_ids += delta.token_ids
                outcome.logprobs += delta.logprobs or []
                if delta.finish_reason is not None:
                    outcome.finish_reason = delta.finish_reason
                    outcome.stop_reason = delta.stop_reason
            outcome.text = "".join(parts)
            outcomes.append(outcome)
        return outcomes

    def deltas(self, interval: int = 1) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """(choice, delta) pairs as they arrive, of at least `interval` tokens each.

        The first and the last delta of a choice do not wait for others.
        """
        return self._arriving() if interval == 1 else _spaced(self._arriving(), interval)

    async def _arriving(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        if len(self.streams) == 1:
            async for delta in self.streams[0]:
                yield 0, delta
            return
        # Bounded, so that a slow client makes the streams join tokens instead of filling this queue.
        queue: asyncio.Queue[tuple[int, TextDelta | Exception | None]] = asyncio.Queue(len(self.streams))
        pumps = [asyncio.ensure_future(_pump(i, stream, queue)) for i, stream in enumerate(self.streams)]
        try:
            running = len(pumps)
            while running:
                index, item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield index, item
        finally:
            for pump in pumps:
                pump.cancel()


async def _spaced(
    deltas: AsyncGenerator[tuple[int, TextDelta], None], interval: int
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    held: dict[int, TextDelta] = {}
    begun: set[int] = set()
    async with aclosing(deltas):
        async for index, later in deltas:
            delta = held.pop(index, None)
            if delta is None:
                delta = later
            else:
                delta.merge(later)
            if index in begun and delta.finish_reason is None and len(delta.token_ids) < interval:
                held[index] = delta
                continue
            begun.add(index)
            yield index, delta


async def _pump(
    index: int, stream: Stream, queue: asyncio.Queue[tuple[int, TextDelta | Exception | None]]
) -> None:
    try:
        async for delta in stream:
            await queue.put((index, delta))
    except Exception as error:
        await queue.put((index, error))
    else:
        await queue.put((index, None))


def begin(request: Request, fields: Mapping[str, Any], state: ServerState, prefix: str) -> Generation:
    """A request's identity. `prefix` is "cmpl" or "chatcmpl"; a client's own id becomes the suffix.

    The header wins over the body, as in vLLM. It is only ever repeated: the engine has ids of its own, so
    two requests with the same one do not touch each other.
    """
    if not state.args.skip_model_name_validation:
        check_model(fields["model"], state)
    if fields["stream_options"] and not fields["stream"]:
        raise InvalidRequestError("Stream options can only be defined when `stream=True`.", "stream_options")
    _check_stop(fields["stop"], state.args.max_stop_strings)
    check_beam_fields(fields, state.client)
    state.client.check_room()  # before the work of reading the prompt
    suffix = request.headers.get("x-request-id", "")
    if not _HEADER_ID.fullmatch(suffix):
        suffix = fields["request_id"] or uuid.uuid4().hex
    return Generation(f"{prefix}-{suffix}", int(time.time()), state.model_names[0])


def _check_stop(stop: Sequence[str], limit: int) -> None:
    if len(stop) > limit:
        problem = f"List should have at most {limit} items, not {len(stop)} (see --max-stop-strings)"
        raise shape_error([("body.stop", Fault("too_long", problem))])


def check_model(name: str | None, state: ServerState) -> None:
    """Raises `ModelNotFoundError` unless the name is a served one, the `root` of `/v1/models`, or left open.

    A client that loads the tokenizer from where the model's name says is given `root` as the name.
    """
    served = state.model_names
    if name and name not in served and name != state.client.tokenizer_root:
        raise ModelNotFoundError(
            f"The model `{clip(name)}` does not exist. Valid aliases: {', '.join(served)}.", "model"
        )


def priority_of(request: Request, fields: Mapping[str, Any]) -> int:
    """The priority: the header X-Vllm-Priority wins over the body (lower is served earlier)."""
    header = request.headers.get("x-vllm-priority")
    if header is None:
        return int(fields["priority"])
    try:
        value = int(header[:32])
    except ValueError:
        value = INT64_MAX + 1
    if not INT64_MIN <= value <= INT64_MAX:
        raise InvalidRequestError("The header X-Vllm-Priority must be a 64-bit integer.", "priority")
    return value
