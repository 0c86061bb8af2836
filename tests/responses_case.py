"""Requests to /v1/responses, and what the SDK's types say of their answers."""

from __future__ import annotations

import json
from typing import Any

import pydantic
from chat_tools import HERMES, WEATHER
from fake_client import FakeClient
from http_tools import in_process
from openai.types.responses import Response, ResponseStreamEvent

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
FUNCTION = {"type": "function", **WEATHER["function"], "strict": False}
CUSTOM = {"type": "custom", "name": "patch", "description": "Patch files"}
ASK: dict[str, Any] = {"model": "fake-model", "input": "hi", "temperature": 0}


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream; checks the framing, the numbers and every event against the SDK's types."""
    found = []
    for frame in text.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert text.endswith("\n\n")
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def playing(*outputs: str) -> FakeClient:
    """A model that writes these outputs, one for each request."""
    client = FakeClient(max_model_len=1 << 16)
    client.recorded = list(outputs)
    return client


def prompt_of(client: FakeClient) -> str:
    """The last prompt that the model was given."""
    return client.tokenizer.decode(client.submitted[-1][0], False)


async def ask(
    client: FakeClient | None = None, /, *, args: dict[str, Any] | None = None, **body: Any
) -> tuple[int, Any]:
    """Status and answer; the events of a stream."""
    async with in_process(client or FakeClient(), **(HERMES if args is None else args)) as http:
        answer = await http.post("/v1/responses", json={**ASK, **body})
    whole = answer.status_code != 200 or not body.get("stream")
    return answer.status_code, answer.json() if whole else events_of(answer.text)


def without_identity(response: dict[str, Any]) -> str:
    """A response without its own and its times."""
    suffix = response["id"].removeprefix("resp_")
    kept = {name: value for name, value in response.items() if name not in ("created_at", "completed_at")}
    return json.dumps(kept).replace(suffix, "ID")


PARSERS = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


async def both(output: str, **body: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole response and the events of the same output, which have to agree."""
    body = {"args": PARSERS, **body}
    _, whole = await ask(playing(output), **body)
    Response.model_validate(whole)
    _, events = await ask(playing(output), **body, stream=True)
    streamed = json.loads(without_identity(events[-1]["response"]))
    expected = json.loads(without_identity(whole))
    for response in (streamed, expected):  # the ids of calls are drawn
        for item in response["output"]:
            assert item.get("call_id", "call_")[:5] == "call_"
            item.pop("call_id", None)
    assert streamed == expected
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    return whole, events
