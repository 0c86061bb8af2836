"""What the tests of the parsers share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from microvllm.openai_compat.parsers.events import (
    Arguments,
    Event,
    Function,
    ParsedMessage,
    ToolCall,
    fold,
)
from microvllm.openai_compat.parsers.registry import make_parser

STRING, INTEGER = {"type": "string"}, {"type": "integer"}
FUNCTIONS = (
    Function("get_weather", {"type": "object", "properties": {"city": STRING, "days": INTEGER}}),
    Function("get_time", {"type": "object", "properties": {}}),
    Function(
        "write_file",
        {
            "type": "object",
            "properties": {"path": STRING, "text": STRING, "mode": INTEGER, "tags": {"type": "array"}},
        },
    ),
)


def events_of(pieces: Iterable[str], formats: tuple[str | None, str | None], **options: Any) -> list[Event]:
    """Parse an output that arrives in these pieces."""
    cut_off = options.pop("cut_off", False)
    ids = iter(range(10**6))
    parser = make_parser(*formats, **{"tools": FUNCTIONS, "new_id": lambda: f"id{next(ids)}", **options})
    events = [event for piece in pieces for event in parser.feed(piece, [])]
    events += parser.end(cut_off=cut_off)
    for before, event in zip([None, *events], events, strict=False):
        if isinstance(event, Arguments):
            assert isinstance(before, ToolCall | Arguments) and before.index == event.index
    return events


def parse(text: str, formats: tuple[str | None, str | None], **options: Any) -> ParsedMessage:
    return fold(events_of([text], formats, **options))


def check_splits(text: str, formats: tuple[str | None, str | None], **options: Any) -> ParsedMessage:
    """Parse the text whole, cut in two at every place, and in pieces of 1 to 4 characters."""
    whole = parse(text, formats, **options)
    for size in range(1, 5):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert fold(events_of(pieces, formats, **options)) == whole, (size, text)
    for cut in range(1, len(text)):
        assert fold(events_of([text[:cut], text[cut:]], formats, **options)) == whole, (
            text[:cut],
            text[cut:],
        )
    return whole


def calls_of(message: ParsedMessage) -> list[tuple[str, Any]]:
    """Name and arguments of each call."""
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


def argument_pieces(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Arguments)]
