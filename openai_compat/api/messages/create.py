"""Serves POST /v1/messages and /v1/messages/count_tokens, Anthropic's API, as chats of another form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.api.chat import Chat
from microvllm.openai_compat.api.conversation import render
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.generation import Chunks, check_model
from microvllm.openai_compat.api.messages.conversation import chat_request, renamed
from microvllm.openai_compat.api.messages.requests import CountTokensRequest, MessagesRequest
from microvllm.openai_compat.errors import anthropic_error
from microvllm.openai_compat.parsers.events import Arguments, Content, Event, Reasoning, ToolCall
from microvllm.openai_compat.parsers.json_text import JsonText
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import EngineError, InvalidRequestError, RequestError
from microvllm.runtime.text.detokenizer import TextDelta

if TYPE_CHECKING:
    from microvllm.openai_compat.api.streams import Outcome


async def create_message(request: Request, state: ServerState, body: MessagesRequest) -> Response:
    """Answers a conversation as Anthropic's API does, whole or as a stream of events."""
    chat = await state.client.run_blocking(chat_request, body, state)
    del body  # it would be held until the answer ends, with all messages
    try:
        return await Messages(request, state, chat).respond()
    except InvalidRequestError as error:
        raise renamed(error) from None


async def count_tokens(request: Request, state: ServerState, body: CountTokensRequest) -> Response:
    """`{"input_tokens"}`: the tokens of the prompt that a conversation becomes. Nothing is generated."""
    if not state.args.skip_model_name_validation:
        check_model(body.model, state)
    chat = await state.client.run_blocking(chat_request, body, state)
    conversation = await state.client.run_rendering(render, state, chat)
    count = {"input_tokens": len(conversation.token_ids)}
    return Response(orjson.dumps(count), media_type="application/json")


class Messages(Chat):
    """A chat whose one choice is written as a message of content blocks."""

    id_prefix = "msg"
    end = b""  # `message_stop` and `error` are the last events
    blocks: list[dict[str, Any]]

    def read_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        (outcome,), (choice,) = outcomes, self.choices()
        whole = TextDelta(outcome.token_ids, outcome.text, outcome.finish_reason, outcome.stop_reason)
        self.blocks = content_blocks(choice.feed(whole), self.id)

    def failure(self, error: RequestError | EngineError) -> bytes:
        return _event("error", anthropic_error(error))

    def answer(
        self, outcomes: Sequence[Outcome], usage: dict[str, Any], metrics: dict[str, float | None] | None
    ) -> bytes:
        (outcome,) = outcomes
        called = any(block["type"] == "tool_use" for block in self.blocks)
        output_tokens = len(outcome.token_ids)
        end = self.stop(outcome.finish_reason, outcome.stop_reason, called, output_tokens)
        return orjson.dumps(self.message(self.blocks, end, output_tokens))

    def chunks(self) -> MessageChunks:
        return MessageChunks(self)

    def message(
        self, content: list[Any], end: Mapping[str, str | None], output_tokens: int
    ) -> dict[str, Any]:
        """Return the message object; `end` are the members that say why it ended."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **end,
            "usage": self.usage(output_tokens),
        }

    def usage(self, output_tokens: int) -> dict[str, Any]:
        """Return the `usage`; all tokens of the prompt are the sum of the three counts of the input."""
        reasoning = self.reasoning_tokens
        details = {} if reasoning is None else {"output_tokens_details": {"thinking_tokens": reasoning}}
        (stream,) = self.streams
        cached = stream.num_cached_tokens
        return {
            "input_tokens": len(stream.prompt_token_ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": output_tokens,
            **details,
        }

    def stop(
        self, finish: str | None, reason: int | str | None, called: bool, output_tokens: int
    ) -> dict[str, str | None]:
        """Return why the message ended, in the words of this API."""
        if finish == "length":
            full = self.params.max_tokens is None or output_tokens < self.params.max_tokens
            word = "model_context_window_exceeded" if full else "max_tokens"
            return {"stop_reason": word, "stop_sequence": None}
        if reason in self.body.stop_strings:
            return {"stop_reason": "stop_sequence", "stop_sequence": str(reason)}
        return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}


class Blocks:
    """Turns the events of a parsed output into content blocks, and into the events of a stream."""

    def __init__(self, signature: str) -> None:
        self._signature = signature
        self._index = -1
        self._kind: str | None = None  # of the open block
        self._space = ""  # at the beginning of a text: a block of white space alone is none
        self.called = False

    def write(self, events: Sequence[Event]) -> bytes:
        """Return the events of the stream for these events of the output."""
        return b"".join(map(self._write, events))

    def _write(self, event: Event) -> bytes:
        match event:
            case Reasoning(text):
                start = self._opened("thinking", {"thinking": "", "signature": ""})
                return start + self._delta({"type": "thinking_delta", "thinking": text})
            case Content(text):
                if self._kind != "text":
                    text = self._space + text
                    if not text.strip():
                        self._space = text
                        return self.close()  # thinking that follows is another block
                    self._space = ""
                start = self._opened("text", {"text": ""})
                return start + self._delta({"type": "text_delta", "text": text})
            case ToolCall(_, call_id, name):
                self.called = True
                closed = self.close()
                return closed + self._opened("tool_use", {"id": call_id, "name": name, "input": {}})
            case Arguments(_, text):
                return self._delta({"type": "input_json_delta", "partial_json": text})

    def _opened(self, kind: str, members: dict[str, Any]) -> bytes:
        """Open a block of this kind unless one is open."""
        if self._kind == kind:
            return b""
        closed = self.close()
        self._space = ""  # of a text that another block ends before anything else came
        self._index += 1
        self._kind = kind
        block = {"type": kind, **members}
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return closed + _event("content_block_start", start)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        data = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return _event("content_block_delta", data)

    def close(self) -> bytes:
        """Close the open block, if there is one."""
        if self._kind is None:
            return b""
        signed = b""
        if self._kind == "thinking":
            signed = self._delta({"type": "signature_delta", "signature": self._signature})
        self._kind = None
        return signed + _event("content_block_stop", {"type": "content_block_stop", "index": self._index})


def content_blocks(events: Sequence[Event], signature: str) -> list[dict[str, Any]]:
    """Return the content blocks that the events of a whole output add up to, as `Blocks` streams them."""
    blocks: list[dict[str, Any]] = []
    pieces: list[list[str]] = []  # of the text, the thinking or the arguments of each block
    for event in events:
        if isinstance(event, ToolCall):
            blocks.append({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
            pieces.append([])
            continue
        kind = "text" if isinstance(event, Content) else "thinking"
        if not isinstance(event, Arguments) and (not blocks or blocks[-1]["type"] != kind):
            blocks.append({"type": kind, kind: ""})
            pieces.append([])
        pieces[-1].append(event.text)
    for block, text in zip(blocks, map("".join, pieces), strict=True):
        if block["type"] == "tool_use":
            block["input"] = tool_input(text)
        else:
            block[block["type"]] = text
        if block["type"] == "thinking":
            block["signature"] = signature
    return [block for block in blocks if block["type"] != "text" or block["text"].strip()]


def tool_input(arguments: str) -> Any:
    """Return the arguments of a call; those of an output that was cut off are closed where they end."""
    try:
        return orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        text = JsonText()
        return orjson.loads(text.feed(arguments, 0)[0] + text.finish())


class MessageChunks(Chunks):
    """Writes `message_start`, the events of the content blocks, `message_delta` and `message_stop`."""

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        (self._choice,) = messages.choices()
        self._blocks = Blocks(messages.id)
        self._output_tokens = 0
        self._end: tuple[str | None, int | str | None] = (None, None)

    def opening(self) -> list[bytes]:
        end = {"stop_reason": None, "stop_sequence": None}
        message = self._messages.message([], end, 0)
        return [_event("message_start", {"type": "message_start", "message": message}), PING]

    def chunk(self, index: int, delta: TextDelta, usage: bytes) -> bytes:
        self._output_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._end = (delta.finish_reason, delta.stop_reason)
        return self._blocks.write(self._choice.feed(delta))

    def closing(self) -> list[bytes]:
        messages = self._messages
        end = messages.stop(*self._end, self._blocks.called, self._output_tokens)
        usage = messages.usage(self._output_tokens)
        return [
            self._blocks.close(),
            _event("message_delta", {"type": "message_delta", "delta": end, "usage": usage}),
            _event("message_stop", {"type": "message_stop"}),
        ]

    def final_usage(self, counts: bytes, metrics: bytes) -> bytes:
        return b""  # `message_delta` has it


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps(data))


PING = _event("ping", {"type": "ping"})

ENDPOINTS = (
    Endpoint(
        path="/v1/messages",
        methods=("POST",),
        handler=create_message,
        body=MessagesRequest,
        answer="Message",
        event="MessageStreamEvent",
        named_events=True,
        generates=True,
    ),
    Endpoint(
        path="/v1/messages/count_tokens",
        methods=("POST",),
        handler=count_tokens,
        body=CountTokensRequest,
        answer="MessageTokensCount",
    ),
)
