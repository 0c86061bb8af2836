"""Streams of the Messages API, as a client reads them."""

from __future__ import annotations

import json
from typing import Any

from microvllm.openai_compat.api.messages.create import tool_input


def sse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The name and the data of each event of a stream; checks the framing."""
    frames = text.split("\n\n")
    assert frames.pop() == ""
    found = []
    for frame in frames:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append((event["type"], event))
    return found


# ---- requests -----------------------------------------------------------------------------------------


def added_up(events: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The content blocks of a stream, as a client adds them up."""
    found: list[dict[str, Any]] = []
    arguments: dict[int, str] = {}
    for name, event in events:
        if not name.startswith("content_block_"):
            continue
        if name == "content_block_start":
            assert event["index"] == len(found)
            found.append(event["content_block"])
            continue
        assert event["index"] == len(found) - 1
        if name == "content_block_delta":
            delta = event["delta"]
            kind = delta.pop("type").removesuffix("_delta")
            ((member, piece),) = delta.items()
            if kind == "input_json":
                arguments[event["index"]] = arguments.get(event["index"], "") + piece
            else:
                found[-1][member] += piece
    for index, given in arguments.items():
        found[index]["input"] = tool_input(given)
    return found


# ---- errors and keys ----------------------------------------------------------------------------------
