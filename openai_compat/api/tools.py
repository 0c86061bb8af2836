"""Checks the tools of a chat, and says which the chat template shows and which may or must be called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microvllm.openai_compat.api.requests import ChatCompletionRequest, TokenizeRequest, Tool, ToolChoice
from microvllm.openai_compat.errors import clip
from microvllm.openai_compat.parsers.schema import BY_NAME
from microvllm.runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from microvllm.openai_compat.config import AnswerArgs

MAX_SCHEMA_DEPTH = 64
TYPES = frozenset(("string", "number", "integer", "boolean", "object", "array", "null"))
# Where a schema has schemas, in its own form, as a list, or by name.
ONE = ("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request: `allowed` may be called, with `choice` "required" at least one of them must be.

    `named` says that the request names the one function that must be called.
    """

    allowed: Sequence[Tool]
    choice: Literal["auto", "required"]
    named: bool = False


def shown_tools(
    body: ChatCompletionRequest | TokenizeRequest, args: AnswerArgs
) -> list[dict[str, Any]] | None:
    """Return the tools for the chat template, None for none. Those that are not allowed are not shown."""
    tools, choice = body.tools, getattr(body, "tool_choice", None)
    if tools is None or (choice == "none" and args.exclude_tools_when_tool_choice_none):
        return None
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
        tools = _allowed(tools, choice)
    shown: list[dict[str, Any]] = msgspec.to_builtins(tools)
    return shown


def tool_use(body: ChatCompletionRequest, args: AnswerArgs, format_: str | None) -> ToolUse | None:
    """Return which tools may be called; None if none may. `format_` is that of the model's calls.

    Raises `InvalidRequestError` naming the place of what is wrong in `tools` or `tool_choice`.
    """
    use = _requested(body)
    if use is None:
        return None
    if format_ is None:
        raise InvalidRequestError(
            "The chat template shows the model no format of tool calls: start the server with "
            "`--tool-call-parser hermes`, or another format of docs/tools.md that the model was trained on, "
            'or send `tool_choice` "none".',
            "tools",
        )
    if use.choice == "auto" and not args.enable_auto_tool_choice:
        raise InvalidRequestError(
            '"auto" tool choice requires --enable-auto-tool-choice to be set', "tool_choice"
        )
    return use


def _requested(body: ChatCompletionRequest) -> ToolUse | None:
    choice = body.tool_choice
    if body.tools is None:
        if choice not in (None, "none"):
            raise InvalidRequestError("When using `tool_choice`, `tools` must be set.", "tool_choice")
        return None
    _check(body.tools)
    if isinstance(choice, str) or choice is None:
        return None if choice == "none" else ToolUse(body.tools, choice or "auto")
    allowed = _allowed(body.tools, choice)
    if choice.allowed_tools is not None:
        return ToolUse(allowed, choice.allowed_tools.mode)
    return ToolUse(allowed, "required", named=True)


def _allowed(tools: Sequence[Tool], choice: ToolChoice) -> list[Tool]:
    """Return the tools that an object as `tool_choice` names."""
    member = "function" if choice.type == "function" else "allowed_tools"
    given = getattr(choice, member)
    if given is None:
        raise InvalidRequestError(f"tool_choice.{member} must be set.", f"tool_choice.{member}")
    by_name = {tool.function.name: tool for tool in tools}
    names = [given.name] if member == "function" else [tool.function.name for tool in given.tools]
    for name in names:
        if name not in by_name:
            raise InvalidRequestError(
                f"The tool {clip(name)!r} that `tool_choice` names is not among `tools`.", "tool_choice"
            )
    return [by_name[name] for name in dict.fromkeys(names)]


def _check(tools: Sequence[Tool]) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        where, name = f"tools[{index}].function", tool.function.name
        if name in seen:
            raise InvalidRequestError(f"{where}.name {name!r} is the name of another tool.", "tools")
        seen.add(name)
        kind = (tool.function.parameters or {}).get("type")
        if isinstance(kind, str) and kind in TYPES - {"object"}:
            raise InvalidRequestError(f"{where}.parameters.type must be 'object'.", "tools")
        for place, problem in _faults(tool.function.parameters, f"{where}.parameters", 0):
            raise InvalidRequestError(f"{clip(place)} {problem}.", "tools")


def _faults(schema: Any, where: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield the places of a JSON schema that cannot be one, with what they must be."""
    if schema is None or isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        yield where, "must be a JSON schema, which is an object"
        return
    if depth > MAX_SCHEMA_DEPTH:
        yield where, f"is nested deeper than {MAX_SCHEMA_DEPTH} schemas"
        return
    kind = schema.get("type")
    for word in kind if isinstance(kind, list) else [kind]:
        if word is not None and (not isinstance(word, str) or word not in TYPES):
            yield f"{where}.type", f"must be of {', '.join(sorted(TYPES))}"
    for name, kinds, words in (("required", list, "a list of names"), ("enum", list, "a list of values")):
        if not isinstance(schema.get(name, []), kinds):
            yield f"{where}.{name}", f"must be {words}"
    if "pattern" in schema and (problem := _pattern_fault(schema["pattern"])):
        yield f"{where}.pattern", problem
    for name in ONE:
        if not isinstance(schema.get(name), list):
            yield from _faults(schema.get(name), f"{where}.{name}", depth + 1)
    for name in LISTS:
        members = schema.get(name)
        if isinstance(members, list):
            for index, member in enumerate(members):
                yield from _faults(member, f"{where}.{name}[{index}]", depth + 1)
        elif members is not None and name != "items":
            yield f"{where}.{name}", "must be a list of schemas"
    for name in BY_NAME:
        members = schema.get(name, {})
        if not isinstance(members, dict):
            yield f"{where}.{name}", "must be an object of schemas"
            continue
        for key, member in members.items():
            yield from _faults(member, f"{where}.{name}.{key}", depth + 1)


def _pattern_fault(pattern: Any) -> str | None:
    """Return what is wrong with a pattern. It is JavaScript's, which has some forms that Python's has not."""
    if not isinstance(pattern, str):
        return "must be a string"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        if not str(error).startswith(("bad escape", "unknown extension", "look-behind")):
            return f"is no regular expression ({error})"
    return None
