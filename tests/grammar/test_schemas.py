"""Outputs drawn from random logits parse and follow their schema; scripts/check_schemas.py tries 800 more."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from model_tools import load_script
from random_outputs import Vocabulary, draw, faults, grammar_of, small_vocabulary

from microvllm.runtime.request import StructuredOutput

ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 999},
        "price": {"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.01},
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "when": {"type": "string", "format": "date-time"},
        "zip": {"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None, {"x": [1]}]}, "maxItems": 3},
        "size": {"type": ["string", "null"], "maxLength": 2},
        "at": {"$ref": "#/$defs/place"},
    },
    "required": ["id", "name", "tags", "at"],
    "additionalProperties": False,
    "$defs": {
        "place": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "items": False}
    },
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"const": 'é"\\\n'},
                "next": {"items": {"$ref": "#/$defs/node"}, "type": "array"},
            },
            "required": ["value"],
        }
    },
}
SCHEMAS: list[Any] = [
    True,
    {},
    ORDER,
    TREE,
    {"enum": ["", 'a"b', -1.5e300, [], {}, True]},
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}, {"type": "null"}]},
    {"anyOf": [{"required": ["a"], "type": "object", "properties": {"a": {"type": "null"}}}, {"const": 0}]},
    {"allOf": [{"type": "object", "required": ["a"]}, {"properties": {"a": {"type": "boolean"}}}]},
    {
        "type": "object",
        "patternProperties": {"^a": {"type": "integer"}},
        "additionalProperties": {"type": "null"},
    },
    {"type": "object", "minProperties": 1, "maxProperties": 3, "additionalProperties": {"type": "integer"}},
    {"type": "array", "items": {"type": "integer", "multipleOf": 7}, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^ab+c"},
    *(
        {"type": "string", "format": name}
        for name in ("date", "time", "duration", "email", "ipv4", "ipv6", "uuid")
    ),
    {"type": "string", "format": "path"},
    {
        "type": "object",
        "propertyNames": {"$ref": "#/$defs/colour"},
        "additionalProperties": {"type": "integer"},
        "minProperties": 1,
        "$defs": {"colour": {"enum": ["red", "blue"], "type": "string", "title": "Colour"}},
    },
    {"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "maxProperties": 2},
    {
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": {"enum": [1]},
        "maxProperties": 2,
    },
    {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "integer"}], "type": "array"},
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return small_vocabulary()


@pytest.mark.parametrize("whitespace", [None, "", " "])
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_outputs_follow_their_schema(vocabulary: Vocabulary, schema: Any, whitespace: str | None) -> None:
    form = StructuredOutput(kind="json", spec=json.dumps(schema), whitespace=whitespace)
    grammar = grammar_of(form)
    outputs = [draw(form, grammar, vocabulary, np.random.default_rng(seed)) for seed in range(4)]
    ended = [output for output in outputs if output is not None]
    assert ended
    for output in ended:
        assert not faults(schema, output), output
        if whitespace == "":
            assert not load_script("check_schemas").json_whitespace(output), output


def test_whitespace_is_bounded(vocabulary: Vocabulary) -> None:
    """Between two tokens of JSON: a model that repeats itself would fill its context otherwise."""
    form = StructuredOutput(kind="json", spec='{"type": "array", "items": {"const": 1}}')
    grammar = grammar_of(form)
    for seed in range(20):
        output = draw(form, grammar, vocabulary, np.random.default_rng(seed))
        for run in re.findall(rb"\s+", output or b""):
            assert re.fullmatch(rb" |\n[ \t]{0,40}", run), output
