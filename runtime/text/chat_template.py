"""Turns chat messages into a prompt: `normalize_messages` checks them, `ChatTemplate` renders them.

Torch-free.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.text.content_format import AUTO, OPENAI, STRING
from microvllm.runtime.text.template_process import SandboxProcesses
from microvllm.runtime.text.template_sandbox import TEMPLATE_FUNCTIONS, Sandbox, shortened

MAX_MESSAGES = 10_000
MAX_PARTS = 10_000  # text parts of one message, and tool calls of one message
# What render() itself sets, and what the tokenizer method of transformers takes; not template variables.
RESERVED_NAMES = frozenset(("messages", "documents", "chat_template", "tokenize", "return_dict"))
# The types of a text part, and the field with its text.
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
# Shows in what form a template takes the arguments of calls: as an object, or as JSON text.
PROBE_TEXT = '{"key": "value"}'
PROBE_CALL: dict[str, Any] = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "f", "arguments": {"key": "value"}},
}
PROBE: Sequence[Mapping[str, Any]] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]},
    {"role": "tool", "content": "b", "name": "f", "tool_call_id": "abcdefghi"},
)
# What a part of another modality holds. Such a part may have no type.
MEDIA_FIELDS = (
    *("image_url", "input_image", "image", "image_pil", "image_embeds", "input_audio", "audio_url", "audio"),
    *("audio_embeds", "video_url", "video", "video_embeds", "prompt_embeds", "file", "tool_reference"),
)


class ChatTemplate:
    """A model's chat template (Jinja, as transformers defines it); safe to use from threads.

    `sandbox` compiles and renders it. A template is code of the model's author, so the server and the
    Python API pass `SandboxProcesses`. The default, `Sandbox`, is for templates of one's own.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        sandbox: Sandbox | SandboxProcesses | None = None,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._sandbox = Sandbox() if sandbox is None else sandbox
        self._knows_developer = re.search(r"""["']developer["']""", source) is not None

    @property
    def error(self) -> str | None:
        """Why the template cannot be used: the server runs without chat, `render` raises this each time."""
        return self._compiled[0]

    @property
    def content_format(self) -> str:
        """The form of contents that the template was written for, "string" or "openai" (a list of parts)."""
        return self._compiled[1]

    @functools.cached_property
    def _takes_text_arguments(self) -> bool:
        """Whether the template puts arguments into the text as they are, without making JSON of them."""

        def rendered(messages: Sequence[Mapping[str, Any]]) -> str:
            try:
                return self._sandbox.render(
                    self.source,
                    {
                        **self._special_tokens,
                        "messages": messages,
                        "tools": None,
                        "documents": None,
                        "add_generation_prompt": True,
                    },
                )
            except InvalidRequestError:
                return ""

        shown = rendered(PROBE)
        if shown and repr(PROBE_CALL["function"]["arguments"]) not in shown:
            return False
        return PROBE_TEXT in rendered([_with_arguments(message, _as_text) for message in PROBE])

    @functools.cached_property
    def _compiled(self) -> tuple[str | None, str]:
        try:
            return None, self._sandbox.content_format(self.source)
        except InvalidRequestError as error:
            return error.message, STRING

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        chat_template_content_format: str = AUTO,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the prompt text of a conversation that `normalize_messages` returned.

        `continue_final_message` ends the text right after the content of the last message, so that the model
        goes on with it; it excludes `add_generation_prompt`. `chat_template_content_format` "string" or
        "openai" overrides the template's own `content_format`. Further `kwargs` are variables for the
        template (`enable_thinking`). `InvalidRequestError` if the template refuses the conversation or fails.
        """
        if self.error is not None:
            raise InvalidRequestError(self.error)
        self._check_names(kwargs)
        if not self._knows_developer and any(message.get("role") == "developer" for message in messages):
            messages = _developer_as_system(messages)
        content_format = chat_template_content_format
        if content_format == AUTO:
            content_format = self.content_format
        messages = [_with_content_format(message, content_format) for message in messages]
        if any("tool_calls" in message for message in messages) and self._takes_text_arguments:
            messages = [_with_arguments(message, _as_text) for message in messages]
        marker = ""
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequestError(
                    "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                    "continue_final_message",
                )
            marker = _marker()
            messages = _append_to_final(messages, marker)
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._sandbox.render(self.source, variables)
        except InvalidRequestError:
            if not any(map(_has_text_arguments, messages)):
                raise
            # A template that lists arguments by name cannot show a text that is no object.
            variables["messages"] = [_with_arguments(message, _as_object) for message in messages]
            text = self._sandbox.render(self.source, variables)
        return _cut_at(text, marker) if marker else text

    def _check_names(self, kwargs: Mapping[str, Any]) -> None:
        for name in kwargs:
            if name in RESERVED_NAMES or name in TEMPLATE_FUNCTIONS:
                raise InvalidRequestError(
                    f"chat_template_kwargs cannot set {shortened(name)!r}.", "chat_template_kwargs"
                )


def template_problem(source: str) -> str | None:
    """Returns why a template cannot be used, None if it can."""
    return ChatTemplate(source, {}, SandboxProcesses(children=1)).error


def _marker() -> str:
    # Random, so that no message can hold it; the space at the end shows whether the template trims contents.
    return f"<{secrets.token_hex(12)}> "


def content_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a content; parts are joined by a newline, as in vLLM."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _with_content_format(message: Mapping[str, Any], content_format: str) -> Mapping[str, Any]:
    content = message.get("content", "")
    # As in vLLM the result of a tool is always a string, since that is what most templates read.
    if content_format != OPENAI or message.get("role") == "tool":
        return message if isinstance(content, str) else {**message, "content": content_text(content)}
    if not isinstance(content, str):
        return message
    parts = [{"type": "text", "text": content}] if content or not message.get("tool_calls") else []
    return {**message, "content": parts}


def _with_arguments(message: Mapping[str, Any], change: Callable[[Any], Any]) -> Mapping[str, Any]:
    """Change the arguments of a message's calls."""
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    changed = [{**function, "arguments": change(function["arguments"])} for function in functions]
    calls = zip(message["tool_calls"], changed, strict=True)
    return {**message, "tool_calls": [{**call, "function": function} for call, function in calls]}


def _has_text_arguments(message: Mapping[str, Any]) -> bool:
    calls = message.get("tool_calls", ())
    return any(isinstance(call, dict) and isinstance(call["function"]["arguments"], str) for call in calls)


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    return {"arguments": arguments} if isinstance(arguments, str) else arguments


def _developer_as_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """For a template without the role `developer`: as in vLLM, all system messages become one, the first."""
    if any(message.get("tools") for message in messages):
        raise _malformed("messages", "hold tools of a developer, a role that the chat template does not have")
    messages = [
        {**message, "role": "system"} if message.get("role") == "developer" else message
        for message in messages
    ]
    system = [message for message in messages if message.get("role") == "system"]
    if messages[0] is system[0] and len(system) == 1:
        return messages
    texts = filter(None, (content_text(message["content"]) for message in system))
    others = [message for message in messages if message.get("role") != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others]


def _append_to_final(messages: Sequence[Mapping[str, Any]], marker: str) -> list[Mapping[str, Any]]:
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        content += marker
    elif content:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + marker}]
    else:
        raise InvalidRequestError(
            "continue_final_message is set, but the final message has no content to continue.", "messages"
        )
    return [*messages[:-1], {**messages[-1], "content": content}]


def _cut_at(text: str, marker: str) -> str:
    """Cut the text at the marker. If the template trimmed the content, so would it without the marker."""
    end = text.rfind(marker.rstrip())
    if end < 0:
        raise InvalidRequestError(
            "continue_final_message is set, but the chat template does not show the final message's content.",
            "messages",
        )
    return text[:end] if text.startswith(marker, end) else text[:end].rstrip()


def normalize_messages(messages: Any) -> list[dict[str, Any]]:
    """Check the `messages` of a chat request and bring them into the one form that templates get.

    A content is a string or a list of `{"type": "text", "text": ...}`, `reasoning_content` becomes
    `reasoning` (and stays readable under its old name), arguments of calls become objects if they are, null
    and unknown fields go. The caller's objects are not changed. `InvalidRequestError` (param "messages")
    names the index and the field of the first malformed message.
    """
    if not isinstance(messages, list):
        raise _malformed("messages", f"must be a list, got {_kind(messages)}")
    if not messages:
        raise _malformed("messages", "must not be empty")
    if len(messages) > MAX_MESSAGES:
        raise _malformed("messages", f"cannot hold more than {MAX_MESSAGES} messages, got {len(messages)}")
    return [_normalize(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _normalize(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _malformed(where, f"must be an object, got {_kind(message)}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _malformed(f"{where}.role", f"must be a string, got {_kind(role)}")
    content = message.get("content")
    if role == "assistant":
        content = message.get("refusal") if content is None else content
        if message.get("audio") is not None:
            raise _malformed(f"{where}.audio", "is not supported: this model reads text only")
        if message.get("function_call") is not None:
            raise _malformed(f"{where}.function_call", "is not supported: a call stands in `tool_calls`")
    result: dict[str, Any] = {"role": role, "content": _content(content, role, where)}
    for field in ("name", "tool_call_id"):
        if (value := message.get(field)) is not None:
            result[field] = _string(value, f"{where}.{field}")
    for field in ("reasoning", "reasoning_content"):
        if (value := message.get(field)) is not None:
            # Qwen3's template reads reasoning_content, newer ones reasoning: both are given, as vLLM does.
            result["reasoning"] = result["reasoning_content"] = _string(value, f"{where}.{field}")
            break
    if role == "developer" and (tools := message.get("tools")) is not None:
        if not isinstance(tools, list) or len(tools) > MAX_PARTS:
            raise _malformed(f"{where}.tools", f"must be a list of at most {MAX_PARTS} tools")
        result["tools"] = tools
    if (calls := message.get("tool_calls")) is not None:
        if not isinstance(calls, list) or len(calls) > MAX_PARTS:
            raise _malformed(f"{where}.tool_calls", f"must be a list of at most {MAX_PARTS} tool calls")
        if calls:
            result["tool_calls"] = [
                _tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)
            ]
    return result


def _content(content: Any, role: str, where: str) -> str | list[dict[str, Any]]:
    where += ".content"
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":  # an assistant message may consist of tool calls alone
        return ""
    if not isinstance(content, list):
        raise _malformed(where, f"must be a string or a list of text parts, got {_kind(content)}")
    if (not content and role != "assistant") or len(content) > MAX_PARTS:
        raise _malformed(where, f"must have 1 to {MAX_PARTS} parts, got {len(content)}")
    return [_text_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _text_part(part: Any, where: str) -> dict[str, Any]:
    """As in vLLM: any kind of text part becomes one of type "text"; fields of the caller's own stay."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise _malformed(where, f"must be a string or an object, got {_kind(part)}")
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in MEDIA_FIELDS if part.get(name) is not None), None)
    if not isinstance(kind, str):
        raise _malformed(f"{where}.type", f"must be a string, got {_kind(kind)}")
    field = TEXT_PARTS.get(kind)
    if field is None:
        raise _malformed(
            f"{where}.type", f"{shortened(kind)[:40]!r} is not supported: this model reads text only"
        )
    more = {name: value for name, value in part.items() if name not in (field, *MEDIA_FIELDS)}
    return {**more, "type": "text", "text": _string(part.get(field), f"{where}.{field}")}


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise _malformed(where, f"must be an object, got {_kind(call)}")
    if call.get("type", "function") != "function":
        raise _malformed(f"{where}.type", "must be 'function'")
    function = call.get("function")
    if not isinstance(function, dict):
        raise _malformed(f"{where}.function", f"must be an object, got {_kind(function)}")
    name = _string(function.get("name"), f"{where}.function.name")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    result: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        result["id"] = _string(call["id"], f"{where}.id")
    return result


def _arguments(value: Any, where: str) -> dict[str, Any] | str:
    """Arguments travel as JSON text; templates expect the object (as transformers documents).

    What is no object stays a text: a call that was cut off must not end the conversation.
    """
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, dict) else value
    if not isinstance(value, dict):
        raise _malformed(where, f"must be a JSON object, got {_kind(value)}")
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _malformed(where, f"must be a string, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """Return the JSON type of a value. The value itself may be huge or nested too deeply to print."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a boolean"
    names = ((str, "a string"), ((int, float), "a number"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def _malformed(where: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where} {problem}.", "messages")
