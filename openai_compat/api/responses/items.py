"""Turns the input items and the tools of /v1/responses into the messages and tools of a chat."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from microvllm.openai_compat.api.requests import NonEmpty, is_harmless
from microvllm.openai_compat.api.usage import without_nulls
from microvllm.openai_compat.errors import clip
from microvllm.openai_compat.parsers.json_text import JsonText
from microvllm.runtime.errors import InvalidRequestError

T = TypeVar("T")
MAX_MENDED_CHARS = 1 << 18  # of a conversation: mending takes 0.3 us for each
MESSAGE = "message"
# By the type of an item: what begins its id.
PREFIXES = {
    MESSAGE: "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
# The types of a text part, and the member with its text.
TEXT_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
    "reasoning_text": "text",
    "summary_text": "text",
}
# What only programs and searches on OpenAI's side could make use of.
_TOOL_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "async": (False,),
    "defer_loading": (False,),
    "allowed_callers": (["direct"],),
}
# A custom tool takes a text. The model is shown a function with this one argument.
CUSTOM_ARGUMENT = "input"
_CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {CUSTOM_ARGUMENT: {"type": "string"}},
    "required": [CUSTOM_ARGUMENT],
    "additionalProperties": False,
}
_CARRIED = "mv1."  # begins `encrypted_content`, so that others' is recognised


class ToolName(NamedTuple):
    """How a tool is named in the API; the model is shown one name in place of namespace and name."""

    name: str
    custom: bool = False
    namespace: str | None = None


Tools = Mapping[str, ToolName]  # by the names that the model is shown


class _Part(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


_Content = str | list[_Part]


class _Message(msgspec.Struct):
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content


class _Call(msgspec.Struct):
    call_id: NonEmpty
    name: NonEmpty
    arguments: str
    namespace: str | None = None


class _CustomCall(msgspec.Struct):
    call_id: NonEmpty
    name: NonEmpty
    input: str
    namespace: str | None = None


class _Output(msgspec.Struct):
    call_id: NonEmpty
    output: _Content


class _Reasoning(msgspec.Struct):
    summary: list[_Part] = []
    content: list[_Part] | None = None
    encrypted_content: str | None = None


class _Function(msgspec.Struct):
    name: NonEmpty
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Custom(msgspec.Struct):
    name: NonEmpty
    description: str | None = None
    format: dict[str, Any] | None = None


class _Namespace(msgspec.Struct):
    name: NonEmpty
    tools: list[Any]


_KINDS: Mapping[str, type[msgspec.Struct]] = {
    MESSAGE: _Message,
    "function_call": _Call,
    "custom_tool_call": _CustomCall,
    "function_call_output": _Output,
    "custom_tool_call_output": _Output,
    "reasoning": _Reasoning,
}


# ---- items --------------------------------------------------------------------------------------------


def input_items(given: str | list[Any]) -> list[Any]:
    """Return the input as a list of items: a text is the user's message."""
    if isinstance(given, str):
        return [{"type": MESSAGE, "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return given


def item_type(item: Any) -> Any:
    """Return an item's type; a message may leave it out, and so may a reference."""
    if not isinstance(item, dict):
        return None
    return item.get("type") or (MESSAGE if "role" in item else "item_reference" if "id" in item else None)


def read_messages(instructions: str | None, items: Sequence[Any], first: int) -> list[dict[str, Any]]:
    """Return the messages of a chat. Raises `InvalidRequestError` that names the item at fault.

    `items` are the whole conversation, those from `first` on the request's own input. Consecutive items of
    the assistant (its reasoning, text and calls) become one message.
    """
    messages: list[dict[str, Any]] = []
    arguments = _Arguments()
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    called: dict[str, str] = {}  # by call id: the name that the model is shown
    for index, item in enumerate(items):
        where = f"input[{index - first}]"
        kind = item_type(item)
        struct = _KINDS.get(kind) if isinstance(kind, str) else None
        if struct is None:
            raise _unsupported(f"{where}.type", kind, "input")
        _add(messages, called, arguments, _convert(item, struct, where), where)
    return _with_one_opening(messages)


def _add(
    messages: list[dict[str, Any]], called: dict[str, str], arguments: _Arguments, item: Any, where: str
) -> None:
    if isinstance(item, _Output):
        if item.call_id not in called:
            raise _fault(f"{where}.call_id", "there is no call with this id before it")
        content = _texts(item.output, f"{where}.output")
        messages.append(
            {"role": "tool", "tool_call_id": item.call_id, "name": called[item.call_id], "content": content}
        )
    elif isinstance(item, _Message):
        content = _texts(item.content, f"{where}.content")
        if item.role == "assistant":
            _assistant(messages, unless=("content", "tool_calls"))["content"] = content
        else:
            messages.append({"role": item.role, "content": content})
    elif isinstance(item, _Reasoning):
        if text := _reasoning_text(item, where):
            _assistant(messages, unless=("reasoning", "content", "tool_calls"))["reasoning"] = text
    else:
        name = shown_name(item.name, item.namespace)
        if isinstance(item, _Call):
            given = arguments.read(item.arguments, f"{where}.arguments")
        else:
            given = msgspec.json.encode({CUSTOM_ARGUMENT: item.input}).decode()
        called[item.call_id] = name
        call = {
            "id": item.call_id,
            "type": "function",
            "function": {"name": name, "arguments": given},
        }
        _assistant(messages, unless=()).setdefault("tool_calls", []).append(call)


class _Arguments:
    """Reads the arguments of a conversation's calls, and mends up to `MAX_MENDED_CHARS` of them."""

    def __init__(self) -> None:
        self._left = MAX_MENDED_CHARS

    def read(self, text: str, where: str) -> str:
        """Return the JSON object of a call's arguments, completed where the output was cut off within them.

        Clients hand such a call back with the whole conversation: refusing it would end all of those.
        """
        if _is_object(text or "{}"):
            return text or "{}"
        self._left -= len(text)
        if self._left >= 0:
            mended = JsonText()
            whole = mended.feed(text, 0)[0] + mended.finish()
            if _is_object(whole):
                return whole
        raise _fault(where, "must be a JSON object as text")


def _is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _assistant(messages: list[dict[str, Any]], unless: Sequence[str]) -> dict[str, Any]:
    """Return the assistant's open message, or a new one if the last has one of these members."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or any(name in last for name in unless):
        last = {"role": "assistant"}
        messages.append(last)
    return last


def _with_one_opening(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the instructions and the system's messages at the start: most templates read one only."""
    count = 0
    while count < len(messages) and messages[count]["role"] in ("system", "developer"):
        count += 1
    if count < 2:
        return messages
    parts = [part for message in messages[:count] for part in _parts(message["content"])]
    text = "\n\n".join(part["text"] for part in parts if part["text"])
    return [{"role": messages[0]["role"], "content": text}, *messages[count:]]


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(content: _Content, where: str) -> str | list[dict[str, Any]]:
    """Return a content as chats have it: a string, or a list of text parts."""
    if isinstance(content, str):
        return content
    texts = [_part_text(part, f"{where}[{index}]") for index, part in enumerate(content)]
    if len(texts) < 2:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _part_text(part: _Part, where: str) -> str:
    name = TEXT_PARTS.get(part.type)
    if name is None:
        raise _fault(f"{where}.type", f"{clip(part.type)!r} is not supported, as this model reads text only")
    text: str | None = getattr(part, name)
    if text is None:
        raise _fault(where, f"needs {name!r}")
    return text


def _reasoning_text(item: _Reasoning, where: str) -> str:
    """Return the reasoning of an earlier response: in full, as `encrypted_content`, or its summary."""
    if item.content:
        return "".join(_part_text(part, f"{where}.content") for part in item.content)
    if item.encrypted_content:
        return open_reasoning(item.encrypted_content, where)
    return "\n\n".join(_part_text(part, f"{where}.summary") for part in item.summary)


def seal_reasoning(text: str) -> str:
    """Return `encrypted_content`: the text in a form that clients hand back. Nothing about it is secret."""
    return _CARRIED + base64.urlsafe_b64encode(text.encode()).decode()


def open_reasoning(content: str, where: str) -> str:
    """Return the text of `seal_reasoning`. Raises `InvalidRequestError` for what other servers made."""
    try:
        if not content.startswith(_CARRIED):
            raise ValueError
        return base64.b64decode(content[len(_CARRIED) :], b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        raise _fault(f"{where}.encrypted_content", "was not made by this server") from None


def listed_item(item: Any, suffix: str, index: int) -> dict[str, Any]:
    """Return an input item with its type, an id and its content as parts, for a list of them."""
    kind = item_type(item)
    listed = {
        "id": f"{PREFIXES.get(kind, kind)}_{suffix}_i{index}",
        "type": kind,
        "status": "completed",
        **item,
    }
    if kind == MESSAGE and isinstance(item["content"], str):
        text: dict[str, Any] = {"type": "input_text", "text": item["content"]}
        if item["role"] == "assistant":
            text |= {"type": "output_text", "annotations": []}
        listed["content"] = [text]
    return listed


# ---- tools --------------------------------------------------------------------------------------------


def read_tools(given: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, ToolName]]:
    """Return the functions that the model is shown, in the form of chats, and what their names stand for.

    Raises `InvalidRequestError` that names the tool at fault; what only a service could run is refused.
    """
    functions: list[dict[str, Any]] = []
    names: dict[str, ToolName] = {}
    for where, tool, namespace in _flat(given):
        kind = tool.get("type")
        if kind == "function":
            if "function" in tool and "name" not in tool:
                problem = "is the form of chats: name and parameters stand beside the type here"
                raise _fault(f"{where}.function", problem, "tools")
            function = _convert(tool, _Function, where, "tools")
            shown = without_nulls(msgspec.structs.asdict(function))
            known = ToolName(function.name, False, namespace)
        elif kind == "custom":
            custom = _convert(tool, _Custom, where, "tools")
            if custom.format is not None and custom.format.get("type") != "text":
                raise _unsupported(f"{where}.format.type", custom.format.get("type"), "tools")
            shown = without_nulls({"description": custom.description, "parameters": _CUSTOM_PARAMETERS})
            known = ToolName(custom.name, True, namespace)
        else:
            raise _unsupported(f"{where}.type", kind, "tools")
        for name, harmless in _TOOL_OPTIONS.items():
            if not is_harmless(tool.get(name), harmless):
                raise _fault(f"{where}.{name}", "is not supported", "tools")
        name = shown_name(known.name, namespace)
        if name in names:
            raise _fault(f"{where}.name", f"{clip(name)!r} is the name of two tools", "tools")
        names[name] = known
        functions.append({"type": "function", "function": {**shown, "name": name}})
    return functions, names


def _flat(given: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """Yield each tool with its place and its namespace."""
    for index, tool in enumerate(given):
        where = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise _fault(where, "must be an object", "tools")
        if tool.get("type") != "namespace":
            yield where, tool, None
            continue
        group = _convert(tool, _Namespace, where, "tools")
        for inner, member in enumerate(group.tools):
            if not isinstance(member, dict):
                raise _fault(f"{where}.tools[{inner}]", "must be an object", "tools")
            yield f"{where}.tools[{inner}]", member, group.name


def shown_name(name: str, namespace: str | None) -> str:
    """Return the one name of a tool that the model is shown."""
    return name if namespace is None else f"{namespace}__{name}"


def read_tool_choice(choice: Any, tools: Tools) -> Any:
    """Return the choice in the form of chats. Raises `InvalidRequestError` naming `tool_choice`."""
    if choice in (None, "none", "auto"):
        return choice if tools else None  # with nothing to choose from, too, as at OpenAI
    if choice == "required":
        return choice
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "allowed_tools":
        mode, allowed = choice.get("mode"), choice.get("tools")
        if mode not in ("auto", "required") or not isinstance(allowed, list) or not allowed:
            raise _fault("tool_choice", "needs 'mode' (auto or required) and 'tools'", "tool_choice")
        named = [_named(tool, tools, f"tool_choice.tools[{i}]") for i, tool in enumerate(allowed)]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
    return _named(choice, tools, "tool_choice")


def _named(choice: Any, tools: Tools, where: str) -> dict[str, Any]:
    if not isinstance(choice, dict):
        raise _fault(where, "must be 'none', 'auto', 'required' or an object that names tools", "tool_choice")
    kind = choice.get("type")
    if kind not in ("function", "custom"):
        raise _unsupported(f"{where}.type", kind, "tool_choice")
    wanted = ToolName(choice.get("name", ""), kind == "custom", choice.get("namespace"))
    shown = next((name for name, known in tools.items() if known == wanted), None)
    if shown is None:
        raise _fault(f"{where}.name", f"no tool of type {kind!r} has it", "tool_choice")
    return {"type": "function", "function": {"name": shown}}


# ---- faults -------------------------------------------------------------------------------------------


def _convert(value: Any, kind: type[T], where: str, param: str = "input") -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        raise _fault(f"{where}{path.rstrip('`')}", _lowered(problem), param) from None


def _lowered(problem: str) -> str:
    return re.sub("^[A-Z]", lambda first: first[0].lower(), problem.replace("`", "'"))


def _unsupported(where: str, kind: Any, param: str) -> InvalidRequestError:
    if not isinstance(kind, str):
        return _fault(where, "must be a string", param)
    why = ": this server runs no tools itself; switch it off in the client" if param != "input" else ""
    return _fault(where, f"{clip(kind)!r} is not supported{why}", param)


def _fault(where: str, problem: str, param: str = "input") -> InvalidRequestError:
    return InvalidRequestError(f"{where}: {problem}.", param)
