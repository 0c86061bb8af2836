"""The OpenAPI document: valid, complete, true to the tables, and held against what the server does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openapi_spec_validator
import pytest
from fake_client import FakeClient
from http_tools import events, in_process

from microvllm.adapters.pooling_spec import Pooling
from microvllm.openai_compat.api import docs
from microvllm.openai_compat.api.absent import NOT_IMPLEMENTED
from microvllm.openai_compat.api.openapi import build_document, request_schema
from microvllm.openai_compat.api.page import FILES
from microvllm.openai_compat.api.requests import Body, honoured_fields
from microvllm.openai_compat.app import ENDPOINTS, create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.worker.profiler import ProfilerConfig

BODIES = {endpoint.path: endpoint.body for endpoint in ENDPOINTS if endpoint.body is not None}
SUBJECTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/generate": {"prompt": "hi", "max_tokens": 4},
    "/generate_stream": {"prompt": "hi", "max_tokens": 4, "stream": False},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104, 105]},
    "/v1/responses": {"input": "hi", "max_output_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/embeddings": {"input": "hi"},
    **{path: {"queries": "hi", "documents": ["you"]} for path in ("/score", "/v1/score")},
    **{path: {"query": "hi", "documents": ["you"]} for path in ("/rerank", "/v1/rerank", "/v2/rerank")},
}
POOLING = {endpoint.path for endpoint in ENDPOINTS if endpoint.pools}
GENERATING = {endpoint.path for endpoint in ENDPOINTS if endpoint.generates}
RENDER = {path: SUBJECTS[path.removesuffix("/render")] for path in BODIES if path.endswith("/render")}
RENDER["/v1/responses/input_tokens"] = SUBJECTS["/v1/responses"]
SUBJECTS |= RENDER
KINDS = list(BODIES.values())
EVERYTHING: dict[str, Any] = {
    "dev_mode": True,
    "enable_sleep_mode": True,
    "enable_tokenizer_info_endpoint": True,
    "profiler": ProfilerConfig(profiler="torch", torch_profiler_dir="traces"),
}


def document(*, pooling: bool = False, **args: Any) -> dict[str, Any]:
    return build_document(ENDPOINTS, ServerArgs(**args), pooling=pooling)


def client_of(path: str) -> FakeClient:
    """A client whose model fits the endpoint."""
    return FakeClient(pooling=Pooling(matryoshka=()) if path in POOLING else None)


def schema_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    """A schema of the document with its references resolvable."""
    return {"$ref": f"#/components/schemas/{name}", "components": found["components"]}


@pytest.mark.parametrize(
    ("args", "pooling"),
    [({**EVERYTHING, "root_path": "/llm", "api_keys": ("k",)}, False), ({}, True)],
    ids=["everything", "pooling"],
)
def test_it_is_valid(args: dict[str, Any], pooling: bool) -> None:
    openapi_spec_validator.validate(document(**args, pooling=pooling))


@pytest.mark.parametrize("pooling", [False, True])
@pytest.mark.parametrize("args", [{}, EVERYTHING, {"root_path": "/llm", "api_keys": ("k",)}])
def test_what_needs_a_key_is_marked(args: dict[str, Any], pooling: bool) -> None:
    found = document(**args, pooling=pooling)
    assert found["openapi"].startswith("3.1") and found["servers"] == [{"url": args.get("root_path", "/")}]
    guarded = {path for path, methods in found["paths"].items() for m in methods.values() if "security" in m}
    others = {"/v1/models", "/v1/models/{model}", "/v1/loads", "/server_info", "/kv_event_sources"}
    others |= {path for path in found["paths"] if path.startswith("/v1/responses/")}
    bodies = BODIES.keys() - (GENERATING if pooling else POOLING)
    assert guarded == ({*bodies, *others} if "api_keys" in args else set())


@pytest.mark.parametrize("pooling", [False, True])
def test_every_route_is_in_it(pooling: bool) -> None:
    client = FakeClient(pooling=Pooling() if pooling else None)
    app = create_app(client, ServerArgs(**EVERYTHING))  # type: ignore[arg-type]
    absent = {path for paths in NOT_IMPLEMENTED.values() for path in paths}
    hidden = {*FILES, "/docs", "/redoc", "/openapi.json", "/metrics/", "/get_server_info", *absent}
    hidden |= GENERATING if pooling else POOLING
    shown: list[Any] = [route for route in app.routes if route.path not in hidden]  # type: ignore[attr-defined]
    routes = {(r.path_format, method.lower()) for r in shown for method in r.methods - {"HEAD"}}
    paths = document(**EVERYTHING, pooling=pooling)["paths"]
    listed = {(path, method) for path, methods in paths.items() for method in methods}
    assert listed == routes and ("/v1/models/{model}", "get") in routes
    assert hidden <= {route.path for route in app.routes}  # type: ignore[attr-defined]
    for methods in paths.values():
        for operation in methods.values():
            assert operation["summary"][-1] in ".}`" and not operation["summary"].startswith("/"), operation


def test_it_has_the_servers_own_number_of_stop_strings() -> None:
    for name, limit in (("CompletionRequest", 4), ("ChatCompletionRequest", 9)):
        stop = document(max_stop_strings=limit)["components"]["schemas"][name]["properties"]["stop"]
        assert f"'maxItems': {limit}" in str(stop)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_in_it(kind: type[Body]) -> None:
    properties = request_schema(kind)["properties"]
    honoured = honoured_fields(kind)
    assert properties.keys() == {*honoured, *kind.ignored, *kind.refused}
    for name, harmless in kind.refused.items():
        assert properties[name]["enum"] == [None, *harmless]
    for name in honoured:
        assert "ignored" not in properties[name]["description"] and len(properties[name]["description"]) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_manual_names_what_is_ignored_and_refused(kind: type[Body]) -> None:
    manual = (Path(__file__).parent.parent.parent / "docs" / "http.md").read_text("utf-8")
    for name in (*kind.ignored, *kind.refused):
        assert f"`{name}`" in manual, name


def given(schema: dict[str, Any]) -> dict[str, Any]:
    """A property's schema without null."""
    if "anyOf" in schema:
        return next((part for part in schema["anyOf"] if part != {"type": "null"}), {})
    kind = schema["type"]
    return {**schema, "type": kind[0] if isinstance(kind, list) else kind}


def borders(kind: type[Body]) -> Iterator[tuple[str, Any, bool]]:
    """(field, value, whether the document allows it), at each limit that a schema states and beyond."""
    properties = request_schema(kind)["properties"]
    for name in honoured_fields(kind):
        if name in ("cache_salt", "request_id"):
            continue
        schema = given(properties[name])
        for key, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0)):
            if key in schema and abs(schema[key]) < 1 << 62:
                yield name, schema[key] + step, False
                yield name, schema[key] + (step == 0), True
        if "maxItems" in schema and schema["maxItems"] < 5000:
            yield name, [1] * (schema["maxItems"] + 1), False
        if schema.get("type") == "boolean":
            yield name, "perhaps", False
            yield name, True, True
        if schema.get("type") in ("integer", "number"):
            yield name, [1], False
        if schema.get("type") == "string" and "enum" in schema:
            yield name, "no such word", False
            for word in schema["enum"]:
                yield name, word, True


# Those to render have the types and the checks of the paths without the suffix.
@pytest.mark.parametrize("path", [path for path in BODIES if path not in RENDER])
async def test_the_server_keeps_to_it(path: str) -> None:
    """What the document forbids is a 400 that names the field; what it allows has the right shape."""
    wrong, tried = [], 0
    async with in_process(client_of(path), reasoning_parser="qwen3") as http:
        for name, value, allowed in borders(BODIES[path]):
            answer = await http.post(path, json={**SUBJECTS[path], name: value})
            named = answer.status_code == 400 and name in answer.text
            if (answer.status_code != 200) if allowed else not named:
                wrong.append((name, str(value)[:80], answer.status_code, answer.text[:300]))
            tried += 1
    assert not wrong and (tried or path == "/detokenize"), wrong  # which has a list of ids alone


@pytest.mark.parametrize("path", [path for path in BODIES if path not in RENDER])
async def test_refused_fields_take_exactly_what_it_says(path: str) -> None:
    schema = request_schema(BODIES[path])
    async with in_process(client_of(path)) as http:
        for name, harmless in BODIES[path].refused.items():
            for value in (None, *harmless, "something", 987, {"a": 1}):
                body = {**SUBJECTS[path], name: value}
                fits = jsonschema.Draft202012Validator(schema).is_valid(body)
                answer = await http.post(path, json=body)
                assert (answer.status_code == 200) == fits, (path, name, value)


@pytest.mark.parametrize("path", BODIES)
async def test_answers_are_as_it_says(path: str) -> None:
    found = document(pooling=path in POOLING)
    content = found["paths"][path]["post"]["responses"]
    answers, errors = (
        schema_of(found, content[status]["content"]["application/json"]["schema"]["$ref"].split("/")[-1])
        for status in ("200", "400")
    )
    async with in_process(client_of(path)) as http:
        answer = await http.post(path, json=SUBJECTS[path])
        wrong = await http.post(path, json={"model": 5})
    assert (answer.status_code, wrong.status_code) == (200, 400)
    jsonschema.validate(answer.json(), answers)
    jsonschema.validate(wrong.json(), errors)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong.json(), answers)


async def test_answers_without_a_body_are_as_it_says() -> None:
    async with in_process(FakeClient(), **EVERYTHING) as http:
        found = (await http.get("/openapi.json")).json()
        checked = 0
        for path, methods in found["paths"].items():
            for method, operation in methods.items():
                content = operation["responses"]["200"].get("content", {})
                if path not in BODIES and "application/json" in content:
                    names = {"model": "fake-model"}
                    if "{response_id}" in path:
                        stored = await http.post("/v1/responses", json={"input": "hi", "background": True})
                        names["response_id"] = stored.json()["id"]
                    answer = await http.request(method, path.format(**names))
                    name = content["application/json"]["schema"]["$ref"].split("/")[-1]
                    jsonschema.validate(answer.json(), schema_of(found, name))
                    checked += 1
    assert checked == 15


@pytest.mark.parametrize(
    "options", [{}, {"n": 2, "temperature": 1}, {"stream_options": {"include_usage": True}}]
)
@pytest.mark.parametrize("path", [one.path for one in ENDPOINTS if one.event and not one.named_events])
async def test_chunks_are_as_it_says(path: str, options: dict[str, Any]) -> None:
    if "generate" in path:
        options = {name: value for name, value in options.items() if name != "n"}
    found = document(enable_per_request_metrics=True)
    content = found["paths"][path]["post"]["responses"]["200"]["content"]
    name = content["text/event-stream"]["schema"]["$ref"].split("/")[-1]
    schema = jsonschema.Draft202012Validator(schema_of(found, name))
    async with in_process(FakeClient(), enable_per_request_metrics=True) as http:
        body = {**SUBJECTS[path], "stream": True, "return_token_ids": True, **options}
        chunks = events((await http.post(path, json=body)).text)
    for chunk in chunks:
        schema.validate(chunk)
    assert len(chunks) >= 4
    for broken in ({**chunks[0], "id": None}, {k: v for k, v in chunks[0].items() if k != "id"}, {}):
        assert not schema.is_valid(broken)


def test_schemas_have_the_names_that_vllm_gives_them() -> None:
    assert {
        *("CompletionRequest", "CompletionResponse", "CompletionStreamResponse", "UsageInfo"),
        *("ChatCompletionRequest", "ChatCompletionResponse", "ChatCompletionStreamResponse"),
        *("TokenizeCompletionRequest", "TokenizeChatRequest", "TokenizeResponse"),
        *("DetokenizeRequest", "DetokenizeResponse", "ErrorResponse", "ModelCard", "ModelList"),
        "GenerateRequest",
    } <= document()["components"]["schemas"].keys()


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        ({"prompt": "x"}, True),
        ({"messages": []}, True),
        ({}, False),
        ({"prompt": "x", "messages": []}, False),
    ],
)
def test_tokenize_takes_one_of_two_forms(body: dict[str, Any], fits: bool) -> None:
    schema = jsonschema.Draft202012Validator(schema_of(document(), "TokenizeRequest"))
    assert schema.is_valid(body) is fits


class TestPage:
    async def test_it_needs_nothing_from_elsewhere(self) -> None:
        async with in_process(FakeClient()) as http:
            page = await http.get("/docs")
            assert (await http.get("/redoc")).text == page.text
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert not re.findall(r"https?://|src=|@import|innerHTML|insertAdjacent", page.text)
        # Names in `backquotes` are code, and what has to be given comes first.
        assert "function rich(" in page.text and "required(name) || " in page.text
        # A relative address, so that it also works below a proxy's prefix.
        assert 'fetch("openapi.json")' in page.text

    async def test_the_servers_address_leads_there(self) -> None:
        async with in_process(FakeClient(), api_keys=("k",)) as http:
            home = await http.get("/")
        assert home.status_code == 200 and 'href="docs"' in home.text

    async def test_it_can_be_switched_off(self) -> None:
        async with in_process(FakeClient(), disable_fastapi_docs=True) as http:
            for path in ("/docs", "/redoc", "/openapi.json"):
                assert (await http.get(path)).status_code == 404


async def test_the_document_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 20 ms of the event loop, and no key is needed."""
    made = []

    def build(*args: Any, **options: Any) -> dict[str, Any]:
        made.append(1)
        return build_document(*args, **options)

    monkeypatch.setattr(docs, "build_document", build)
    async with in_process(FakeClient()) as http:
        first, second = [await http.get("/openapi.json") for _ in range(2)]
    assert first.content == second.content and len(made) == 1
