"""Reading the form of an output: what reaches the engine, and which field an error names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_client import FakeClient
from http_tools import in_process

from microvllm.runtime.request import StructuredOutput

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
TAGS = {"structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}], "triggers": ["<f>"]}


async def ask(path: str, **body: Any) -> tuple[int, Any, list[Any]]:
    client = FakeClient()
    subject = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    async with in_process(client) as http:
        answer = await http.post(path, json={**subject, "max_tokens": 3, **body})
    return answer.status_code, answer.json(), client.submitted


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"kind": "json_object", "field": "response_format"}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            {"kind": "json", "spec": TEXT, "field": "response_format"},
        ),
        (
            {"response_format": {"type": "structural_tag", **TAGS}},
            {
                "kind": "structural_tag",
                "spec": json.dumps(TAGS, separators=(",", ":")),
                "field": "response_format",
            },
        ),
        ({"structured_outputs": {"json": SCHEMA}}, {"kind": "json", "spec": TEXT}),
        (
            {
                "structured_outputs": {
                    "json": TEXT,
                    "whitespace_pattern": " ",
                    "disable_additional_properties": True,
                }
            },
            {"kind": "json", "spec": TEXT, "whitespace": " ", "additional_properties": False},
        ),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            {"kind": "json_object", "whitespace": ""},
        ),
        ({"structured_outputs": {"regex": "a+", "json_object": False}}, {"kind": "regex", "spec": "a+"}),
        ({"structured_outputs": {"choice": ["a", "é"]}}, {"kind": "choice", "spec": '["a","é"]'}),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, {"kind": "grammar", "spec": 'root ::= "a"'}),
        ({"guided_json": TEXT}, {"kind": "json", "spec": TEXT, "field": "guided_json"}),
        (
            {"guided_json": TEXT, "guided_whitespace_pattern": " "},
            {"kind": "json", "spec": TEXT, "field": "guided_json", "whitespace": " "},
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_whitespace_pattern": ""},
            {"kind": "json_object", "field": "response_format", "whitespace": ""},
        ),
        (
            {"guided_choice": ["a"], "guided_regex": ""},
            {"kind": "choice", "spec": '["a"]', "field": "guided_choice"},
        ),
    ],
    ids=str,
)
async def test_the_form_reaches_the_engine(
    path: str, body: dict[str, Any], form: dict[str, Any] | None
) -> None:
    status, answer, submitted = await ask(path, **body)
    assert status == 200, answer
    expected = None if form is None else StructuredOutput(**form)
    assert [params.structured_outputs for _, params, *_ in submitted] == [expected]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
@pytest.mark.parametrize(
    ("body", "param", "problem"),
    [
        ({"response_format": {"type": "x"}}, "body.response_format", "type"),
        ({"response_format": "json_object"}, "body.response_format", "valid dictionary"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema must be given"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "json_schema.schema must be given",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"items": {"not": {}}}}}},
            "response_format",
            "response_format: not is not supported (at #/items/not)",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format",
            "a schema",
        ),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "structures must be a list"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
            "not regex and choice",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "at character 1"),
        ({"structured_outputs": {"choice": "a"}}, "body.structured_outputs", "valid list"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs",
            "whitespace",
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_additional_properties": True}},
            "structured_outputs",
            "disable_additional_properties is for JSON, not for regex",
        ),
        (
            {
                "structured_outputs": {
                    "json": TEXT,
                    "disable_any_whitespace": True,
                    "whitespace_pattern": " ",
                }
            },
            "structured_outputs",
            "leaves nothing that whitespace_pattern could allow",
        ),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "response_format",
            "json_schema needs the type json_schema, not json_object",
        ),
        ({"guided_json": 5}, "guided_json", "json must be a schema"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar", "GBNF"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "needs guided_json"),
        (
            {"guided_whitespace_pattern": " ", "structured_outputs": {"json": "{}"}},
            "guided_whitespace_pattern",
            "needs guided_json",
        ),
        ({"guided_whitespace_pattern": " ", "guided_regex": "a"}, "guided_regex", "whitespace"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "Only one form"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "Only one form"),
    ],
    ids=str,
)
async def test_a_wrong_form_is_named(path: str, body: dict[str, Any], param: str, problem: str) -> None:
    status, answer, submitted = await ask(path, **body)
    error = answer["error"]
    assert (status, error["param"], submitted) == (400, param, [])
    assert problem in error["message"]


async def test_no_beams_are_searched_for_a_form() -> None:
    body = {"use_beam_search": True, "n": 2, "response_format": {"type": "json_object"}}
    status, answer, submitted = await ask(COMPLETIONS, **body)
    assert (status, answer["error"]["param"], submitted) == (400, "response_format", [])
