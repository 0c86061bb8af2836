"""Writes the output of a response: its items as they grow, and the events that report each step of it.

The whole response is what the same writer has made when it was given the whole output at once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson

from microvllm.openai_compat.api.responses.items import (
    CUSTOM_ARGUMENT,
    PREFIXES,
    ToolName,
    Tools,
    seal_reasoning,
)
from microvllm.openai_compat.api.responses.store import item_id
from microvllm.openai_compat.parsers.events import Arguments, Content, Event, Reasoning, ToolCall


class OutputWriter:
    """Makes `items`, the `output` of a response, of a parser's events.

    `suffix` is the end of the response's id, and a part of every item's, so that an item can be found by its
    id. With `sealed` a reasoning item repeats its text as `encrypted_content`.
    """

    def __init__(self, suffix: str, tools: Tools, *, sealed: bool = False) -> None:
        self.items: list[dict[str, Any]] = []
        self._suffix = suffix
        self._tools = tools
        self._sealed = sealed
        self._sequence = 0
        self._pieces: list[str] = []  # of the open item's text
        self._logprobs: list[Any] = []
        self._close: Callable[[str], Iterator[bytes]] | None = None  # ends the open item

    def event(self, kind: str, **members: Any) -> bytes:
        """Return the next server-sent event."""
        data = {"type": kind, "sequence_number": self._sequence, **members}
        self._sequence += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps(data))

    def feed(self, events: Sequence[Event], logprobs: Sequence[Any] = ()) -> Iterator[bytes]:
        """Yield the stream's events for a parser's; `logprobs` are those of the tokens that brought them."""
        for event in events:
            match event:
                case Content(text):
                    yield from self._text("message", text, logprobs)
                    logprobs = ()
                case Reasoning(text):
                    yield from self._text("reasoning", text)
                case ToolCall():
                    yield from self._call(event)
                case Arguments(_, text):
                    yield from self._arguments(text)

    def end(self, status: str) -> Iterator[bytes]:
        """Yield the events that end the last item; a response without any gets an empty message."""
        if not self.items:
            yield from self._text("message", "")
        yield from self._end_item(status)

    def _end_item(self, status: str = "completed") -> Iterator[bytes]:
        if self._close is not None:
            yield from self._close(status)
            self._close = None

    def _begin_item(self, kind: str, **members: Any) -> Iterator[bytes]:
        yield from self._end_item()
        item = {
            "id": item_id(PREFIXES[kind], self._suffix, len(self.items)),
            "type": kind,
            "status": "in_progress",
            **members,
        }
        self.items.append(item)
        self._pieces, self._logprobs = [], []
        yield self.event("response.output_item.added", output_index=len(self.items) - 1, item=item)

    @property
    def begun(self) -> bool:
        """Whether there was an event."""
        return self._sequence > 0

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _done_item(self, status: str) -> bytes:
        item = self.items[-1]
        item["status"] = status
        return self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    # ---- text and reasoning -------------------------------------------------------------------------

    def _text(self, kind: str, text: str, logprobs: Sequence[Any] = ()) -> Iterator[bytes]:
        message = kind == "message"
        if self._close is None or self.items[-1]["type"] != kind:
            members: dict[str, Any] = {"role": "assistant"} if message else {"summary": []}
            yield from self._begin_item(kind, **members, content=[])
            self._close = self._end_message if message else self._end_reasoning
            part = _text_part("", []) if message else _reasoning_part("")
            yield self.event("response.content_part.added", **self._place, content_index=0, part=part)
        if not text and not logprobs:
            return
        self._pieces.append(text)
        self._logprobs += logprobs
        kind = "response.output_text.delta" if message else "response.reasoning_text.delta"
        shown = {"logprobs": logprobs} if message else {}
        yield self.event(kind, **self._place, content_index=0, delta=text, **shown)

    def _end_message(self, status: str) -> Iterator[bytes]:
        text, place = "".join(self._pieces), {**self._place, "content_index": 0}
        part = _text_part(text, self._logprobs)
        self.items[-1]["content"] = [part]
        yield self.event("response.output_text.done", **place, text=text, logprobs=self._logprobs)
        yield self.event("response.content_part.done", **place, part=part)
        yield self._done_item(status)

    def _end_reasoning(self, status: str) -> Iterator[bytes]:
        text, place = "".join(self._pieces), {**self._place, "content_index": 0}
        part = _reasoning_part(text)
        self.items[-1]["content"] = [part]
        if self._sealed:
            self.items[-1]["encrypted_content"] = seal_reasoning(text)
        yield self.event("response.reasoning_text.done", **place, text=text)
        yield self.event("response.content_part.done", **place, part=part)
        yield self._done_item(status)

    # ---- calls --------------------------------------------------------------------------------------

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        name = self._tools.get(call.name, ToolName(call.name))
        kind, text = ("custom_tool_call", "input") if name.custom else ("function_call", "arguments")
        space = {} if name.namespace is None else {"namespace": name.namespace}
        yield from self._begin_item(
            kind, call_id=f"call_{uuid.uuid4().hex}", name=name.name, **space, **{text: ""}
        )
        self._close = self._end_custom if name.custom else self._end_function

    def _arguments(self, text: str) -> Iterator[bytes]:
        self._pieces.append(text)
        if self.items[-1]["type"] == "function_call":
            yield self.event("response.function_call_arguments.delta", **self._place, delta=text)

    def _end_function(self, status: str) -> Iterator[bytes]:
        item = self.items[-1]
        item["arguments"] = "".join(self._pieces)
        yield self.event(
            "response.function_call_arguments.done",
            **self._place,
            name=item["name"],
            arguments=item["arguments"],
        )
        yield self._done_item(status)

    def _end_custom(self, status: str) -> Iterator[bytes]:
        """A custom tool's text is a member of the function's arguments, and known once they are whole."""
        item = self.items[-1]
        item["input"] = _custom_input("".join(self._pieces))
        yield self.event("response.custom_tool_call_input.delta", **self._place, delta=item["input"])
        yield self.event("response.custom_tool_call_input.done", **self._place, input=item["input"])
        yield self._done_item(status)


def _custom_input(arguments: str) -> str:
    """Return a custom tool's input; all of the arguments if they have another form."""
    try:
        found = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    text = found.get(CUSTOM_ARGUMENT) if isinstance(found, dict) else None
    return text if isinstance(text, str) else arguments


def _text_part(text: str, logprobs: Sequence[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _reasoning_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}
