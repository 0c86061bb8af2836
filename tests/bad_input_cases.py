"""The inputs of `test_bad_inputs.py`: what is sent, and what has to come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

KEY = "the key of this server"
VOCAB, CONTEXT = 320, 512
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
USER = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class Case:
    """A body, the statuses that are right, and the `param` that a 400 must name (None: any)."""

    row: str
    path: str
    body: Any
    status: tuple[int, ...] = (400,)
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


def completion(row: str, param: str | None = None, status: int = 400, **fields: Any) -> Case:
    return Case(row, COMPLETIONS, {"prompt": "hello", "max_tokens": 3, **fields}, (status,), param)


def chat(row: str, param: str | None = None, status: int = 400, **fields: Any) -> Case:
    return Case(row, CHAT, {"messages": USER, "max_tokens": 3, **fields}, (status,), param)


def both(row: str, param: str | None = None, status: int = 400, **fields: Any) -> list[Case]:
    return [completion(row, param, status, **fields), chat(row, param, status, **fields)]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def nested_schema(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def json_schema(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def deep(name: str) -> bytes:
    return b'{"prompt": "a", "' + name.encode() + b'": ' + b"[" * 1000 + b"]" * 1000 + b"}"


WRONG_KEYS = ("", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY} {KEY}")

CASES = [
    *(Case("A21", path, {}, (404,)) for path in ("/v1/nonexistent", "//v1/completions", "/v1/../admin")),
    # B: bodies
    *(Case("B01", path, b"") for path in (COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE)),
    *(
        Case("B05", COMPLETIONS, b'{"prompt": "a", "temperature": %s}' % number)
        for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999")
    ),
    *(
        Case("B09", path, deep(n))
        for path, n in ((COMPLETIONS, "prompt"), (CHAT, "messages"), (COMPLETIONS, "x"))
    ),
    Case("B09", CHAT, {"messages": [{"role": "user", "content": nested(90)}]}),
    Case("B12", COMPLETIONS, b'{"prompt": "\\ud800"}'),
    Case("B12", CHAT, b'{"messages": [{"role": "user", "content": "\\udfff"}]}'),
    Case("B13", COMPLETIONS, b'\xef\xbb\xbf{"prompt": "a"}'),
    Case("B13", COMPLETIONS, '{"prompt": "a"}'.encode("utf-16")),
    completion("B14", status=200, prompt="a\0b"),
    chat("B14", status=200, messages=[{"role": "user", "content": "a\0b"}]),
    # C: prompts
    completion("C01", "prompt", prompt=""),
    completion("C01", "prompt", prompt=[""]),
    completion("C04", "body.prompt", prompt=[5, -1]),
    *(completion("C05", "prompt", prompt=[token]) for token in (VOCAB, 2**31, 2**63, 5279552648203111001)),
    completion("C11", "input_tokens", prompt=[5] * (CONTEXT + 1)),
    completion("C11", "max_tokens", prompt=[5] * CONTEXT),
    completion("C12", "input_text", prompt="a" * 10_000_000),
    completion("C16", "suffix", suffix="abc"),
    completion("C16", "best_of", best_of=3),
    completion("C16", "stream", use_beam_search=True, n=2, stream=True),
    completion("C16", "n", use_beam_search=True, n=100),
    completion("C16", "length_penalty", length_penalty=2),
    *both("C17", "model", 404, model="unknown"),
    *both("C17", "model", 404, model="a" * 10_000),
    *both("C17", "model", 404, model="../../etc/passwd"),
    *both("C17", "body.model", model=1),
    *both("C17", status=200, model=""),
    # D: sampling parameters
    *both("D01", "temperature", temperature=-0.1),
    *(case for hot in (1e30, 1e308) for case in both("D03", "temperature", temperature=hot)),
    *both("D06", status=200, top_p=1e-12, temperature=1.0),
    *both("D09", "min_p", min_p=-0.1),
    *both("D09", "min_p", min_p=1.1),
    *both("D13", status=200, seed=-1),
    *(case for seed in (2**63, 1.5, "x") for case in both("D13", "body.seed", seed=seed)),
    *both("D21", "body.stop_token_ids", stop_token_ids=[-1]),
    *both("D21", "stop_token_ids", stop_token_ids=[VOCAB]),
    *(case for bad in (2**63, "x") for case in both("D21", "body.stop_token_ids", stop_token_ids=[bad])),
    *both("D23", "allowed_token_ids", allowed_token_ids=[5, VOCAB]),
    *both("D23", "logit_bias", logit_bias={str(VOCAB): 1.0}),
    *both("D24", "body.bad_words", bad_words=["a"] * 50_000),
    *both("D24", "body.bad_words", bad_words=["a"] * 129),
    chat("D31", "top_logprobs", top_logprobs=2),
    chat("D31", "top_logprobs", logprobs=True, top_logprobs=21),
    *(
        case
        for salt in ("", "a" * 10_000, "a\0", 1)
        for case in both("D35", "body.cache_salt", cache_salt=salt)
    ),
    *(case for wish in ("x", 2**63, 1.5, []) for case in both("D35", "body.priority", priority=wish)),
    # E: stop strings
    *both("E01", "body.stop", stop=["x"] * 17),
    *both("E01", "body.stop", stop=["x"] * 300_000),
    *both("E06", "body.stop", stop=["a" * n for n in range(1, 101)]),
    *both("E06", status=200, stop=["aaaaaaab" * 100 + c for c in "wxyz"], max_tokens=100, ignore_eos=True),
    # F: chat
    *(chat("F01", "body.messages", messages=value) for value in ({}, "x", None)),
    chat("F01", "messages", messages=[]),
    Case("F01", CHAT, {}, param="body.messages"),
    *(
        chat("F03", "messages", messages=[{"role": "user", **content}])
        for content in ({"content": None}, {"content": 1}, {"content": {}}, {"content": []}, {})
    ),
    chat("F07", messages=USER * 100_000),
    chat("F11", "chat_template", chat_template="{% for a in range(99999) %}{% endfor %}" * 2),
    chat("F12", "chat_template", chat_template="{{ 'a' * 10**9 }}"),
    chat("F14", "continue_final_message", add_generation_prompt=True, continue_final_message=True),
    *both("F16", "stream_options", stream_options={"include_usage": True}),
    *both("F16", "body.stream_options", stream=True, stream_options={"include_usage": "x"}),
    chat("F17", status=200, max_tokens=2, max_completion_tokens=5),
    *(
        chat("F18", "messages", messages=[*USER, {"role": "assistant", "content": "a", **extra}])
        for extra in ({"name": 1}, {"tool_calls": 1}, {"tool_calls": [1]}, {"tool_calls": [{"id": 1}]})
    ),
    chat("F18", "messages", messages=[*USER, {"role": "tool", "content": "a", "tool_call_id": 1}]),
    # G: tools
    *(
        chat("G01", "tools", tools=[tool(parameters)])
        for parameters in (
            {"type": "strnig"},
            {"type": ["object", 1]},
            {"properties": {"a": {"pattern": "("}}},
            {"properties": {"a": {"pattern": 1}}},
            {"properties": {"a": 1}},
        )
    ),
    chat("G01", "body.tools", tools=[tool([])]),
    chat("G01", "body.tools", tools=[{**tool({}), "type": "x"}]),
    chat("G01", "body.tools", tools=[]),
    chat("G01", "tools", tools=[tool({}), tool({})]),
    *(
        chat("G03", "body.tool_choice", tools=[tool({})], tool_choice=choice)
        for choice in ("maybe", 1, [], {"type": "x"}, {"function": {"name": 1}})
    ),
    chat("G03", "tool_choice", tools=[tool({})], tool_choice={"function": {"name": "g"}}),
    chat("G03", "tool_choice", tool_choice="auto"),
    *(
        case
        for schema in (
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
            {"$ref": "http://127.0.0.1/schema.json"},
            {"type": "strnig"},
        )
        for case in [
            *both("G07", "response_format", response_format=json_schema(schema)),
            chat("G07", tools=[tool({"properties": {"a": schema}})], tool_choice="required"),
        ]
    ),
    *both("G07", "body", response_format=json_schema(nested_schema(300))),
    chat("G07", "body", tools=[tool(nested_schema(300))], tool_choice="required"),
    *both("G10", "structured_outputs", structured_outputs={"choice": ["a"]}, allowed_token_ids=[5]),
    # H: the other endpoints
    Case("H01", TOKENIZE, {"prompt": "a" * 10_000_000}, (400, 413)),
    *(
        Case("H02", TOKENIZE, body, param="body.prompt")
        for body in ({"prompt": None}, {"prompt": 1}, {"prompt": []}, {})
    ),
    Case("H03", TOKENIZE, {"prompt": "a", "messages": USER}, param="body.prompt"),
    *(
        Case(
            "H03",
            TOKENIZE,
            {"messages": USER, "chat_template_kwargs": {name: True}},
            param="body.chat_template_kwargs",
        )
        for name in ("tokenize", "chat_template", "messages", "add_generation_prompt")
    ),
    Case("H05", DETOKENIZE, {"tokens": [5] * 500_000}, (400,)),
    Case("H05", DETOKENIZE, {"tokens": [5] * 100_000}, (400,), "tokens"),
    # I: keys
    *(
        Case("I01", path, {}, (401,), headers={"authorization": value})
        for path in (COMPLETIONS, TOKENIZE, "/v1/models")
        for value in WRONG_KEYS
    ),
    Case(
        "I01", f"{COMPLETIONS}?api_key={KEY}&key={KEY}", {}, (401,), headers={"authorization": "Bearer wrong"}
    ),
    Case("I02", COMPLETIONS, {}, (401,), headers={"authorization": f"Bearer {KEY[:-1]}?"}),
]


# ---- bytes on a socket ------------------------------------------------------------------------------

POST = b"POST /v1/completions HTTP/1.1\r\n"
HEAD = b"Host: a\r\nAuthorization: Bearer " + KEY.encode() + b"\r\nConnection: close\r\n"
RAW: list[tuple[str, Callable[[], bytes], set[int]]] = [
    ("A01", lambda: b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 50_000_000 + b"\r\n\r\n", {431}),
    ("A03", lambda: b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", {400, 414, 431}),
    *(
        (
            "A04",
            lambda host=host: b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n",
            {400, 401},
        )
        for host in (b"a/?x=", b"a/#", b"a/health?", b"a@b/health#")
    ),
    ("A05", lambda: b"GET /health HTTP/1.1\r\n\r\n", {400}),
    ("A06", lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200, {400}),
    (
        "A08",
        lambda: POST + HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        {400},
    ),
    ("A11", lambda: POST + HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", {400}),
    (
        "A16",
        lambda: POST + HEAD + b"Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n",
        {413},
    ),
    (
        "A24",
        lambda: (
            POST
            + HEAD
            + b"Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n"
        ),
        {413, 417},
    ),
    *(
        ("A25", lambda path=path: b"GET " + path + b" HTTP/1.1\r\n" + HEAD + b"\r\n", {400, 404})
        for path in (b"/%00", b"/a%0d%0aINFO:%20forged", b"/%zz", b"/%ff%fe")
    ),
    *(
        (row, lambda key=key: b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + key, {401})
        for row, key in (
            ("I01", b"\r\n"),
            ("I01", b"Authorization: Bearer \r\n\r\n"),
            ("I01", b"Authorization: Bearer %b\r\n" % KEY.encode() * 2 + b"\r\n"),
            ("I03", b"Authorization: Bearer caf\xe9\r\n\r\n"),
            ("I03", b"Authorization: Bearer \xff\xfe\r\n\r\n"),
        )
    ),
    (
        "I03",
        lambda: b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + b"k" * 1_000_000 + b"\r\n\r\n",
        {431},
    ),
]
