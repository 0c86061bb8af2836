"""Arguments that are written as text get the types of the function's schema."""

from __future__ import annotations

from typing import Any

import pytest

from microvllm.openai_compat.parsers import schema
from microvllm.openai_compat.parsers.schema import (
    MAX_FORMS,
    Arguments,
    forms_of,
    moved,
    options_of,
    typed,
    types_of,
)

STRING, INTEGER = {"type": "string"}, {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        (STRING, {"string"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"enum": ["a", 1]}, {"string", "integer"}),
        ({"const": None}, {"null"}),
        ({"anyOf": [STRING, INTEGER]}, {"string", "integer"}),
        ({"anyOf": [STRING, {}]}, set()),
        ({"$ref": "#/$defs/size"}, {"integer"}),
        ({"$ref": "#/$defs/self"}, set()),
        ({"$ref": "#/$defs/none"}, set()),
        ({"$ref": "#/$defs/list/anyOf/1"}, {"integer"}),
        ({"$ref": "#/$defs/list/anyOf/2"}, set()),
        ({"$ref": "#/$defs/list/anyOf/-1"}, set()),
        ({"$ref": "#/$defs/a%20b"}, {"integer"}),
        ({"$ref": "#/$defs//$defs/"}, {"integer"}),
        ({"$ref": "#size"}, set()),
        ({"$ref": "#/$defs/size", "enum": [1]}, {"integer"}),
        ({"description": "any"}, set()),
        (True, set()),
    ],
)
def test_types_of_an_argument(schema: Any, types: set[str]) -> None:
    defs = {"size": INTEGER, "self": {"$ref": "#/$defs/self"}, "list": {"anyOf": [STRING, INTEGER]}}
    defs |= {"a b": INTEGER, "": {"$defs": {"": INTEGER}}}
    parameters = {"properties": {"a": schema}, "$defs": defs, "additionalProperties": INTEGER}
    assert Arguments(parameters).types("a") == types
    assert Arguments(parameters).types("other") == {"integer"}
    assert Arguments({}).types("a") == Arguments({"properties": []}).types("a") == set()


def test_arguments_behind_references_and_alternatives() -> None:
    first, other = (
        {"properties": {"a": STRING}},
        {"properties": {"a": INTEGER, "b/c": {"$ref": "#/$defs/d~1e"}}},
    )
    parameters = {"$ref": "#/$defs/top", "$defs": {"top": {"anyOf": [first, other]}, "d/e": INTEGER}}
    assert Arguments(parameters).names == ["a", "b/c"]
    assert Arguments(parameters).types("a") == {"string", "integer"}
    assert Arguments(parameters).types("b/c") == {"integer"}
    assert Arguments({"$ref": "#"}).names == Arguments({"allOf": [1]}).names == []


def test_what_stands_beside_a_reference_is_in_its_options() -> None:
    root = {"$defs": {"kind": {"type": "string", "enum": ["a", "b"]}, "text": STRING}}
    assert options_of({"$ref": "#/$defs/text", "enum": ["a"]}, root) == [{"type": "string", "enum": ["a"]}]
    (both,) = options_of({"$ref": "#/$defs/kind", "enum": ["a", "c"]}, root)
    assert "allOf" in both
    assert options_of({"$ref": "#/nothing"}, root) == [{"$ref": "#/nothing"}]
    assert options_of(False, root) == [{"not": {}}] and options_of(True, root) == [{}]


def test_references_are_moved_and_values_are_not() -> None:
    reference = {"$ref": "#/$defs/a"}
    schema = {"enum": [reference], "properties": {"enum": reference, "default": reference}}
    there = {"$ref": "#/$defs/parameters/$defs/a"}
    assert moved(schema) == {"enum": [reference], "properties": {"enum": there, "default": there}}


@pytest.mark.parametrize(
    "odd", [5, "a", {"allOf": 5}, {"anyOf": 5}, {"required": [["a"]], "properties": 5}], ids=str
)
def test_what_is_no_schema_says_nothing(odd: Any) -> None:
    """A reference may lead anywhere in the parameters, of which only the schemas are checked."""
    parameters = {"$ref": "#/x", "x": odd, "properties": {"a": {"$ref": "#/x"}}, "required": [["a"], "a"]}
    assert Arguments(parameters).types("a") == set() and Arguments(parameters).names == ["a"]
    assert forms_of(parameters)[0]["required"] == ["a"]


def test_schemas_that_refer_to_themselves_many_times_end() -> None:
    itself = {"anyOf": [{"$ref": "#/properties/a"}] * 99 + [INTEGER]}
    parameters = {"properties": {"a": itself}, "allOf": [{"$ref": "#"}] * 99}
    assert Arguments(parameters).types("a") == {"integer"}
    assert len(forms_of(parameters)) == MAX_FORMS and Arguments(parameters).names == ["a"]


def test_forms_are_put_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Properties are copied for each form, not for each of its parts, too."""
    put, made = schema._merged, []
    monkeypatch.setattr(schema, "_merged", lambda *args: made.append(args) or put(*args))
    parts = [{"anyOf": [{}] * 31}, *[{"title": "x", "required": ["a"]}] * 200]
    forms = forms_of({"properties": {"a": STRING}, "allOf": parts})
    wanted = {"properties": {"a": STRING}, "required": ["a"], "title": "x"}
    assert forms == [wanted] * 31 and len(made) == 31


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("12", "integer", "12"),
        ("12", "string integer", "12"),
        ("12", "string null", '"12"'),
        ("12", "", "12"),
        ("12", "string number", "12"),
        ("1e400", "number", "1e400"),
        ("NaN", "number", '"NaN"'),
        ("null", "string null", "null"),
        ("None", "integer null", "null"),
        ("True", "boolean", "true"),
        (" [1, 2] ", "array", "[1, 2]"),
        ("[1, 2", "array", '"[1, 2"'),
        ("{'a': True}", "object", '{"a": true}'),
        ("{'a': True}", "", "\"{'a': True}\""),
        ("[draft] x", "", '"[draft] x"'),
        ("text", "integer", '"text"'),
        ('"text"', "", '"\\"text\\""'),
        ("}", "object", '"}"'),
        ("", "integer", '""'),
    ],
)
def test_values(text: str, types: str, value: str) -> None:
    assert typed(text, frozenset(types.split())) == value


def test_options_hand_on_what_restricts_them_and_nothing_else() -> None:
    schema = {"type": "string", "title": "T", **{f"x-{i}": i for i in range(100)}, "anyOf": [{}, {"x-1": 2}]}
    assert options_of(schema, schema) == [{"type": "string"}] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([{"const": "a"}, {"const": "b"}], [{"const": "a"}, {"const": "b"}]),
        ([{"pattern": "x"}, {}], [{"pattern": "x"}, {}]),
        ([{}, {"description": "the same"}], [{}]),
    ],
)
def test_a_part_may_be_referred_to_with_different_keywords(options: list[Any], expected: list[Any]) -> None:
    root = {"$defs": {"text": {"type": "string"}}}
    schema = {"anyOf": [{"$ref": "#/$defs/text", **option} for option in options]}
    assert options_of(schema, root) == [{"type": "string", **option} for option in expected]


@pytest.mark.parametrize(
    ("outer", "inner", "types"),
    [
        ("integer", ["integer", "string"], {"integer"}),
        ("number", ["integer", "string"], {"integer"}),
        ("integer", "number", {"integer"}),
        (["string", "null"], ["null", "boolean"], {"null"}),
    ],
)
def test_a_value_is_of_the_types_that_both_name(outer: Any, inner: Any, types: set[str]) -> None:
    schema = {"type": outer, "anyOf": [{"type": inner}]}
    assert types_of(schema, schema) == types


def test_circles_end_with_whatever_stands_beside_them() -> None:
    circle: dict[str, Any] = {"type": "string", "anyOf": [{"$ref": "#"}, {"$ref": "#", "minLength": 3}]}
    assert len(options_of(circle, circle)) <= 8
    wide = {"anyOf": [{"$ref": "#", "minLength": i} for i in range(200)]}
    assert len(options_of(wide, wide)) <= 2000
