"""Reads a request of /v1/responses as a chat: what came before it, its items, tools and options."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import orjson

from microvllm.openai_compat.api.conversation import render
from microvllm.openai_compat.api.reading import read_request
from microvllm.openai_compat.api.requests import ChatCompletionRequest, GenerationRequest
from microvllm.openai_compat.api.responses.items import (
    Tools,
    input_items,
    item_type,
    read_messages,
    read_tool_choice,
    read_tools,
)
from microvllm.openai_compat.api.responses.requests import (
    LOGPROBS,
    MAX_NOTE_CHARS,
    MAX_REPEATED_BYTES,
    Reasoning,
    ResponsesRequest,
    TextConfig,
)
from microvllm.openai_compat.api.responses.store import References, ResponseStore
from microvllm.openai_compat.errors import clip
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import ContextLengthError, InvalidRequestError

STORE_FLAG = "--max-response-store-bytes"
# What chats name otherwise.
_RENAMED = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
}
_CHAT_NAMES = re.compile(r"\b(?:max_completion_tokens|response_format|reasoning_effort)\b|^messages\b")
_FUNCTION_MEMBER = re.compile(r"^(tools\[\d+\])\.function\.")  # chats have a tool's members one level down


def check_fields(body: ResponsesRequest, store: ResponseStore) -> None:
    """Check what concerns several fields, and refuse the values that are not supported."""
    if store.max_bytes == 0 and (body.store or body.previous_response_id is not None or body.background):
        name = "store" if body.store else "background" if body.background else "previous_response_id"
        raise InvalidRequestError(
            f"`{name}` needs a server that keeps responses, which {STORE_FLAG} 0 has switched off.", name
        )
    if body.background and body.store is False:
        raise InvalidRequestError("`background` needs `store`, to be read once it is done.", "background")
    if body.background and body.stream:
        raise InvalidRequestError("`stream` is not supported with `background`.", "stream")
    reasoning = body.reasoning or Reasoning()
    for name, value, known in (
        ("summary", reasoning.summary, (None, "auto", "none")),
        ("generate_summary", reasoning.generate_summary, (None, "auto")),
        ("context", reasoning.context, (None, "auto")),
        ("mode", reasoning.mode, (None, "standard")),
    ):
        if value not in known:
            problem = f"reasoning.{name}: {clip(value or '')!r} is not supported."
            raise InvalidRequestError(problem, "reasoning")


def stores(body: ResponsesRequest, store: ResponseStore) -> bool:
    """Return whether the response is kept."""
    return body.store is not False and store.max_bytes > 0


class ReadBody(NamedTuple):
    """A request as a chat, its tools by the names that the model is shown, and its items for the store."""

    chat: ChatCompletionRequest
    tools: Tools
    items: bytes


def read_body(body: ResponsesRequest, store: ResponseStore) -> ReadBody:
    """Read a request and what it continues. Raises `InvalidRequestError`."""
    _check_repeated(body)
    items, first = _conversation(body, store)
    chat, tools = _as_chat(body, items, first)
    return ReadBody(chat, tools, orjson.dumps(items[first:]) if stores(body, store) else b"")


def _check_repeated(body: ResponsesRequest) -> None:
    if any(len(name) > MAX_NOTE_CHARS for name in body.metadata or ()):
        problem = f"metadata: a name has more than {MAX_NOTE_CHARS} characters."
        raise InvalidRequestError(problem, "metadata")
    for name, value in (("tools", body.tools), ("tool_choice", body.tool_choice), ("text", body.text)):
        size = len(msgspec.json.encode(value))
        if size > MAX_REPEATED_BYTES:
            problem = f"{name}: takes {size} bytes as JSON, the limit is {MAX_REPEATED_BYTES}."
            raise InvalidRequestError(problem, name)


def _conversation(body: ResponsesRequest, store: ResponseStore) -> tuple[list[Any], int]:
    """Return the items of the whole conversation, and how many of them came before this request."""
    given = input_items(body.input)
    past = [] if body.previous_response_id is None else store.conversation(body.previous_response_id)
    if any(item_type(item) == "item_reference" for item in given):
        references = References(store)
        given = [_resolved(item, f"input[{i}]", references) for i, item in enumerate(given)]
    return [*past, *given], len(past)


def _resolved(item: Any, where: str, references: References) -> Any:
    """Return the output item of a stored response that a reference names; any other item as it is."""
    if item_type(item) != "item_reference":
        return item
    name = item.get("id")
    found = references.find(name) if isinstance(name, str) else None
    if found is None:
        raise InvalidRequestError(f"{where}.id: no item of a stored response has this id.", "input")
    return found


def _as_chat(body: ResponsesRequest, items: Sequence[Any], first: int) -> tuple[ChatCompletionRequest, Tools]:
    """Return the request as a chat, and its tools by the names that the model is shown."""
    functions, tools = read_tools(body.tools)
    fields = {
        "messages": read_messages(body.instructions, items, first),
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": _with_logprobs(body),
        "top_logprobs": body.top_logprobs,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "response_format": _response_format(body.text),
        "tools": functions or None,
        "tool_choice": read_tool_choice(body.tool_choice, tools),
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
        "include_reasoning": body.include_reasoning,
        "thinking_token_budget": body.thinking_token_budget,
    }
    chat = read_request(ChatCompletionRequest, fields)
    for name in GenerationRequest.__struct_fields__:
        if name not in fields:
            setattr(chat, name, getattr(body, name))
    return chat, tools


def shortened(state: ServerState, body: ChatCompletionRequest) -> list[Any]:
    """Return the messages without so many turns at their start that they fit; runs in a worker thread.

    `max_completion_tokens`, or a quarter of the context if that is less, is then free for the output. What
    the system says at the start stays, and so does the last turn, even if it is too long.
    """
    context = state.client.config.max_model_len
    room = min(body.max_completion_tokens or context, context // 4)
    messages = body.messages
    turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    opening = messages[: turns[0]] if turns else []
    opening = [message for message in opening if message["role"] in ("system", "developer")]

    def fits(turn: int) -> bool:
        kept = msgspec.structs.replace(body, messages=[*opening, *messages[turn:]])
        try:
            return len(render(state, kept).token_ids) + room <= context
        except ContextLengthError:
            return False

    # The later the first turn that is kept, the shorter the prompt.
    first = bisect.bisect_left(turns, True, key=fits)
    return [*opening, *messages[turns[min(first, len(turns) - 1)] :]] if turns else messages


def _with_logprobs(body: ResponsesRequest) -> bool:
    return LOGPROBS in body.include or body.top_logprobs > 0


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    form = None if text is None else text.format
    if form is None or form.get("type") != "json_schema":
        return form
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in form.items() if name != "type"},
    }


def renamed(error: InvalidRequestError) -> InvalidRequestError:
    """Return the error of a chat with this endpoint's names of the fields."""
    message = _CHAT_NAMES.sub(lambda name: _RENAMED[name[0]], error.message)
    error.message = _FUNCTION_MEMBER.sub(r"\1.", message)
    error.args = (error.message,)
    field = (error.param or "").removeprefix("body.")
    if field in _RENAMED:
        error.param = (error.param or "").replace(field, _RENAMED[field].split(".")[0])
    return error
