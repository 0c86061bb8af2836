"""The choices of a completion, and the chunks of a streamed one, made of bytes prepared once a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson

from microvllm.openai_compat.api.logprobs import CompletionLogprobs
from microvllm.openai_compat.api.sse import fingerprint_member

if TYPE_CHECKING:
    from microvllm.openai_compat.api.generation import Generation, Stream
    from microvllm.runtime.request import TokenLogprobs
    from microvllm.runtime.text.detokenizer import TextDelta

_PLAIN_END = (
    b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null,'
    b'"weight_versions":null}],"kv_transfer_params":null}\n\n'
)


class Choice:
    """What one choice shows of its tokens; `echo` is the prompt's text, which comes before the first ones.

    `logprobs` is None unless they were asked for. With `echo` those of the prompt come first, too.
    """

    def __init__(self, stream: Stream, echo: str | None, logprobs: CompletionLogprobs | None) -> None:
        self.plain = echo is None and logprobs is None
        self.echoes = echo is not None
        self.begun = False
        self._stream = stream
        self._echo = echo
        self._logprobs = logprobs

    def take(
        self, text: str, token_ids: Sequence[int], entries: Sequence[TokenLogprobs] | None
    ) -> tuple[str, dict[str, Any] | None]:
        """The text and the `logprobs` object of the next tokens."""
        known: list[TokenLogprobs | None] = list(entries or [])
        if self._echo is not None and not self.begun:
            text = self._echo + text
            token_ids = [*self._stream.prompt_token_ids, *token_ids]
            known = [None, *(self._stream.prompt_logprobs or []), *known]
        self.begun = True
        return text, None if self._logprobs is None else self._logprobs.take(token_ids, known)


class CompletionChunks:
    """One chunk a delta. Its text and log probabilities are those of `choices`, one for each stream.

    `usage_follows`: the system fingerprint goes into the usage chunk instead of the last token's.
    """

    def __init__(
        self,
        generation: Generation,
        choices: list[Choice],
        *,
        fingerprint: str | None,
        with_ids: bool,
        usage_follows: bool,
    ) -> None:
        head = orjson.dumps(
            {
                "id": generation.id,
                "object": "text_completion",
                "created": generation.created,
                "model": generation.model,
                "choices": [],
            }
        )
        self._bare = b"data: " + head[:-1]  # ends in `"choices":[]`
        self._head = self._bare[:-1] + b'{"index":'
        self._generation = generation
        self._choices = choices
        self._fingerprint = fingerprint_member(fingerprint)
        self._with_ids = with_ids
        self._usage_follows = usage_follows
        self._plain = not with_ids and all(choice.plain for choice in choices)

    def opening(self) -> list[bytes]:
        return []

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        if self._plain and delta.finish_reason is None and not usage:
            return b'%s%d,"text":%s%s' % (self._head, index, orjson.dumps(delta.text), _PLAIN_END)
        choice = self._choices[index]
        token_ids = delta.token_ids if self._with_ids else None
        prompt_ids = None
        if not choice.begun and (self._with_ids or choice.echoes):  # with an echo unasked, as in vLLM
            prompt_ids = self._generation.streams[index].prompt_token_ids
        text, logprobs = choice.take(delta.text, delta.token_ids, delta.logprobs)
        ends = delta.finish_reason is not None and not self._usage_follows
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
            self._fingerprint if ends else b"",
        )

    def final_usage(self, counts: bytes, metrics: bytes) -> bytes:
        return self._bare + b',"usage":' + counts + self._fingerprint + metrics + b"}\n\n"
