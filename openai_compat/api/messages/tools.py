"""Turns the tools of Anthropic's Messages API into those of a chat request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microvllm.openai_compat.api.messages.requests import (
    ConversationBody,
    DefinedTool,
    Message,
    Tool,
    ToolAddition,
    ToolReference,
    ToolRemoval,
    ToolResult,
    fault,
    read_part,
)
from microvllm.openai_compat.api.reading import read_value
from microvllm.openai_compat.api.requests import Function as ChatFunction
from microvllm.openai_compat.api.requests import FunctionName, NamedFunction
from microvllm.openai_compat.api.requests import Tool as ChatTool
from microvllm.openai_compat.api.requests import ToolChoice as ChatToolChoice
from microvllm.openai_compat.errors import Fault, clip, shape_error


def tool_fields(body: ConversationBody, turns: Sequence[Message]) -> dict[str, Any]:
    """Return the fields of a chat request. Raises `InvalidRequestError` naming the member at fault."""
    choice = body.tool_choice
    tools = _offered(body, turns)
    if not tools:
        if choice is not None and choice.type in ("any", "tool"):
            raise fault("tool_choice", f"{choice.type!r} needs tools")
        return {}
    fields: dict[str, Any] = {"tools": list(tools.values()), "tool_choice": "auto"}
    if choice is not None:
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        fields["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
        if choice.type == "tool":
            if choice.name is None or choice.name not in tools:
                raise fault("tool_choice.name", "must be the name of one of the tools")
            fields["tool_choice"] = ChatToolChoice(function=NamedFunction(name=choice.name))
    return fields


def _offered(body: ConversationBody, turns: Sequence[Message]) -> dict[str, ChatTool]:
    """Return the tools that may be called now, by name: the declared ones, as the messages change them."""
    known: dict[str, ChatTool] = {}
    offered: dict[str, ChatTool] = {}
    for index, value in enumerate(body.tools or ()):
        tool, deferred = _tool(value, f"tools[{index}]")
        name = tool.function.name
        if name in known:
            raise fault(f"tools[{index}].name", f"{clip(name)!r} is the name of another tool")
        known[name] = tool
        if not deferred:
            offered[name] = tool
    for index, turn in enumerate(turns):
        blocks = [] if isinstance(turn.content, str) else turn.content
        for place, block in enumerate(blocks):
            if isinstance(block, ToolResult) and isinstance(block.content, list):
                names = [part.tool_name for part in block.content if isinstance(part, ToolReference)]
            elif isinstance(block, ToolAddition):
                if isinstance(block.tool, DefinedTool):
                    where = f"messages[{index}].content[{place}].tool.definition"
                    tool, _ = _tool(block.tool.definition, where)
                    known[tool.function.name] = tool
                    names = [tool.function.name]
                else:
                    names = [block.tool.name]
            else:
                if isinstance(block, ToolRemoval):
                    offered.pop(block.tool.name, None)
                continue
            for name in names:
                if name not in known:
                    where = f"messages[{index}].content[{place}]"
                    raise fault(where, f"{clip(name)!r} is not the name of a tool")
                offered[name] = known[name]
    return offered


def _tool(value: Any, place: str) -> tuple[ChatTool, bool]:
    """Return a tool, and whether it is only shown once a message names it."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in (None, "custom"):
        problem = f"tools of type {clip(repr(kind))} are not supported by this server, only custom ones"
        raise fault(place, problem)
    tool = read_part(Tool, value, place)
    try:
        read_value(FunctionName, tool.name)
    except Fault as misfit:
        raise shape_error([(f"body.{place}.name", misfit)]) from None
    if tool.allowed_callers is not None and "direct" not in tool.allowed_callers:
        raise fault(f"{place}.allowed_callers", "needs 'direct': this server executes no code")
    parameters = {"type": "object", **tool.input_schema}
    if tool.input_examples:
        parameters["examples"] = tool.input_examples
    function = ChatFunction(name=tool.name, description=tool.description, parameters=parameters)
    if tool.strict is not None:
        function.strict = tool.strict
    return ChatTool(function=function), tool.defer_loading is True
