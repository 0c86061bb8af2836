"""Defines the request bodies of Anthropic's Messages API as msgspec structs.

The three states of a field are those of `requests.py`. `messages`, `system` and `tools` hold parts of several
kinds, which `read_part` reads as the types below; a kind that is not among them is refused by name.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from microvllm.openai_compat.api.requests import (
    MAX_STOP_STRINGS,
    MAX_TOOLS,
    Body,
    CacheSalt,
    TemplateKwargs,
)
from microvllm.openai_compat.errors import Fault, clip, shape_error
from microvllm.runtime import request as parameters
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import Int64

PartT = TypeVar("PartT")
_UNKNOWN_KIND = re.compile(r"Invalid value '(.*)' - at `\$(.*)\.type`", re.DOTALL)
_MISFIT = re.compile(r"(.*?)(?: - at `\$(.*)`)?", re.DOTALL)


class Text(msgspec.Struct, tag_field="type", tag="text"):
    """A block of text."""

    text: str


class Thinking(msgspec.Struct, tag_field="type", tag="thinking"):
    """The reasoning of an assistant. Its signature is not checked: the client may change what it likes."""

    thinking: str


class RedactedThinking(msgspec.Struct, tag_field="type", tag="redacted_thinking"):
    """Reasoning that only Anthropic's servers can read."""


class ToolUse(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A call of a tool by an assistant."""

    id: str
    name: str
    input: dict[str, Any]


class ToolReference(msgspec.Struct, tag_field="type", tag="tool_reference"):
    """The name of a tool that a search of the client found: from here on it may be called."""

    tool_name: str


class ToolResult(msgspec.Struct, tag_field="type", tag="tool_result"):
    """What a call returned."""

    tool_use_id: str
    content: str | list[Text | ToolReference] | None = None
    is_error: bool | None = None


class NamedTool(msgspec.Struct, tag_field="type", tag="tool_reference"):
    """A tool of `tools`, or one that was defined before."""

    name: str


class DefinedTool(msgspec.Struct, tag_field="type", tag="tool_definition"):
    """A tool as `tools` would have it."""

    definition: dict[str, Any]


class ToolAddition(msgspec.Struct, tag_field="type", tag="tool_addition"):
    """A tool that may be called from here on."""

    tool: NamedTool | DefinedTool


class ToolRemoval(msgspec.Struct, tag_field="type", tag="tool_removal"):
    """A tool that may not be called from here on."""

    tool: NamedTool


Block = Text | Thinking | RedactedThinking | ToolUse | ToolResult | ToolAddition | ToolRemoval


class Effort(msgspec.Struct):
    """The part of `output_config` that a system message may have."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class Message(msgspec.Struct):
    """A turn of the conversation. Claude Code names some of its own messages `ctx` and `msg`.

    The last two members are a system message's: until when it is shown, and the effort from there on.
    """

    role: Literal["user", "assistant", "system", "ctx", "msg"]
    content: str | list[Block]
    clear_at: Literal["next_user_message", "never"] | None = None
    output_config: Effort | None = None


class Tool(msgspec.Struct):
    """A tool that the client runs. With `defer_loading` it is only shown once a message names it."""

    name: Annotated[str, Meta(min_length=1)]
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    """`tool_choice`: whether a tool is called, and how many."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingConfig(msgspec.Struct, kw_only=True):
    """`thinking`: whether the model reasons, for how many tokens, and whether the client gets the text."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Int64 | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct, kw_only=True):
    """A JSON schema that the text of the response follows."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True):
    """`output_config`: how much effort to spend, and the format of the text."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ContextManagement(msgspec.Struct, kw_only=True):
    """`context_management`: what to leave out of the conversation."""

    edits: list[Any] = []


_TEXT_BLOCK = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_BLOCK = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["user", "assistant", "system", "ctx", "msg"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK}]},
    },
    "required": ["role", "content"],
}
_SYSTEM = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_BLOCK}]}
_TOOL = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "input_schema": {"type": "object"}},
    "required": ["name", "input_schema"],
}


class ConversationBody(Body, kw_only=True):
    """What a prompt is made of, which both bodies have."""

    ignored = (
        # accounting, routing, and hints to a cache that here finds every prefix by itself
        *("cache_control", "metadata", "service_tier", "speed", "diagnostics", "billing_policy"),
        # what to do if a model declines, which this server does not judge
        *("fallbacks", "fallback_credit_token"),
        # parts of vLLM that a dense text model does not have
        *("watermarking", "mm_payload", "return_mm_kwargs"),
    )
    refused = {
        "container": (),
        "mcp_servers": ([],),
        "compaction": (),
        "thread": (),
        "inference_geo": ("global",),
        "kv_transfer_params": ({},),
        "ec_transfer_params": ({},),
        "vllm_xargs": ({},),
    }

    model: str | None = None
    messages: Annotated[list[Any], Meta(extra_json_schema={"items": _MESSAGE, "minItems": 1})]
    system: Annotated[Any, Meta(extra_json_schema=_SYSTEM)] = None
    tools: Annotated[list[Any], Meta(max_length=MAX_TOOLS, extra_json_schema={"items": _TOOL})] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    context_management: ContextManagement | None = None
    chat_template_kwargs: TemplateKwargs = {}


class CountTokensRequest(ConversationBody, kw_only=True):
    """The body of /v1/messages/count_tokens."""


class MessagesRequest(ConversationBody, kw_only=True):
    """The body of /v1/messages."""

    max_tokens: Int64
    temperature: parameters.Temperature | None = None
    top_p: parameters.TopP | None = None
    top_k: parameters.TopK | None = None
    stop_sequences: Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS)] = []
    stream: bool = False
    cache_salt: CacheSalt = ""


def read_part(kind: type[PartT], value: Any, place: str) -> PartT:
    """Read a part of a body as a value of this type. Raises `InvalidRequestError` naming its place."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text = str(error)
    if (unknown := _UNKNOWN_KIND.fullmatch(text)) is not None:
        problem = f"Blocks of type {clip(unknown[1])!r} are not supported here by this server"
        raise shape_error([(f"body.{place}{unknown[2]}", Fault(problem))])
    misfit = _MISFIT.fullmatch(text)
    problem, inner = (clip(text), "") if misfit is None else (clip(misfit[1]), misfit[2] or "")
    raise shape_error([(f"body.{place}{inner}", Fault(problem))])


def fault(place: str, problem: str) -> InvalidRequestError:
    """Return the 400 for a value that has the right shape but cannot be served."""
    return InvalidRequestError(f"{place}: {problem}.", place)
