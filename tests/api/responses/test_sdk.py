"""/v1/responses with the official SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from chat_tools import HERMES
from fake_client import FakeClient
from http_tools import eventually, real_server
from openai.types.responses import Response
from process_tools import PATIENCE_S
from responses_case import ASK, FUNCTION, called, playing, prompt_of


@pytest.fixture
def scripted() -> Iterator[tuple[FakeClient, openai.OpenAI]]:
    client = FakeClient(max_model_len=1 << 16)
    with real_server(client, **HERMES) as port, sdk(openai.OpenAI, port) as api:
        yield client, api


def sdk(kind: Any, port: int) -> Any:
    return kind(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=PATIENCE_S, max_retries=0)


class Point(pydantic.BaseModel):
    x: int
    y: int


def test_the_sdk_creates_reads_and_deletes(scripted: tuple[FakeClient, openai.OpenAI]) -> None:
    client, api = scripted
    client.recorded = ["one", "two", "three"]
    first = api.responses.create(**ASK)
    assert (first.output_text, first.status) == ("one", "completed") and first.usage is not None
    second = api.responses.create(**ASK, previous_response_id=first.id)
    assert second.output_text == "two" and "assistant: one" in prompt_of(client)
    assert api.responses.retrieve(second.id) == second
    (item,) = api.responses.input_items.list(second.id)
    assert item.type == "message" and item.content[0].text == "hi"  # type: ignore[union-attr]
    api.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(second.id)
    with pytest.raises(openai.BadRequestError, match="web_search"):
        api.responses.create(**ASK, tools=[{"type": "web_search"}])
    queued = api.responses.create(**ASK, background=True)
    assert api.responses.cancel(queued.id).status in ("cancelled", "completed")


def test_the_sdk_parses(scripted: tuple[FakeClient, openai.OpenAI]) -> None:
    client, api = scripted
    client.recorded = ['{"x": 1, "y": 2}']
    parsed = api.responses.parse(**ASK, text_format=Point)
    assert parsed.output_parsed == Point(x=1, y=2)
    with api.responses.stream(**ASK, text_format=Point) as stream:
        assert stream.get_final_response().output_parsed == Point(x=1, y=2)


def test_the_sdk_streams(scripted: tuple[FakeClient, openai.OpenAI]) -> None:
    client, api = scripted
    client.recorded = ["one two", "one two"]
    with api.responses.stream(**ASK) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert (
        final.output_text
        == "one two"
        == "".join(event.delta for event in events if event.type == "response.output_text.delta")
    )
    raw = list(api.responses.create(**ASK, stream=True))
    assert [event.type for event in raw] == [event.type for event in events]


async def test_the_sdk_without_blocking() -> None:
    client = playing("one", "two", "three")
    with real_server(client) as port:
        async with sdk(openai.AsyncOpenAI, port) as api:
            first = await api.responses.create(**ASK)
            async with api.responses.stream(**ASK, previous_response_id=first.id) as stream:
                final = await stream.get_final_response()
            assert (first.output_text, final.output_text) == ("one", "two")
            queued = await api.responses.create(**ASK, background=True)
            await api.responses.cancel(queued.id)
            assert (await api.responses.retrieve(queued.id)).status in ("cancelled", "completed")
            await api.responses.delete(queued.id)


def test_blocks_are_free_when_the_client_leaves(scripted: tuple[FakeClient, openai.OpenAI]) -> None:
    client, api = scripted
    client.recorded, client.stall_after = ["one two"], 3
    for event in api.responses.create(**ASK, stream=True):
        if event.type == "response.output_text.delta":
            break
    else:
        raise AssertionError("no text came")
    api.close()
    eventually(lambda: not client.running)
    assert client.aborted == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loop_of_calls(scripted: tuple[FakeClient, openai.OpenAI], streamed: bool) -> None:
    client, api = scripted
    client.recorded = [called("get_weather", city="Bern"), "It rains in Bern."]

    def respond(**body: Any) -> Response:
        if not streamed:
            return api.responses.create(**{**ASK, **body}, tools=[FUNCTION])
        with api.responses.stream(**{**ASK, **body}, tools=[FUNCTION]) as stream:
            return stream.get_final_response()

    asked = respond(input="What is the weather?")
    (call,) = asked.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Bern"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    answer = respond(input=[output], previous_response_id=asked.id)
    assert answer.output_text == "It rains in Bern." and "tool: rain" in prompt_of(client)
    # The same without the server's memory.
    client.recorded = ["It rains in Bern."]
    items = [{"role": "user", "content": "What is the weather?"}, call.model_dump(), output]
    assert respond(input=items, store=False).output_text == answer.output_text
