"""Defines what a model's output is parsed into: events as it arrives, and the message they add up to.

Behind a `ToolCall` come its `Arguments`, without any other event between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec


class Function(msgspec.Struct, frozen=True):
    """A function that the model may call: its name and the JSON schema of its arguments.

    `strict` says that the arguments of a call have to follow the schema.
    """

    name: str
    parameters: dict[str, Any] = {}
    strict: bool = False


class Content(msgspec.Struct, frozen=True):
    """A piece of the answer."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """A piece of the model's reasoning."""

    text: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call begins. `index` counts the calls of one output from 0."""

    index: int
    id: str
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """A piece of the JSON text of the arguments of call `index`."""

    index: int
    text: str


Event = Content | Reasoning | ToolCall | Arguments


class ParsedCall(msgspec.Struct):
    """A call: `arguments` is the text of a JSON object, or a prefix of one where the output was cut off."""

    id: str
    name: str
    arguments: str


class ParsedMessage(msgspec.Struct):
    """A whole output. `content` and `reasoning` are None where there was none."""

    content: str | None
    reasoning: str | None
    tool_calls: list[ParsedCall]


def fold(events: Iterable[Event]) -> ParsedMessage:
    """Return the message that the events add up to."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[ToolCall, list[str]]] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCall():
                calls.append((event, []))
            case Arguments(index, text):
                calls[index][1].append(text)
    return ParsedMessage(
        "".join(content) or None,
        "".join(reasoning) or None,
        [ParsedCall(call.id, call.name, "".join(pieces)) for call, pieces in calls],
    )
