"""Searches the `n` likeliest continuations of a prompt, for `use_beam_search`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from microvllm.openai_compat.api.requests import GenerationRequest, is_harmless
from microvllm.runtime.beam_search import Beam, advance, best
from microvllm.runtime.errors import InvalidRequestError, RequestDeadlineError
from microvllm.runtime.metrics.observer import RequestTiming
from microvllm.runtime.request import SamplingParams, TokenLogprobs
from microvllm.runtime.text.detokenizer import Detokenizer, TextDelta

if TYPE_CHECKING:
    from microvllm.runtime.process.client import EngineClient

MAX_LENGTH_PENALTY = 10  # an exponent: with a larger one the scores overflow
# Fields that beam search does not implement, and the values of each that have no effect.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stop": ([],),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "repetition_detection": (),
    "logprobs": (False,),
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "thinking_token_budget": (-1,),
}


def check_fields(body: GenerationRequest, client: EngineClient) -> None:
    """Raise `InvalidRequestError` for a field that is not supported together with beam search."""
    for name, harmless in UNSUPPORTED.items():
        if not is_harmless(getattr(body, name, None), harmless):
            raise InvalidRequestError(f"{name} is not supported with beam search.", name)
    if abs(body.length_penalty) > MAX_LENGTH_PENALTY:
        raise InvalidRequestError(
            f"length_penalty must be in [-{MAX_LENGTH_PENALTY}, {MAX_LENGTH_PENALTY}].", "length_penalty"
        )
    if not client.config.logprobs_mode.endswith("logprobs"):
        raise InvalidRequestError(
            "use_beam_search needs a server with log probabilities, not logits, as its --logprobs-mode.",
            "use_beam_search",
        )
    limit = client.config.max_logprobs
    widest = (client.config.spec.vocab_size if limit == -1 else limit) // 2
    if body.n > widest:
        raise InvalidRequestError(f"n must be at most {widest} with beam search.", "n")


async def submit_all(
    client: EngineClient,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    penalty: float,
    **options: Any,
) -> list[BeamStream]:
    """Start a search for every prompt or none; the streams are in the order of `EngineClient.submit_all`."""
    streams: list[BeamStream] = []
    try:
        for prompt in prompts:
            if streams:
                await asyncio.sleep(0)  # a thousand prompts in one go would hold up every other request
            streams += BeamSearch(client, prompt, params, penalty, **options).streams
    except BaseException:
        for stream in streams:
            stream.abort()
        raise
    return streams


class BeamSearch:
    """Searches for one prompt; `streams` are the `params.n` best beams, best first, each a single delta.

    The search ends at `max_tokens`.
    """

    def __init__(
        self, client: EngineClient, prompt: list[int], params: SamplingParams, penalty: float, **options: Any
    ) -> None:
        self._client, self._prompt, self._params, self._options = client, prompt, params, options
        self._penalty = penalty
        self._request = client.processor.requests(prompt, params)[0]
        self.num_cached_tokens = 0
        self.task = asyncio.ensure_future(self._in_time())
        # Read the exception, so that asyncio does not report one that no caller awaited.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.streams = [BeamStream(self, prompt, index) for index in range(params.n)]

    async def _in_time(self) -> list[Beam]:
        """Run the search. Each of its steps is a request to the engine, so their sum is timed here."""
        try:
            return await asyncio.wait_for(self._run(), self._client.config.request_timeout or None)
        except asyncio.TimeoutError:
            raise RequestDeadlineError from None

    async def _run(self) -> list[Beam]:
        width, ends = self._params.n, {self._request.eos_token_id, *self._request.stop_token_ids}
        live, ended = [Beam()], list[Beam]()
        for _ in range(self._request.params.max_tokens or 1):
            live, finished = advance(live, await self._next_tokens(live), width, ends)
            ended += finished
            if not live:
                break
        return best([*ended, *live], width, self._penalty)

    async def _next_tokens(self, beams: list[Beam]) -> list[TokenLogprobs]:
        """Return the likeliest next tokens of each beam."""
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2 * self._params.n, ignore_eos=True)
        streams, entries = [], list[TokenLogprobs]()
        try:
            for beam in beams:
                streams += self._client.submit([*self._prompt, *beam.tokens], params, **self._options)
            for stream in streams:
                async for delta in stream:
                    entries += delta.logprobs or []
        finally:
            for stream in streams:
                stream.abort()
        if not beams[0].tokens:
            self.num_cached_tokens = streams[0].num_cached_tokens
        return entries

    def delta(self, beam: Beam) -> TextDelta:
        text = Detokenizer(
            self._client.tokenizer,
            self._prompt,
            skip_special_tokens=self._params.skip_special_tokens,
            include_stop_str=self._params.include_stop_str_in_output,
        )
        shown = text.push(beam.tokens, last_is_stop=beam.ended)[0] + text.finish()
        if not beam.ended:
            return TextDelta([*beam.tokens], shown, "length")
        end = beam.tokens[-1]
        return TextDelta([*beam.tokens], shown, "stop", None if end == self._request.eos_token_id else end)


class BeamStream:
    """Presents one beam as a `TokenStream`."""

    name: str = ""
    prompt_logprobs = None
    num_preemptions = 0  # its steps are requests of their own, which the metrics count

    def __init__(self, search: BeamSearch, prompt: list[int], index: int) -> None:
        self._search, self._index = search, index
        self.prompt_token_ids = prompt
        self.timing = RequestTiming(time.monotonic())

    @property
    def num_cached_tokens(self) -> int:
        return self._search.num_cached_tokens

    @property
    def num_generated_tokens(self) -> int:
        return len(self._beam.tokens) if self.end_reason == "stop" else 0

    @property
    def end_reason(self) -> str | None:
        task = self._search.task
        if not task.done() or task.cancelled():
            return None
        error = task.exception()
        return "stop" if error is None else str(getattr(error, "reason", "error"))

    @property
    def _beam(self) -> Beam:
        return self._search.task.result()[self._index]

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        yield self._search.delta((await self._search.task)[self._index])

    def abort(self) -> None:
        self._search.task.cancel()
