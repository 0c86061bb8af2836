"""Requests made from the server's own OpenAPI document, and bytes that are no request: no 5xx, no death.

A few hundred examples by default; for a long run: `MICROVLLM_FUZZ_EXAMPLES=2000 pytest tests/test_fuzz.py`,
that many for each test and endpoint. After every example nothing may be left running; after every
`GOLDEN_EVERY` of them, and at the end, the same application must answer golden requests with the very same
bytes.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from fake_client import FakeClient
from http_tools import events
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.errors import is_anthropic

EXAMPLES = int(os.environ.get("MICROVLLM_FUZZ_EXAMPLES", "40"))
GOLDEN_EVERY = 50
LONG = settings(
    max_examples=EXAMPLES,
    derandomize="MICROVLLM_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
JSON_HEADERS = {"content-type": "application/json"}
# Without these a drawn body would hardly ever get past the first check.
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
    "/v1/completions/render": {"prompt": "hello", "max_tokens": 4},
    "/v1/chat/completions/render": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"input": "hello", "max_output_tokens": 4},
    "/v1/responses/input_tokens": {"input": "hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hello"}]},
    "/generate": {"prompt": "hello", "max_tokens": 4},
    "/generate_stream": {"prompt": "hello", "max_tokens": 4},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [104, 105]},
}
MESSAGE_PARTS = (
    "role",
    "content",
    "name",
    "type",
    "text",
    "tool_calls",
    "tool_call_id",
    "function",
    "arguments",
)
EVENTS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat.completion.chunk"}
GOLDEN = (
    ("/v1/completions", {"prompt": "golden", "max_tokens": 12, "seed": 7, "request_id": "golden"}),
    (
        "/v1/chat/completions",
        {**BASES["/v1/chat/completions"], "stream": True, "seed": 7, "request_id": "golden"},
    ),
    ("/tokenize", {"prompt": "golden", "return_token_strs": True}),
)


class Server:
    """The application over a fake engine, in this thread, with one event loop for all examples."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = FakeClient()
        self.app = create_app(self.client, ServerArgs(max_body_bytes=1 << 20))  # type: ignore[arg-type]
        # An exception that nobody handles is a traceback in the log of a real server: here it fails the test.
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        self.document = self.send("GET", "/openapi.json").json()
        self.golden = self._golden()
        self.examples = 0

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.loop.run_until_complete(self.http.request(method, path, **options))

    def schema(self, path: str) -> dict[str, Any]:
        """The schema of the body of a POST, from the document."""
        body = self.document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        found: dict[str, Any] = self.document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
        return found

    def try_out(self, path: str, content: bytes, headers: Mapping[str, str] = JSON_HEADERS) -> httpx.Response:
        """Sends one body and checks everything that must hold whatever it was."""
        response = self.send("POST", path, content=content, headers=dict(headers))
        check_answer(path, response)
        if background := list(self.app.state.server.background.values()):
            self.loop.run_until_complete(asyncio.wait(background))
        self.check_rest()
        self.examples += 1
        if self.examples % GOLDEN_EVERY == 0:
            self.check_golden()
        return response

    def check_rest(self) -> None:
        assert not self.client.running
        assert self.app.state.server.lifecycle.active == 0
        assert not asyncio.all_tasks(self.loop)

    def check_golden(self) -> None:
        assert self._golden() == self.golden

    def _golden(self) -> list[bytes]:
        """The golden answers, without the second in which they were given."""
        answers = []
        for path, body in GOLDEN:
            response = self.send("POST", path, json=body)
            assert response.status_code == 200, response.text
            lines = response.text.split("\n\n")
            answers.append("\n\n".join(map(without_date, lines)).encode())
        return answers

    def close(self) -> None:
        self.loop.run_until_complete(self.http.aclose())
        self.loop.close()


def without_date(line: str) -> str:
    head, mark, rest = line.partition('"created":')
    return head + mark + rest.lstrip("0123456789")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.check_golden()
    server.close()


def check_answer(path: str, response: httpx.Response) -> None:
    """A right answer or a refusal in the one form that refusals have."""
    assert response.status_code in (200, 400, 404, 413), (response.status_code, response.text[:500])
    if response.status_code != 200:
        if is_anthropic(path):
            assert response.json()["type"] == "error" and response.json()["error"]["message"]
        else:
            check_error(response.json(), response.status_code)
        assert len(response.content) < 10_000, "a refusal repeats the request"
    elif response.headers["content-type"].startswith("text/event-stream"):
        if path == "/v1/responses":
            check_response_events(response.text)
            return
        if path == "/v1/messages":
            check_message_events(response.text)
            return
        for event in events(response.text):
            if "error" in event:
                assert event["error"]["code"] < 500, event
                check_error(event, event["error"]["code"])
            else:
                assert event.get("object") == EVENTS.get(path)
                assert path in EVENTS or type(event["text"]) is str
    else:
        check_finite(response.json())


def check_response_events(text: str) -> None:
    """Numbered events with names, up to the one that ends a response."""
    frames = [frame.split("\n", 1) for frame in text.removesuffix("\n\n").split("\n\n")]
    for number, (name, data) in enumerate(frames):
        event = json.loads(data.removeprefix("data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", number)
    assert event["type"] in ("response.completed", "response.incomplete")
    assert event["response"]["error"] is None


def check_message_events(text: str) -> None:
    """Events with names, from the start of a message to its end."""
    names = []
    for frame in text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n", 1)
        names.append(json.loads(data.removeprefix("data: "))["type"])
        assert name == f"event: {names[-1]}"
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]


def check_error(body: Any, status: int) -> None:
    assert list(body) == ["error"]
    error = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"] and type(error["message"]) is str and type(error["type"]) is str
    assert error["param"] is None or (type(error["param"]) is str and error["param"])
    assert error["code"] == status


def check_finite(value: Any) -> None:
    if isinstance(value, float):
        assert math.isfinite(value)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_finite(item)


# ---- bodies from a schema ---------------------------------------------------------------------------

TEXTS = st.text(max_size=20) | st.sampled_from(
    ["", "\0", "a\0b", "\ufeff", "\ufffd", "</s>", "<s>", "a" * 300]
)
INTEGERS = st.integers(-2, 40) | st.sampled_from([255, 256, 257, 258, 2**31, 2**63 - 1, 2**63, -(2**63)])
NUMBERS = st.floats(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | INTEGERS
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(MESSAGE_PARTS) | TEXTS, inner, max_size=4)
    ),
    max_leaves=8,
)


def values_of(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema of the document takes. Raises `KeyError` for a keyword that it does not know."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of(*map(values_of, schema["anyOf"]))
    kinds = schema.get("type")
    if kinds is None:
        return ANYTHING
    if isinstance(kinds, list):
        return st.one_of(*(values_of({**schema, "type": kind}) for kind in kinds))
    makers = {
        "null": lambda: st.none(),
        "boolean": lambda: st.booleans(),
        "integer": lambda: within(INTEGERS, schema),
        "number": lambda: within(NUMBERS, schema),
        "string": lambda: text_of(schema),
        "array": lambda: st.lists(
            values_of(schema.get("items", {})),
            min_size=schema.get("minItems", 0),
            max_size=min(schema.get("maxItems", 5), 5),
        ),
        "object": lambda: object_of(schema),
    }
    return makers[kinds]()


def within(numbers: st.SearchStrategy[Any], schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    return numbers.filter(lambda value: low <= value <= high)


def text_of(schema: Mapping[str, Any]) -> st.SearchStrategy[str]:
    texts = TEXTS if "pattern" not in schema else st.from_regex(schema["pattern"].replace("$", r"\Z"))
    low, high = schema.get("minLength", 0), schema.get("maxLength", 1000)
    return texts.filter(lambda text: low <= len(text) <= high)


def object_of(schema: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    further = schema.get("additionalProperties", True)
    known = {name: values_of(rows) for name, rows in schema.get("properties", {}).items()}
    if known:
        required = {name: known.pop(name) for name in schema.get("required", ())}
        return st.fixed_dictionaries(required, optional=known)
    names = schema.get("propertyNames", {}).get("enum")
    keys = st.sampled_from(names) if names else st.sampled_from(["0", "97", "257", "258"]) | TEXTS
    return st.dictionaries(keys, values_of(further) if isinstance(further, dict) else ANYTHING, max_size=3)


def bodies(path: str, schema: Mapping[str, Any], values: str) -> st.SearchStrategy[dict[str, Any]]:
    """A working body with a few fields replaced: by values that their schemas take, or by anything at all."""
    properties = schema["properties"]
    names = st.lists(st.sampled_from(sorted(properties)), min_size=1, max_size=4, unique=True)

    def fill(chosen: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        drawn = {
            name: values_of(properties[name])
            if values == "fitting"
            else ANYTHING | values_of(properties[name])
            for name in chosen
        }
        return st.fixed_dictionaries(drawn).map(lambda changes: {**BASES[path], **changes})

    return names.flatmap(fill)


# ---- the tests --------------------------------------------------------------------------------------


def test_the_document_has_every_endpoint_that_takes_a_body(server: Server) -> None:
    with_body = {
        path for path, item in server.document["paths"].items() if "requestBody" in item.get("post", {})
    }
    assert with_body == set(BASES)


@pytest.mark.parametrize("path", BASES)
def test_bodies_that_fit_the_schema(server: Server, path: str) -> None:
    """Positive: what the document allows is never refused as malformed, whatever the values mean together."""
    seen = set()

    @LONG
    @given(bodies(path, server.schema(path), "fitting"))
    def fits(body: dict[str, Any]) -> None:
        response = server.try_out(path, json.dumps(body).encode())
        seen.add(response.status_code)
        if response.status_code == 400 and response.json()["error"]["type"] == "Bad Request":
            # Left to the endpoint, where the document is wider than what it takes.
            assert response.json()["error"]["param"].split(".")[1] in LOOSE, (body, response.text)

    fits()
    assert 200 in seen
    # Those that count tokens only look at what becomes the prompt.
    assert 400 in seen or path in ("/v1/responses/input_tokens", "/v1/messages/count_tokens")


# Where the document only sketches what the endpoint takes.
LOOSE = {"prompt", "messages", "tokens"}


@pytest.mark.parametrize("path", BASES)
def test_bodies_with_anything_in_them(server: Server, path: str) -> None:
    """Negative: any JSON in any field."""
    seen = set()

    @LONG
    @given(bodies(path, server.schema(path), "any"))
    def anything(body: dict[str, Any]) -> None:
        seen.add(server.try_out(path, json.dumps(body).encode()).status_code)

    anything()
    assert 400 in seen


@pytest.mark.parametrize("path", BASES)
def test_bytes_for_a_body(server: Server, path: str) -> None:
    """Bytes that are no JSON, and JSON with a few bytes changed."""
    whole = json.dumps(
        {**BASES[path], "seed": 3, "stop": ["a\0", "\u00e9"], "logit_bias": {"97": 1.5}}
    ).encode()
    places = st.integers(0, len(whole))
    edits = st.lists(st.tuples(places, st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4)

    def edit(changes: list[tuple[int, int, bytes]]) -> bytes:
        data = whole
        for place, removed, added in changes:
            data = data[:place] + added + data[place + removed :]
        return data

    @LONG
    @given(st.binary(max_size=200) | edits.map(edit), st.sampled_from([*HEADERS]))
    def raw(content: bytes, media_type: str) -> None:
        server.try_out(path, content, {"content-type": media_type})

    raw()


HEADERS = ["application/json"] * 6 + ["application/json; charset=utf-16", "text/plain", ""]
