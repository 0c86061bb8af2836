"""/v1/responses: whole, streamed, in the background, and how a response ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_client import FakeClient
from http_tools import in_process
from openai.types.responses import Response
from responses_case import ASK, ask, playing, prompt_of, without_identity

from microvllm.openai_compat.api.responses.store import UNFINISHED
from microvllm.runtime.text.detokenizer import TextDelta


async def test_a_stream_ends_in_the_whole_response() -> None:
    _, whole = await ask(min_tokens=5)
    Response.model_validate(whole)
    _, events = await ask(min_tokens=5, stream=True)
    assert without_identity(events[-1]["response"]) == without_identity(whole)
    assert whole["status"] == "completed" and whole["output"][0]["content"][0]["text"]
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 2 and kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta",) * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_output_that_is_cut_off_is_incomplete(stream: bool) -> None:
    _, answer = await ask(max_output_tokens=3, ignore_eos=True, stream=stream)
    if stream:
        assert answer[-1]["type"] == "response.incomplete"
        answer = answer[-1]["response"]
    assert (answer["status"], answer["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    assert answer["output"][0]["status"] == "incomplete"
    assert (answer["usage"]["output_tokens"], answer["max_output_tokens"]) == (3, 3)


async def test_usage_and_options_are_reported() -> None:
    body = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "user": "me",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "top_p": 0.5,
        "truncation": "auto",
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "reasoning": {"summary": "auto"},
    }
    client = FakeClient()
    _, answer = await ask(client, **body)
    for name, value in body.items():
        assert answer[name] == ({"effort": None, **value} if name == "reasoning" else value), name
    prompt, usage = "system: Be brief.\nuser: hi\nassistant: ", answer["usage"]
    assert prompt_of(client) == prompt
    assert usage["input_tokens"] == len(prompt)
    assert usage["total_tokens"] == len(prompt) + usage["output_tokens"]


async def finished(http: Any, name: str) -> dict[str, Any]:
    while (response := (await http.get(f"/v1/responses/{name}")).json())["status"] in UNFINISHED:
        await asyncio.sleep(0)
    return response


async def test_a_response_in_the_background() -> None:
    client = playing("one", "two")
    async with in_process(client) as http:
        queued = (await http.post("/v1/responses", json={**ASK, "background": True})).json()
        Response.model_validate(queued)
        assert (queued["status"], queued["output"], queued["background"]) == ("queued", [], True)
        done = await finished(http, queued["id"])
        assert (done["status"], done["output"][0]["content"][0]["text"]) == ("completed", "one")
        assert (await http.post(f"/v1/responses/{queued['id']}/cancel")).json() == done
    assert not client.running


@pytest.mark.parametrize("method", ["cancel", "delete"])
async def test_a_response_in_the_background_is_cancelled(method: str) -> None:
    client = FakeClient()
    client.stall_after = 0
    async with in_process(client) as http:
        queued = (await http.post("/v1/responses", json={**ASK, "background": True})).json()
        path = f"/v1/responses/{queued['id']}"
        async with asyncio.timeout(60):
            while (await http.get(path)).json()["status"] == "queued" or not client.running:
                await asyncio.sleep(0)
        later = await http.post("/v1/responses", json={**ASK, "previous_response_id": queued["id"]})
        assert "still in_progress" in later.json()["error"]["message"]
        assert len(client.running) == 1
        if method == "cancel":
            cancelled = (await http.post(f"{path}/cancel")).json()
            assert cancelled["status"] == "cancelled" == (await http.get(path)).json()["status"]
        else:
            await http.delete(path)
            assert (await http.get(path)).status_code == 404
    assert not client.running and client.aborted == 1


async def test_only_the_background_can_be_cancelled() -> None:
    async with in_process(FakeClient()) as http:
        answer = (await http.post("/v1/responses", json=ASK)).json()
        refused = await http.post(f"/v1/responses/{answer['id']}/cancel")
        assert refused.status_code == 400 and "background" in refused.json()["error"]["message"]
        assert (await http.post("/v1/responses/resp_none/cancel")).status_code == 404
        streamed = await http.get(f"/v1/responses/{answer['id']}", params={"stream": "true"})
        assert (streamed.status_code, streamed.json()["error"]["param"]) == (400, "stream")


async def test_a_failure_in_the_background_is_stored() -> None:
    client = FakeClient()
    client.fail_after = 0
    async with in_process(client) as http:
        queued = (await http.post("/v1/responses", json={**ASK, "background": True})).json()
        failed = await finished(http, queued["id"])
    Response.model_validate(failed)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")


@pytest.mark.parametrize("after", [0, 2])
async def test_a_failure_in_a_stream_is_an_event(after: int) -> None:
    client = FakeClient()
    client.fail_after = after
    _, events = await ask(client, stream=True, min_tokens=5)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.failed"
    response = events[-1]["response"]
    assert (response["status"], response["error"]["message"]) == ("failed", "The engine failed.")
    assert [item["status"] for item in response["output"]] == ["incomplete"] * (after > 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_the_engine_ends_has_failed(stream: bool, monkeypatch: Any) -> None:
    client = FakeClient()
    monkeypatch.setattr(client, "generate", lambda *_: [TextDelta([97], "a", "abort")])
    _, answer = await ask(client, stream=stream)
    response = answer[-1]["response"] if stream else answer
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")


async def test_a_long_conversation_is_read() -> None:
    client = FakeClient(max_model_len=1 << 16)
    items = [{"role": "user", "content": f"number {i}"} for i in range(200)]
    assert (await ask(client, input=items))[0] == 200 and "user: number 199\n" in prompt_of(client)
    status, answer = await ask(client, input=[*items, {"role": "user"}])
    assert status == 400 and "input[200]" in answer["error"]["message"]


async def test_a_failure_of_the_whole_is_an_error() -> None:
    client = FakeClient()
    client.fail_after = 1
    status, answer = await ask(client)
    assert status == 500 and answer["error"]["message"] == "The engine failed."
