"""The chunks of a streamed chat completion, put together from bytes made once a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import orjson

from microvllm.openai_compat.api.sse import fingerprint_member
from microvllm.openai_compat.api.usage import stream_usage

if TYPE_CHECKING:
    from microvllm.openai_compat.api.generation import Generation
    from microvllm.openai_compat.api.logprobs import ChatLogprobs
    from microvllm.runtime.text.detokenizer import TextDelta

_PLAIN_END = b'},"logprobs":null,"finish_reason":null,"token_ids":null}],"kv_transfer_params":null}\n\n'


class ChatChunks:
    """A role chunk per choice with the first token, one chunk a delta, the finish reason on the last token's.

    `logprobs` has one writer a choice, or none at all. `prompt_text` is shown with the role if it is given.
    `usage_follows`: the system fingerprint goes into the usage chunk instead of the last token's.
    `continuous`: the role chunk counts tokens, too.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        role: str,
        echo: str,
        fingerprint: str | None,
        logprobs: Sequence[ChatLogprobs],
        with_ids: bool,
        prompt_text: str | None,
        usage_follows: bool,
        continuous: bool,
    ) -> None:
        head = orjson.dumps(
            {
                "id": generation.id,
                "object": "chat.completion.chunk",
                "created": generation.created,
                "model": generation.model,
                "choices": [],
            }
        )
        self._bare = b"data: " + head[:-1]  # ends in `"choices":[]`
        self._head = self._bare[:-1] + b'{"index":'
        self._generation = generation
        self._role = orjson.dumps(role)
        self._echo = echo
        self._fingerprint = fingerprint_member(fingerprint)
        self._logprobs = logprobs
        self._with_ids = with_ids
        self._prompt_text = orjson.dumps(prompt_text)
        self._plain = not with_ids and not logprobs
        self._usage_follows = usage_follows
        self._continuous = continuous

    def opening(self) -> list[bytes]:
        prompt_ids = self._generation.streams[0].prompt_token_ids
        usage = b',"usage":' + stream_usage(len(prompt_ids), 0) if self._continuous else b""
        choices = range(len(self._generation.streams))
        events = [
            b'%s%d,"delta":{"role":%s,"content":""},"logprobs":null,"finish_reason":null}]%s'
            b',"prompt_token_ids":%s,"prompt_text":%s}\n\n'
            % (
                self._head,
                index,
                self._role,
                usage,
                orjson.dumps(prompt_ids if self._with_ids else None),
                self._prompt_text,
            )
            for index in choices
        ]
        if self._echo:
            events += [
                b'%s%d,"delta":{"content":%s},"logprobs":null,"finish_reason":null}]%s}\n\n'
                % (self._head, index, orjson.dumps(self._echo), usage)
                for index in choices
            ]
        return events

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        text = orjson.dumps(delta.text)
        if self._plain and delta.finish_reason is None and not usage:
            return b'%s%d,"delta":{"content":%s%s' % (self._head, index, text, _PLAIN_END)
        logprobs = None
        if self._logprobs:
            logprobs = self._logprobs[index].take(delta.token_ids, delta.logprobs or [])
        token_ids = orjson.dumps(delta.token_ids if self._with_ids else None)
        if delta.finish_reason is None:
            end = b'null,"token_ids":%s}]%s' % (token_ids, usage)
        else:
            end = b'%s,"stop_reason":%s,"token_ids":%s,"weight_versions":null}]%s%s' % (
                orjson.dumps(delta.finish_reason),
                orjson.dumps(delta.stop_reason),
                token_ids,
                usage,
                b"" if self._usage_follows else self._fingerprint,
            )
        return (
            b'%s%d,"delta":{"content":%s},"logprobs":%s,"finish_reason":%s,"kv_transfer_params":null}\n\n'
        ) % (self._head, index, text, orjson.dumps(logprobs), end)

    def final_usage(self, counts: bytes, metrics: bytes) -> bytes:
        return self._bare + b',"usage":' + counts + self._fingerprint + metrics + b"}\n\n"
