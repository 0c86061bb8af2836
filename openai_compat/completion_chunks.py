"""The chunks of a streamed completion, put together from bytes made once a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from microvllm.openai_compat.generation import Generation
    from microvllm.runtime.output import TextDelta

_PLAIN_END = (
    b'"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null,"weight_versions":null}]'
    b',"kv_transfer_params":null}\n\n'
)


class CompletionChunks:
    """One chunk a delta; `echoes` are put before the first chunk of each choice."""

    def __init__(self, generation: Generation, echoes: list[str], with_ids: bool) -> None:
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
        self._echoes: list[str | None] = [*echoes]
        self._with_ids = with_ids

    def opening(self) -> list[bytes]:
        return []

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        text, finish, prompt_ids = delta.text, delta.finish_reason, None
        echo = self._echoes[index]
        if echo is not None:  # the first chunk of this choice
            self._echoes[index] = None
            text = echo + text
            prompt_ids = self._generation.streams[index].prompt_token_ids if self._with_ids else None
        start = b'%s%d,"text":%s,"logprobs":null,' % (self._head, index, orjson.dumps(text))
        if finish is None and not self._with_ids and not usage:
            return start + _PLAIN_END
        return start + (
            b'"finish_reason":%s,"stop_reason":%s,"prompt_token_ids":%s,"token_ids":%s,"weight_versions":null}]%s'
            b',"kv_transfer_params":null}\n\n'
        ) % (
            orjson.dumps(finish),
            orjson.dumps(delta.stop_reason),
            orjson.dumps(prompt_ids),
            orjson.dumps(delta.token_ids if self._with_ids else None),
            usage,
        )

    def final_usage(self, counts: bytes) -> bytes:
        return self._bare + b',"usage":' + counts + b"}\n\n"
