"""Grammars of calls that must be made, or by their schema: what they allow is read as such calls."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from parser_tools import FUNCTIONS

from microvllm.openai_compat.parsers.events import Function, fold
from microvllm.openai_compat.parsers.formats import REASONING_FORMATS, TOOL_FORMATS
from microvllm.openai_compat.parsers.grammars import tool_grammar
from microvllm.openai_compat.parsers.harmony import ANSWER
from microvllm.openai_compat.parsers.registry import make_parser
from microvllm.openai_compat.parsers.xml_calls import XmlCalls
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.grammar.translate import Specials, parser_limits, translate
from microvllm.runtime.grammar.vocabulary import make_tokenizer
from microvllm.runtime.request import StructuredOutput

# Names of one and the same form are walked once.
FORMS = pytest.mark.parametrize("name", {id(form): name for name, form in TOOL_FORMATS.items()}.values())
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
        "note": {"type": "string"},
    },
    "required": ["city", "tags"],
    "additionalProperties": False,
    "$defs": {
        "tag": {"type": "object", "properties": {"x": {"type": "null"}}, "additionalProperties": False}
    },
}
OPTIONAL = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"type": "number", "enum": [1, 2.5]}},
    "additionalProperties": False,
}
STRICT = (
    Function("get_weather", WEATHER, strict=True),
    Function("f.g-h", OPTIONAL, strict=True),
    Function("get_time", {}, strict=True),
)
END = 256  # the id of the end; those below are bytes, those above special tokens


def walk(form: StructuredOutput, tokens: Sequence[str], seed: int, begin: str = "", ends: str = "") -> str:
    """Write at random what a grammar allows, up to its end; behind `begin` up to where it may first end.

    `tokens` are tokens of their own; `ends` is written at times where it may be, or free text would not end.
    """
    specials = Specials(END + 1 + len(tokens), {token: END + 1 + index for index, token in enumerate(tokens)})
    texts = [*(bytes([index]) for index in range(END)), b"<end>", *map(str.encode, tokens)]
    tokenizer = make_tokenizer(texts, range(END, len(texts)), [END])
    matcher = LLMatcher(tokenizer, translate(form, specials), limits=parser_limits(), log_level=0)
    draw, written, ending = random.Random(seed), begin.encode(), list(ends.encode())
    assert matcher.consume_tokens(list(written)), begin
    for _ in range(3000):
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        assert not matcher.is_error(), matcher.get_error()
        allowed = [int(token) for token in np.flatnonzero(mask[: len(texts)])]
        if END in allowed and (begin or len(allowed) == 1 or draw.random() < 0.5):
            return written.decode()
        if ending and draw.random() < 0.1 and matcher.validate_tokens(ending) == len(ending):
            matcher.consume_tokens(ending)
            written += bytes(ending)
            continue
        plain = [token for token in allowed if 32 < token < 127] or [t for t in allowed if t != END]
        closing = [token for token in plain if token > END or chr(token) in "\"'}])<\n0"]
        token = draw.choice(closing if closing and draw.random() < 0.5 else plain)
        written += texts[token]
        matcher.consume_token(token)
    pytest.fail(f"a walk without an end: {written!r}")


def special_tokens(name: str) -> list[str]:
    """The tags of a format that are tokens of their own in its models."""
    return [text for text in TOOL_FORMATS[name].tokens if text.startswith(("<|", "<｜", "[TOOL"))]


def valid(name: str, arguments: dict[str, Any]) -> bool:
    if name == "get_weather":
        return (
            {"city", "tags"} <= arguments.keys() <= WEATHER["properties"].keys()
            and arguments["city"] in ("Oslo", "Rome")
            and isinstance(arguments["tags"], list)
            and isinstance(arguments.get("days", 0), int)
            and isinstance(arguments.get("note", ""), str)
        )
    properties = OPTIONAL["properties"] if name == "f.g-h" else {}
    return arguments.keys() <= properties.keys() and isinstance(arguments.get("a", True), bool)


@FORMS
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_what_a_grammar_allows_is_read_as_calls(name: str, choice: Literal["required", "auto"]) -> None:
    form = TOOL_FORMATS[name]
    for seed in range(2):
        parallel = seed % 2 == 0
        made = tool_grammar(form, STRICT, choice, parallel=parallel)
        assert made is not None
        begin = "" if choice == "required" else f"Well.\n{form.trigger('get_time')}"
        tokens = special_tokens(name) if choice == "required" else []
        # Behind the text of an argument.
        ends = (
            f"{chr(10) * form.own_lines}{form.argument[1]}{form.line}" if isinstance(form, XmlCalls) else ""
        )
        text = walk(made, tokens, seed, begin, ends)
        parser = make_parser(name, None, tools=STRICT)
        message = fold(parser.feed(text) + parser.end())
        assert message.tool_calls, text
        assert message.content == (None if choice == "required" else "Well."), text
        assert parallel or len(message.tool_calls) == 1
        for call in message.tool_calls:
            assert valid(call.name, json.loads(call.arguments)), text


@FORMS
def test_however_a_strict_call_begins(name: str) -> None:
    """A text that the parser takes for the beginning of a call goes on by the schema."""
    form = TOOL_FORMATS[name]
    made = tool_grammar(form, STRICT, "auto", parallel=False)
    assert made is not None
    for trigger in json.loads(made.spec)["format"]["triggers"]:
        if trigger == ANSWER:
            continue
        ends = (
            f"{chr(10) * form.own_lines}{form.argument[1]}{form.line}" if isinstance(form, XmlCalls) else ""
        )
        text = walk(made, [], 1, trigger, ends)
        parser = make_parser(name, None, tools=STRICT)
        message = fold(parser.feed(text) + parser.end())
        assert len(message.tool_calls) == 1 and message.content is None, text
        assert valid(message.tool_calls[0].name, json.loads(message.tool_calls[0].arguments)), text


def test_an_answer_of_channels_where_strict_functions_may_be_called() -> None:
    """Its tags are special tokens, which free text has none of."""
    made = tool_grammar(TOOL_FORMATS["openai"], STRICT, "auto")
    assert made is not None
    tokens = special_tokens("openai")
    begin = [
        END + 1 + tokens.index("<|channel|>"),
        *b"final",
        END + 1 + tokens.index("<|message|>"),
        *b"Yes.",
    ]
    specials = Specials(END + 1 + len(tokens), {token: END + 1 + index for index, token in enumerate(tokens)})
    texts = [*(bytes([index]) for index in range(END)), b"<end>", *map(str.encode, tokens)]
    tokenizer = make_tokenizer(texts, range(END, len(texts)), [END])
    matcher = LLMatcher(tokenizer, translate(made, specials), limits=parser_limits(), log_level=0)
    assert matcher.consume_tokens(begin) and matcher.is_accepting()


@FORMS
def test_calls_of_functions_that_are_not_strict_are_free(name: str) -> None:
    free = Function("free", {"type": "object", "properties": {"unchecked": {"type": "integer"}}})
    form = TOOL_FORMATS[name]
    assert tool_grammar(form, [*FUNCTIONS, free], "auto") is None
    made, forced = (tool_grammar(form, [STRICT[0], free], choice) for choice in ("auto", "required"))
    assert made is not None and "free" in made.spec and "unchecked" not in made.spec
    assert forced is not None and "unchecked" in forced.spec


def test_a_forced_call_behind_reasoning() -> None:
    """What a grammar comes after is a text between the reasoning and the call."""
    thinking = REASONING_FORMATS["openai_gptoss"]
    made = tool_grammar(TOOL_FORMATS["openai"], STRICT[2:], "required")
    assert made is not None
    call = walk(made, special_tokens("openai"), 0)
    parser = make_parser("openai", "openai_gptoss", tools=STRICT)
    message = fold(parser.feed(f"{thinking.start}Hm.{thinking.call}{call}"))
    assert message.reasoning == "Hm." and message.tool_calls[0].arguments == "{}"


def test_a_strict_text_that_cannot_be_enforced_is_refused() -> None:
    """Between tags a text is free; in JSON any schema is enforced."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a$"}}}
    with pytest.raises(InvalidRequestError, match="`pattern` of the argument 'a' of the strict function 'f'"):
        tool_grammar(TOOL_FORMATS["qwen3_coder"], [Function("f", schema, strict=True)], "auto")
    assert tool_grammar(TOOL_FORMATS["qwen3_coder"], [Function("f", schema)], "required")
    assert tool_grammar(TOOL_FORMATS["hermes"], [Function("f", schema, strict=True)], "auto")


NODE = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "kind": {"$ref": "#/$defs/Kind"},
                "of": {"type": "array", "items": {"$ref": "#/$defs/Node"}, "maxItems": 1},
            },
            "required": ["kind", "of"],
            "additionalProperties": False,
        },
        "Kind": {"type": "string", "enum": ["leaf", "tree"]},
    },
}
EITHER = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
    "anyOf": [
        {"properties": {"a": {"anyOf": [{"const": "x"}, {"type": "null"}]}}, "required": ["a"]},
        {"properties": {"b": {"type": "boolean"}}, "required": ["b", "n"]},
    ],
    "unevaluatedProperties": False,
}
ROOT = {
    "type": "object",
    "properties": {"below": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}},
    "required": ["below"],
    "additionalProperties": False,
}
COMPOSED = {"node": NODE, "either": EITHER, "root": ROOT}


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "glm45", "deepseek_v4", "pythonic"])
@pytest.mark.parametrize("kind", COMPOSED)
def test_schemas_that_refer_and_combine(name: str, kind: str) -> None:
    """As pydantic and zod write them: at the top of the arguments, or in one of them."""
    form, schema = TOOL_FORMATS[name], COMPOSED[kind]
    if kind == "either" and name == "hermes":
        pytest.skip("JSON's own grammar refuses unevaluatedProperties")
    tools = [Function("f", schema, strict=True)]
    made = tool_grammar(form, tools, "required", parallel=False)
    assert made is not None
    seen = set()
    for seed in range(6):
        text = walk(made, [], seed)
        parser = make_parser(name, None, tools=tools)
        message = fold(parser.feed(text) + parser.end())
        arguments = json.loads(message.tool_calls[0].arguments)
        jsonschema.validate(arguments, schema)
        seen |= arguments.keys()
    assert seen == ({"n", "a", "b"} if kind == "either" else set(arguments))


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "pythonic"])
@pytest.mark.parametrize("other", [{"type": "integer"}, {}, True], ids=str)
def test_arguments_by_any_name(name: str, other: Any) -> None:
    """A schema that lists none and says what they may be: a forced call can have some."""
    schema = {"type": "object", "additionalProperties": other}
    made = tool_grammar(TOOL_FORMATS[name], [Function("f", schema)], "required", parallel=False)
    assert made is not None
    text = {
        "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 5}}\n</tool_call>',
        "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\n5\n</parameter>\n</function>\n</tool_call>",
        "pythonic": "[f(a=5)]",
    }[name]
    assert walk(made, [], 0, text) == text
    if name != "hermes":
        with pytest.raises(InvalidRequestError, match="`additionalProperties` of the strict function 'f'"):
            tool_grammar(TOOL_FORMATS[name], [Function("f", schema, strict=True)], "auto")


def test_arguments_of_too_many_forms_are_refused() -> None:
    two = {"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    schema = {"type": "object", "allOf": [two] * 20}
    with pytest.raises(InvalidRequestError, match="The arguments of the function 'f' have 32 forms or more"):
        tool_grammar(TOOL_FORMATS["glm45"], [Function("f", schema)], "required")


def test_arguments_whose_grammar_would_be_too_long_are_refused() -> None:
    """Before it is written: a few bytes may stand for all that an argument refers to."""
    form, defs = TOOL_FORMATS["pythonic"], {"a": {"type": "integer"}}
    many = {"properties": {f"p{i}": {"$ref": "#/$defs/a"} for i in range(500)}, "$defs": defs}
    with pytest.raises(InvalidRequestError, match="Too many arguments of the function 'f' refer to parts"):
        tool_grammar(form, [Function("f", many)], "required")
    forms = {"properties": {f"p{i}": {} for i in range(300)}, "anyOf": [{"required": ["a"]}] * 14}
    with pytest.raises(InvalidRequestError, match="'f' has more than 4096 arguments in all forms"):
        tool_grammar(form, [Function("f", forms)], "required")


def test_strict_alternatives_that_cannot_be_enforced_are_refused() -> None:
    """Of the texts that begin like a number some are no number, and would be excluded with it."""
    either = {"anyOf": [TEXT, {"type": "integer", "enum": [1, 2]}]}
    for schema in (either, {"$ref": "#/$defs/e"}):
        parameters = {"type": "object", "properties": {"a": schema}, "$defs": {"e": either}}
        with pytest.raises(InvalidRequestError, match="`enum` of the argument 'a'"):
            tool_grammar(TOOL_FORMATS["glm45"], [Function("f", parameters, strict=True)], "auto")


TEXT = {"type": "string"}
ONE_OF_TWO = [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}]


OBJECT = {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False}
UNIONS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {  # what may be written, and what may not
    "text or list": (
        {"anyOf": [TEXT, {"type": "array", "items": {"$ref": "#/$defs/text"}}]},
        {"": "", "a [b]": "a [b]", "\n a": "\n a", "5": "5", '["a", "b"]': ["a", "b"], "[]": []},
        ["[a", " [", "[1", "\u3000["],
    ),
    "text, object or null": (
        {"anyOf": [TEXT, OBJECT, {"type": "null"}]},
        {"a": "a", "[a]": "[a]", '{"a": 1}': {"a": 1}, "null": None},
        ["{b", '{"a": "b"'],
    ),
    "types": (
        {**OBJECT, "type": ["string", "object"]},
        {"b": "b", '{"a1": 1}': {"a1": 1}},
        ['{"b": 1', "{b"],
    ),
    "word or number": (
        {"oneOf": [{"enum": ["auto", "5m", "-"]}, {"type": "integer", "minimum": 5}]},
        {"auto": "auto", "5m": "5m", "-": "-", "5": 5, "17": 17},
        ["aut", "4", "m"],
    ),
    "words": (
        {"enum": ["a", "1", "null", 2, None, "[x]"]},
        {"a": "a", "2": 2, "null": None, "[x]": "[x]"},
        ["1", "[y]"],
    ),
}


@pytest.mark.parametrize("name", ["qwen3_coder", "mimo", "glm47", "minimax_m2"])
@pytest.mark.parametrize("kind", UNIONS)
def test_strict_unions(name: str, kind: str) -> None:
    """Whose values can be told apart: what is written as the one is read as the one."""
    schema, right, wrong = UNIONS[kind]
    parameters = {"properties": {"v": schema}, "required": ["v"], "$defs": {"text": TEXT}}
    tools, form = [Function("f", parameters, strict=True)], TOOL_FORMATS[name]
    assert isinstance(form, XmlCalls)
    made = tool_grammar(form, tools, "required", parallel=False)
    assert made is not None
    tokenizer = make_tokenizer([*(bytes([index]) for index in range(END)), b"<end>"], [END], [END])
    whole = LLMatcher(tokenizer, translate(made, Specials(END + 1, {})), log_level=0)
    begin = f"{form.section[0]}\n" * bool(form.section[0]) + f"{form.call[0]}f{form.call[1]}{form.line}"
    begin += f"{form.argument[0]}v{form.behind_key[0]}{form.value}" + "\n" * form.own_lines
    end = "\n" * form.own_lines + form.argument[1] + form.line
    for text in wrong:
        written = f"{begin}{text}{end}".encode()
        assert whole.deep_copy().validate_tokens([*written]) < len(written), text
    for text, value in right.items():
        parser = make_parser(name, None, tools=tools)
        (call,) = fold(parser.feed(walk(made, [], 0, f"{begin}{text}{end}")) + parser.end()).tool_calls
        assert json.loads(call.arguments) == {"v": value}
        jsonschema.validate({"v": value}, parameters)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3_coder", "a</parameter>\n<parameter=n>\n99"),  # a model may forget the line break
        ("qwen3_coder", "a\n<parameter=n>\n99"),
        ("qwen3_coder", "a\n</function>\n</tool_call>\n<tool_call>"),
        ("minimax_m2", 'a</parameter> <parameter name="n">99'),
    ],
)
def test_a_strict_text_is_no_other_argument(name: str, text: str) -> None:
    """What is read as another one follows the schema, too."""
    properties = {"a": TEXT, "n": {"type": "integer", "maximum": 9}}
    parameters = {"properties": properties, "required": ["a", "n"]}
    form = TOOL_FORMATS[name]
    made = tool_grammar(form, [Function("f", parameters, strict=True)], "required", parallel=False)
    assert made is not None and isinstance(form, XmlCalls)
    tokenizer = make_tokenizer([*(bytes([index]) for index in range(END)), b"<end>"], [END], [END])
    matcher = LLMatcher(tokenizer, translate(made, Specials(END + 1, {})), log_level=0)
    begin = f"{form.section[0]}\n{form.call[0]}f{form.call[1]}\n{form.argument[0]}a{form.behind_key[0]}"
    written = [*f"{begin}{chr(10) * form.own_lines}{text}".encode()]
    assert matcher.validate_tokens(written) < len(written)


@pytest.mark.parametrize(
    ("name", "ends"),
    [("qwen3_coder", "\n</parameter>\n"), ("deepseek_v4", "</｜DSML｜parameter>\n")],
    ids=["qwen3_coder", "deepseek_v4"],
)
def test_an_argument_that_is_not_strict_refuses_no_call(name: str, ends: str) -> None:
    """Its text may be any; what the grammars of JSON do not take is not asked of them."""
    schemas: list[dict[str, Any]] = [
        {"allOf": [{"$ref": "#/$defs/text"}, {"description": "a name"}]},
        {"allOf": [TEXT, {"minLength": 1}]},
        {"not": {"type": "null"}},
        {"if": TEXT, "then": {"minLength": 2}},
        {"$ref": "#/$defs/gone"},
        {"anyOf": [TEXT, {"type": "array", "uniqueItems": True, "items": TEXT}]},
        {"type": ["string", "null"], "not": {"const": ""}},
        {"type": ["string", "boolean"], "enum": ["true", "false"]},
        {"enum": []},
    ]
    for schema in schemas:
        parameters = {"properties": {"v": schema}, "required": ["v"], "$defs": {"text": TEXT}}
        made = tool_grammar(TOOL_FORMATS[name], [Function("f", parameters)], "required", parallel=False)
        assert made is not None
        assert walk(made, [], 0, "", ends).count(ends) == 1, schema


def test_a_strict_union_where_tags_tell_texts() -> None:
    """`string="true"` is what the model means, also of a text that looks like another value."""
    schema = {"type": ["string", "integer", "array"], "minimum": 5, "items": TEXT}
    parameters = {"properties": {"v": schema, "w": schema}, "required": ["v", "w"]}
    tools = [Function("f", parameters, strict=True)]
    made = tool_grammar(TOOL_FORMATS["deepseek_v4"], tools, "required", parallel=False)
    assert made is not None
    for seed in range(6):
        text = walk(made, [], seed, "", "</｜DSML｜parameter>\n")
        parser = make_parser("deepseek_v4", None, tools=tools)
        arguments = json.loads(fold(parser.feed(text) + parser.end()).tool_calls[0].arguments)
        jsonschema.validate(arguments, parameters)
        for name, value in arguments.items():
            assert f'name="{name}" string="{json.dumps(isinstance(value, str))}"' in text
    marked = text.replace("parameter name", "\0").split("\0")[0] + (
        'parameter name="v" string="true">["a"]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="w" string="false">["a"]</｜DSML｜parameter>\n</｜DSML｜invoke>'
    )
    parser = make_parser("deepseek_v4", None, tools=tools)
    arguments = json.loads(fold(parser.feed(marked) + parser.end()).tool_calls[0].arguments)
    assert arguments == {"v": '["a"]', "w": ["a"]}


@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("$ref", {"$ref": "#/$defs/none"}),
        ("allOf", {"$ref": "#/$defs/kind", "enum": ["b", "c"]}),
        ("pattern", {"$ref": "#/$defs/text", "pattern": "^a"}),
        ("not", {"type": "string", "not": {"const": "a"}}),
        ("if", {"if": {"const": "a"}, "then": False}),
        ("minimum", {"minimum": 5}),
        ("minimum", {"anyOf": [TEXT, {"type": "integer", "minimum": 5}]}),
        ("oneOf", {"oneOf": [TEXT, {"type": ["string", "null"]}]}),
        ("oneOf", {"oneOf": [{"const": "a"}, {"enum": ["a", "b"]}]}),
        ("allOf", {"allOf": [{"type": "number"}, {}]}),
        ("format", {"type": "string", "format": "date"}),
        ("multipleOf", {"type": ["string", "array", "number"], "items": TEXT, "multipleOf": 2}),
    ],
)
def test_strict_texts_that_are_not_enforced_are_refused(keyword: str, schema: Any) -> None:
    """A schema may restrict a text in many ways, of which the grammar of a format between tags has few."""
    defs = {"kind": {"enum": ["a", "b"]}, "text": TEXT}
    parameters = {"type": "object", "properties": {"a": schema}, "$defs": defs}
    with pytest.raises(InvalidRequestError, match=rf"`{re.escape(keyword)}` of the argument 'a'"):
        tool_grammar(TOOL_FORMATS["glm45"], [Function("f", parameters, strict=True)], "auto")
    assert tool_grammar(TOOL_FORMATS["glm45"], [Function("f", parameters)], "required")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "path"},
        {"anyOf": [TEXT, {"type": "integer"}, {"type": "null"}]},
        {"oneOf": [{"const": "a", "title": "A"}, {"const": "b"}]},
        {"$ref": "#/$defs/text", "enum": ["a"], "description": "d"},
        {"anyOf": [TEXT, {"type": "string", "minLength": 5}]},
        {},
    ],
    ids=str,
)
def test_strict_texts_of_any_kind(schema: Any) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "$defs": {"text": TEXT}}
    assert tool_grammar(TOOL_FORMATS["glm45"], [Function("f", parameters, strict=True)], "auto")


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("not", {"not": {"required": ["a"]}}),
        ("if", {"if": {"required": ["a"]}, "then": {"required": ["b"]}}),
        ("patternProperties", {"patternProperties": {"^a": {"type": "integer"}}}),
        ("propertyNames", {"propertyNames": {"maxLength": 0}}),
        ("dependentRequired", {"dependentRequired": {"a": ["b"]}}),
        ("minProperties", {"minProperties": 1}),
        ("minProperties", {"minProperties": "1"}),
        ("maxProperties", {"maxProperties": 0}),
        ("enum", {"enum": [{}]}),
        ("type", {"allOf": [{"type": "integer"}]}),
        ("$ref", {"$ref": "other.json"}),
        ("oneOf", {"oneOf": [{"required": ["a"]}, {"properties": {"a": TEXT}}]}),
        ("properties", {"allOf": [{"properties": {"a": {"type": "integer"}}}]}),
        ("additionalProperties", {"allOf": [{"additionalProperties": False}]}),
        ("additionalProperties", {"required": ["b"], "additionalProperties": TEXT}),
        ("unevaluatedProperties", {"allOf": [{"unevaluatedProperties": False}]}),
    ],
)
def test_strict_lists_that_are_not_enforced_are_refused(name: str, keyword: str, schema: Any) -> None:
    parameters = {"type": "object", "properties": {"a": TEXT}, **schema}
    with pytest.raises(InvalidRequestError, match=rf"`{re.escape(keyword)}` of the arguments together"):
        tool_grammar(TOOL_FORMATS[name], [Function("f", parameters, strict=True)], "auto")
    assert tool_grammar(TOOL_FORMATS[name], [Function("f", parameters)], "required")


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": ONE_OF_TWO},
        {"oneOf": [{"properties": {"k": {"const": k}}, "required": ["k"]} for k in "ab"]},
        {"properties": {"a": TEXT}, "required": ["a"], "minProperties": 1, "maxProperties": 1},
        {"properties": {"a": TEXT, "b": False}, "unevaluatedProperties": False},
    ],
    ids=str,
)
def test_strict_lists_that_follow_by_themselves(schema: Any) -> None:
    parameters = {"type": "object", **schema}
    made = tool_grammar(TOOL_FORMATS["qwen3_coder"], [Function("f", parameters, strict=True)], "auto")
    assert made is not None and ("=b>" in made.spec) == (schema == {"oneOf": ONE_OF_TWO})


@pytest.mark.parametrize(("name", "key"), [("pythonic", "a b"), ("qwen3_coder", "a>b")])
def test_a_name_that_would_not_be_read_is_not_written(name: str, key: str) -> None:
    """A forced call comes back as a call, whatever its arguments are called."""
    parameters = {"type": "object", "properties": {key: {"type": "integer"}, "-n": {"type": "integer"}}}
    tools = [Function("f", parameters)]
    made = tool_grammar(TOOL_FORMATS[name], tools, "required")
    assert made is not None and key not in made.spec and "-n" in made.spec
    tools = [Function("f", {**parameters, "required": [key]})]
    with pytest.raises(InvalidRequestError, match=f"cannot write the required argument '{key}'"):
        tool_grammar(TOOL_FORMATS[name], tools, "required")


def test_a_reference_into_a_list_gives_the_type() -> None:
    """zod refers to parts of a union by their index."""
    properties = {
        "a": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
        "b": {"$ref": "#/properties/a/anyOf/0"},
    }
    tools = [Function("f", {"type": "object", "properties": properties, "required": ["b"]}, strict=True)]
    made = tool_grammar(TOOL_FORMATS["qwen3_coder"], tools, "required")
    assert made is not None
    text = walk(made, [], 0)
    parser = make_parser("qwen3_coder", None, tools=tools)
    arguments = json.loads(fold(parser.feed(text) + parser.end()).tool_calls[0].arguments)
    assert type(arguments["b"]) is int
