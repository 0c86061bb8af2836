"""/v1/responses: from turn to turn, and the bounds of what is kept for it."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import pytest
from fake_client import FakeClient
from http_tools import in_process
from responses_case import ASK, FUNCTION, ask, playing, prompt_of

from microvllm.openai_compat.api.responses.store import References, ResponseStore, StoredResponse
from microvllm.runtime.errors import InvalidRequestError


async def test_a_response_continues_the_one_before() -> None:
    client = playing("one", "two", "three")
    async with in_process(client) as http:
        answers, previous = [], None
        for text in ("a", "b", "c"):
            body = {**ASK, "input": text, "previous_response_id": previous, "instructions": f"I{text}"}
            answers.append((await http.post("/v1/responses", json=body)).json())
            previous = answers[-1]["id"]
        assert prompt_of(client) == (
            "system: Ic\nuser: a\nassistant: one\nuser: b\nassistant: two\nuser: c\nassistant: "
        )
        read = await http.get(f"/v1/responses/{previous}")
        assert read.json() == answers[-1] and answers[-1]["previous_response_id"] == answers[1]["id"]
        # The conversation ends where one of its responses is gone.
        gone = (await http.delete(f"/v1/responses/{answers[0]['id']}")).json()
        assert gone == {"id": answers[0]["id"], "object": "response", "deleted": True}
        assert (await http.get(f"/v1/responses/{answers[0]['id']}")).status_code == 404
        error = (await http.post("/v1/responses", json={**ASK, "previous_response_id": previous})).json()
        assert error["error"]["param"] == "previous_response_id"


async def test_an_item_can_be_handed_back_as_a_reference() -> None:
    client = playing("one", "two", "three")
    async with in_process(client) as http:
        first = (await http.post("/v1/responses", json=ASK)).json()
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        items = [{"role": "user", "content": "hi"}, reference, {"role": "user", "content": "go on"}]
        second = (await http.post("/v1/responses", json={**ASK, "input": items})).json()
        assert prompt_of(client) == "user: hi\nassistant: one\nuser: go on\nassistant: "
        # What was stored is the item itself.
        await http.post("/v1/responses", json={**ASK, "previous_response_id": second["id"]})
        assert prompt_of(client).startswith("user: hi\nassistant: one\nuser: go on\nassistant: two\n")


async def test_nothing_is_kept_that_should_not_be() -> None:
    async with in_process(FakeClient()) as http:
        answer = (await http.post("/v1/responses", json={**ASK, "store": False})).json()
        assert answer["store"] is False
        assert (await http.get(f"/v1/responses/{answer['id']}")).status_code == 404
    async with in_process(FakeClient(), max_response_store_bytes=0) as http:
        answer = (await http.post("/v1/responses", json=ASK)).json()
        assert answer["store"] is False
        for body in ({"store": True}, {"previous_response_id": answer["id"]}, {"background": True}):
            error = (await http.post("/v1/responses", json={**ASK, **body})).json()["error"]
            assert error["param"] == next(iter(body)) and "--max-response-store-bytes" in error["message"]


async def test_an_id_is_taken_once() -> None:
    async with in_process(FakeClient()) as http:
        body = {**ASK, "request_id": "mine"}
        first = (await http.post("/v1/responses", json=body, headers={"x-request-id": "theirs"})).json()
        again = await http.post("/v1/responses", json=body)
        other = (await http.post("/v1/responses", json=ASK, headers={"x-request-id": "mine"})).json()
        bodies = [{**ASK, "request_id": "both", "input": text, "background": True} for text in "ab"]
        both = await asyncio.gather(*(http.post("/v1/responses", json=body) for body in bodies))
        kept = (await http.get("/v1/responses/resp_both/input_items")).json()["data"][0]["content"][0]["text"]
    assert first["id"] == "resp_mine" != other["id"] and kept == "a"
    assert sorted(answer.status_code for answer in both) == [200, 400]
    assert (again.status_code, again.json()["error"]["param"]) == (400, "request_id")


async def test_input_items_are_listed() -> None:
    async with in_process(FakeClient()) as http:
        items = [{"role": "user", "content": text, "id": f"msg_{text}"} for text in "abc"]
        answer = (await http.post("/v1/responses", json={**ASK, "input": items})).json()
        path = f"/v1/responses/{answer['id']}/input_items"
        listed = (await http.get(path)).json()
        assert [item["id"] for item in listed["data"]] == ["msg_c", "msg_b", "msg_a"]
        assert listed["data"][0]["content"] == [{"type": "input_text", "text": "c"}]
        page = (await http.get(path, params={"order": "asc", "after": "msg_a", "limit": 1})).json()
        assert (page["first_id"], page["last_id"], page["has_more"]) == ("msg_b", "msg_b", True)
        for query in ({"order": "up"}, {"limit": "0"}, {"limit": "x"}, {"after": "msg_z"}):
            assert (await http.get(path, params=query)).json()["error"]["param"] in query


def stored(text: str, parent: str | None = None) -> StoredResponse:
    response = {"id": "x", "status": "completed", "output": [{"id": "y", "text": text}]}
    return StoredResponse(json.dumps(response).encode(), json.dumps([text]).encode(), parent)


def test_the_store_is_bounded_by_bytes_and_the_least_recently_used_goes_first() -> None:
    size = stored("a").num_bytes
    store = ResponseStore(3 * size, 1 << 20)
    for name in "abc":
        store.put(name, stored(name))
    store.get("a")
    store.put("d", stored("d"))
    assert [name for name in "abcd" if name in store] == ["a", "c", "d"] and store.num_bytes == 3 * size
    store.put("d", stored("d"))
    assert len(store) == 3 and store.num_bytes == 3 * size
    store.put("e", stored("e" * 4 * size))
    assert "e" not in store and len(store) == 3
    for name in "acd":
        store.delete(name)
    assert (len(store), store.num_bytes) == (0, 0)


def test_the_store_is_bounded_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microvllm.openai_compat.api.responses.store.MAX_RESPONSES", 2)
    store = ResponseStore(1 << 20, 1 << 20)
    for name in "abc":
        store.put(name, stored(name))
    assert [name for name in "abc" if name in store] == ["b", "c"]


def test_a_conversation_is_evicted_from_its_end() -> None:
    store = ResponseStore(4 * stored("a").num_bytes, 1 << 20)
    store.put("a", stored("a"))
    store.put("b", stored("b", "a"))
    store.put("c", stored("c", "b"))
    assert store.conversation("b") == ["a", {"id": "y", "text": "a"}, "b", {"id": "y", "text": "b"}]
    store.put("x", stored("x"))
    store.put("y", stored("y"))
    assert [name for name in "abcxy" if name in store] == ["a", "b", "x", "y"]
    store.delete("a")
    with pytest.raises(InvalidRequestError, match="or one before it"):
        store.conversation("b")


def test_the_turns_that_a_request_names_are_bounded() -> None:
    store = ResponseStore(1 << 20, 100)
    store.put("a", stored("a" * 20))
    store.put("b", stored("b" * 20, "a"))
    assert len(store.conversation("a")) == 2
    with pytest.raises(InvalidRequestError, match="more than 100 bytes") as caught:
        store.conversation("b")
    assert caught.value.param == "previous_response_id"


def test_items_that_a_request_names_are_read_once_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    item = {"id": "msg_x_0", "text": "a" * 60}
    response = {
        "id": "resp_x",
        "status": "completed",
        "output": [item, {"id": "msg_x_1"}],
        "instructions": "i",
    }
    store = ResponseStore(1 << 20, 500)
    store.put("resp_x", StoredResponse(json.dumps(response).encode(), b"[]", None))
    reads = []
    monkeypatch.setattr(
        store, "output_of", lambda name: reads.append(name) or ResponseStore.output_of(store, name)
    )
    references = References(store)
    first = references.find("msg_x_0")
    assert first == item and references.find("msg_x_0") is first, "a copy for each would multiply it"
    assert references.find("msg_x_2") is None and references.find("msg_y_0") is None
    assert references.find("no id") is None
    assert reads == ["resp_x", "resp_y"]
    with pytest.raises(InvalidRequestError, match="more than 500 bytes") as caught:
        for _ in range(10):
            references.find("msg_x_0")
    assert caught.value.param == "input"


def test_what_stands_beside_a_named_item_is_not_read() -> None:
    """A reference of 60 bytes must not have the whole output of a response built in memory."""
    items = [{"id": f"msg_x_{i}", "list": [[]] * 20_000} for i in range(20)]
    response = {"id": "resp_x", "status": "completed", "output": items}
    store = ResponseStore(1 << 24, 1 << 20)
    store.put("resp_x", StoredResponse(json.dumps(response).encode(), b"[]", None))
    del items, response
    tracemalloc.start()
    try:
        references = References(store)
        item = references.find("msg_x_7")
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert item["id"] == "msg_x_7" and len(item["list"]) == 20_000
    assert held < 2 << 20 and most < 3 << 20, "twenty of them take 24 MB"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metadata", {"a": "x" * 513}),
        ("metadata", {"x" * 513: "a"}),
        ("user", "x" * 513),
        ("safety_identifier", "x" * 513),
        ("prompt_cache_key", "x" * 513),
        ("tools", [{**FUNCTION, "unknown": "x" * (1 << 20)}]),
        ("text", {"format": {"type": "text", "unknown": "x" * (1 << 20)}}),
        ("tool_choice", {"type": "function", "name": "x" * (1 << 20)}),
    ],
)
async def test_what_a_response_repeats_is_bounded(field: str, value: Any) -> None:
    """It would be held, and in a stream written three times."""
    status, answer = await ask(**{field: value})
    assert status == 400 and field in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 300


async def test_the_input_of_unfinished_responses_is_bounded() -> None:
    client = FakeClient()
    client.stall_after = 1
    item = {"role": "user", "content": "hi", "unknown": "x" * 10_000}
    async with in_process(client, max_response_store_bytes=1 << 14) as http:

        async def send(**more: Any) -> Any:
            return await http.post("/v1/responses", json={**ASK, "input": [item], "background": True, **more})

        first = await send()
        assert first.status_code == 200
        refused = await send()
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        small = await send(input="hi")
        assert small.status_code == 200, "what fits is served"
        for name in (first.json()["id"], small.json()["id"]):
            assert (await http.post(f"/v1/responses/{name}/cancel")).status_code == 200
        again = await send()
        assert again.status_code == 200
        assert (await http.post(f"/v1/responses/{again.json()['id']}/cancel")).status_code == 200
    assert not client.running
