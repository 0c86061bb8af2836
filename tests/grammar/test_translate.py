"""Which forms are taken, and what is said of those that are not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from random_outputs import draw, grammar_of, small_vocabulary

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.grammar.forms import Kind
from microvllm.runtime.grammar.translate import Specials, check
from microvllm.runtime.grammar.vocabulary import make_tokenizer
from microvllm.runtime.request import StructuredOutput

SPECIALS = Specials(1000, {"<|end|>": 2, "<tool>": 5, "[CALL]": 6})


def form(kind: Kind, spec: Any, **options: Any) -> StructuredOutput:
    return StructuredOutput(kind=kind, spec=spec if isinstance(spec, str) else json.dumps(spec), **options)


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("kind", "spec", "problem"),
    [
        (
            "json",
            {"properties": {"a": {"uniqueItems": True}}},
            "uniqueItems is not supported (at #/properties/a/uniqueItems)",
        ),
        ("json", {"items": {"not": {}, "if": {}}}, "if, not are not supported (at #/items/not)"),
        (
            "json",
            {"anyOf": [{"type": "string", "pattern": "(a"}]},
            "unclosed group at character 1 (at #/anyOf/0/pattern)",
        ),
        (
            "json",
            {"patternProperties": {"(": {}}},
            "unclosed group at character 1 (at #/patternProperties/()",
        ),
        ("json", {"properties": {"a": {"type": "strin"}}}, "Invalid type: strin (at #/properties/a/type)"),
        ("json", {"items": {"$ref": "#/$defs/b"}}, "Pointer '/$defs/b' does not exist (at #/items/$ref)"),
        ("json", {"$ref": "http://example.com/x"}, "'http://example.com/x' is not present"),
        ("json", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ("json", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf constraints are not supported"),
        ("json", {"minProperties": 2}, "minProperties is only supported up to one more than is required"),
        (
            "json",
            {"type": "string", "minLength": 3, "maxLength": 2},
            "minLength (3) is greater than maxLength (2)",
        ),
        ("json", False, "Unsatisfiable"),
        ("json", {"propertyNames": {"maxLength": 3}}, "propertyNames is not supported (at #/propertyNames)"),
        ("json", {"propertyNames": {"enum": ["a"]}, "properties": {}}, "propertyNames is not supported"),
        ("json", {"x-guidance": {"lenient": True}, "not": {}}, "not is not supported (at #/not)"),
        ("json", "{", "not JSON"),
        ("json", "[1]", "schema must be an object or boolean"),
        ("json", nested(101), "more than 100 levels deep"),
        ("json", nested(5000), "nested too deeply"),
        ("regex", "a(b", "invalid pattern 'a(b': unclosed group at character 2"),
        ("regex", "", "the pattern is empty"),
        ("regex", r"(a)\1", "backreferences are not supported at character 4"),
        ("choice", [], "at least one string"),
        ("choice", ["a", 1], "at least one string"),
        ("choice", "a", "not JSON"),
        ("grammar", 'start: "a" b', 'unknown name: "b" (at line 1, character 8)'),
        ("grammar", "start: x\nx: /(/", "unclosed group at character 1 (at line 2, character 4)"),
        ("grammar", 'root ::= "a', "neither Lark's nor GBNF: Unexpected end of input at line 1"),
        ("grammar", "root ::= other", "no GBNF: Rule 'other' not found"),
        ("grammar", 'other ::= "a"', "no GBNF: No 'root' rule found"),
        ("grammar", "start: start", "no output ever ends"),
        ("json", {"$ref": "#"}, "no output ever ends"),
        ("grammar", "start: <nothing>", 'unknown special token: "<nothing>"'),
        ("grammar", " ", "the grammar is empty"),
        (
            "structural_tag",
            {
                "structures": [{"begin": "<f>", "schema": {"items": {"not": {}}}, "end": ""}],
                "triggers": ["<"],
            },
            "not is not supported (at #/items/not, behind '<f>')",
        ),
        ("structural_tag", {"structures": []}, "structures must be a list that is not empty"),
        ("structural_tag", [], "structural tags must be an object"),
        ("structural_tag", {"format": {"type": "x"}}, "format.type: 'x' is not supported"),
        ("structural_tag", {"format": {"type": "tag", "begin": 1}}, "format.begin must be a string"),
        (
            "structural_tag",
            {"structures": [{"begin": "<a>", "schema": {}, "end": ""}], "triggers": ["<b>"]},
            "tags[0].begin: '<a>' begins with none of the triggers",
        ),
        (
            "structural_tag",
            {"format": {"type": "any_text", "excludes": ["x"]}},
            "format.excludes is not supported",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused(kind: Kind, spec: Any, problem: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(form(kind, spec), SPECIALS)
    assert problem in str(caught.value)


TEXT_TAG = {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"}
NUMBER_TAG = {
    "type": "tag",
    "begin": "<n>",
    "content": {"type": "regex", "pattern": "[0-9]{2}"},
    "end": ["</n>", "!"],
}


@pytest.mark.parametrize(
    ("kind", "spec", "right", "wrong"),
    [
        ("regex", r"\d{2}/[a-c]+", ["12/a", "00/cab"], ["1/a", "12/", "١٢/a", "12/a "]),
        ("regex", "a\nb|", ["a\nb", ""], ["ab"]),
        ("choice", ["yes", 'a"b', "é\n", "<|end|>", ""], ["yes", 'a"b', "é\n", "<|end|>", ""], ["ye", "no"]),
        ("grammar", '?start: n ("+" n)*\nn: /[0-9]/\n%ignore " "', ["1", "1+2", "1 + 2"], ["+", "12"]),
        ("grammar", 'root ::= "a" | b\nb ::= [0-9]+', ["a", "10"], ["b", ""]),
        ("json_object", "", ["{}", '{"a": [1, {}]}'], ["[]", "1"]),
        (
            "json",
            {"type": "object", "properties": {"a": {}}},
            ['{"a":1}', '{"b": 2}', '{\n  "a": 1\n}'],
            ["{ \n}", "{\n\n}"],
        ),
        (
            "structural_tag",
            {"structures": [{"begin": "<f=g>", "schema": {"const": 1}, "end": "</f>"}], "triggers": ["<f="]},
            ["no call", "x <f=g>1</f> y <f=g>1</f>"],
            ["<f=h>1</f>", "<f=g>2</f>", "<f=g>1"],
        ),
        (
            "structural_tag",
            {
                "format": {
                    **TEXT_TAG,
                    "content": {"type": "any_text", "excludes": ["b/", '"'], "pattern": "[^x]*"},
                }
            },
            ["<t></t>", "<t>a b</t>", "<t>/b\n</t>"],
            ["<t>ab/</t>", '<t>"</t>', "<t>x</t>", "<t>b</t></t>"],
        ),
        (
            "structural_tag",
            {
                "format": {
                    "type": "triggered_tags",
                    "triggers": ["<"],
                    "tags": [TEXT_TAG, NUMBER_TAG],
                    "at_least_one": True,
                }
            },
            ["<t>a</t>", "<n>12!<t></t> and", "<t><n></t>"],
            ["a <t></t>", "<n>1!", "<t>", "<n>12</t>"],
        ),
        (
            "structural_tag",
            {
                "format": {
                    "type": "tags_with_separator",
                    "tags": [NUMBER_TAG],
                    "separator": ", ",
                    "at_least_one": True,
                }
            },
            ["<n>12!", "<n>12!, <n>13</n>"],
            ["", "<n>12!<n>13!"],
        ),
        (
            "structural_tag",
            {
                "format": {
                    "type": "tags_with_separator",
                    "tags": [NUMBER_TAG],
                    "separator": "",
                    "stop_after_first": True,
                }
            },
            ["", "<n>12!"],
            ["<n>12!<n>13!"],
        ),
        (
            "structural_tag",
            {
                "format": {
                    "type": "sequence",
                    "elements": [
                        {"type": "const_string", "value": "a"},
                        {"type": "or", "elements": [{"type": "const_string", "value": ""}, NUMBER_TAG]},
                        {"type": "json_schema", "json_schema": {"enum": [1, "x"]}},
                        {"type": "any_text"},
                    ],
                }
            },
            ["a1", 'a<n>12!"x" and more'],
            ["1", "a<n>12!", 'a"y"'],
        ),
    ],
    ids=str,
)
def test_what_a_form_allows(kind: Kind, spec: Any, right: list[str], wrong: list[str]) -> None:
    accepts = acceptor(form(kind, spec))
    assert [text for text in right if not accepts(text)] == []
    assert [text for text in wrong if accepts(text)] == []


def test_options_of_json() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object"}, "b": {"items": {"properties": {}}}}}
    assert acceptor(form("json", schema))('{"a":{"x": 1},"c":1}')
    closed = acceptor(form("json", schema, additional_properties=False, whitespace=""))
    assert closed('{"a":{}}') and closed('{"b":[{}]}')
    for text in ('{"a": {}}', '{"a":{"x":1}}', '{"c":1}', '{"b":[{"x":1}]}'):
        assert not closed(text)


def test_special_tokens_in_tags_are_tokens() -> None:
    tags = {
        "structures": [{"begin": "<tool>{", "schema": {"const": 1}, "end": "}[CALL]"}],
        "triggers": ["<tool>"],
    }
    grammar = check(form("structural_tag", tags), SPECIALS)
    assert "<[5]>" in grammar and '"}" <[6]>' in grammar and '"<tool>' not in grammar


def test_a_text_may_end_in_a_special_token() -> None:
    """Of a longer end that stands in the middle, too, as in DeepSeek's tags."""
    from llguidance import LLMatcher

    tag = {**TEXT_TAG, "end": "</[CALL]>"}
    grammar = check(form("structural_tag", {"format": tag}), SPECIALS)
    tokens = [b"", *(bytes([byte]) for byte in range(1, 256)), b"<end>"]
    tokenizer = make_tokenizer(tokens, [5, 6, 256], [256])
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert matcher.consume_tokens([*b"<t>a</b</", 6, *b">"]) and matcher.is_accepting()


def acceptor(wanted: StructuredOutput) -> Any:
    from llguidance import LLMatcher

    vocabulary, grammar = small_vocabulary(), grammar_of(wanted)

    def accepts(text: str) -> bool:
        matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0)
        return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()

    return accepts


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("regex", "(ab|c){2,5}"), ("choice", ["x", "yy"]), ("grammar", 'start: "(" start ")" | "x"')],
)
def test_random_outputs_of_other_kinds(kind: Kind, spec: Any) -> None:
    wanted = form(kind, spec)
    accepts, grammar, vocabulary = acceptor(wanted), grammar_of(wanted), small_vocabulary()
    for seed in range(5):
        output = draw(wanted, grammar, vocabulary, np.random.default_rng(seed))
        assert output is None or accepts(output.decode())
