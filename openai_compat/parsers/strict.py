"""Finds what cannot be enforced of a schema whose arguments are written one by one, some as mere text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain, permutations
from typing import Any, NamedTuple

from microvllm.openai_compat.parsers.schema import (
    COMBINED,
    HANDED_ON,
    JSON_TYPES,
    OF_ANY,
    OF_TYPE,
    parts_of_forms,
    typed,
    types_told,
)
from microvllm.runtime.grammar.json_schema import FORMATS

# Of the arguments together: what their list has, or leaves as it is.
LISTED = ("properties", "required", "additionalProperties", "unevaluatedProperties")
# Keywords that restrict nothing where they are true or empty.
MAY_BE_EMPTY = frozenset(
    (
        *("items", "additionalItems", "unevaluatedItems", "properties", "required", "patternProperties"),
        *("additionalProperties", "unevaluatedProperties", "propertyNames", "dependentRequired"),
        "dependentSchemas",
    )
)
# Keywords by which a schema without a type may leave out values of one.
UNTOLD = {"allOf", "not", "if", "$ref", "$dynamicRef", "$recursiveRef"}
OTHERS = [kind for kind in OF_TYPE if kind != "string"]
BRACKETS = {"array": "[", "object": "{"}  # by which a text shows that it is such a value
# What `str.strip` takes away, in a pattern's brackets.
SPACE = r"\x09-\x0d\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"


def restrictions(schema: dict[str, Any]) -> list[str]:
    """Return the keywords of an option of `options_of` that restrict it beside its type."""
    words = [word for kind in types_told(schema) for word in OF_TYPE.get(kind, ())]
    return [
        word
        for word in dict.fromkeys((*words, *OF_ANY))
        if word in schema
        and (word != "format" or str(schema[word]) in FORMATS)
        and not _says_nothing(word, schema[word])
    ]


def _says_nothing(word: str, value: object) -> bool:
    if word in ("minLength", "minItems", "minProperties"):
        return value == 0
    return word in MAY_BE_EMPTY and (value is True or value == {} or value == [])


class Ways(NamedTuple):
    """How the values of an argument may be written where strings are mere text.

    `texts` are the strings, None for any that matches `pattern` ("" for all of them), `others` the schemas of
    JSON values of other types. `problem` is the keyword that they do not follow, None if they follow all.
    """

    texts: list[str] | None
    pattern: str
    others: list[dict[str, Any]]
    problem: str | None


def ways_of(options: Sequence[dict[str, Any]], read_as: frozenset[str], *, marked: bool) -> Ways:
    """Return how the values that follow one of the options of `options_of` are written.

    `read_as` are the types that `typed` gives a text, unless the format is one in which strings are `marked`.
    """
    for option in options:
        if not option.keys() & {"type", "enum", "const"} and (untold := option.keys() & UNTOLD):
            return Ways(None, "", [], min(untold))
    strings = [part for option in options for part in _of_types(option, ("string",))]
    others = [part for option in options for part in _of_types(option, OTHERS)]
    problem = _not_told_apart(strings, others) if any("oneOf" in option for option in options) else None
    lists = [_listed(part) for part in strings]
    texts = None
    if all(restrictions(part) for part in strings):
        words = (word for part in strings for word in restrictions(part) if word not in ("enum", "const"))
        problem = problem or next(words, None)
        if all(lists) or not strings:
            texts = [*dict.fromkeys(chain.from_iterable(lists))]
    if marked:
        return Ways(texts, "", others, problem)
    if texts is not None:
        texts = [text for text in texts if typed(text, read_as) == json.dumps(text, ensure_ascii=False)]
        return Ways(texts, "", others, problem if texts or others else problem or "enum")
    # A text that is read as a value of another type has to follow what is said of that.
    closed: dict[str, str] = {}
    for kind in OTHERS if not read_as else [kind for kind in OTHERS if kind in read_as]:
        told = [restrictions({**part, "type": kind}) for part in others if _has(types_told(part), kind)]
        if all(told):
            closed[kind] = told[0][0] if told else "type"
    problem = problem or next((word for kind, word in closed.items() if kind not in BRACKETS), None)
    kinds = [kind for kind in BRACKETS if kind in closed]
    behind = "".join(re.escape(BRACKETS[kind]) for kind in kinds) + SPACE
    values = [value for part in others for value in _of_types(part, kinds)]
    return Ways(None, f"[{SPACE}]*([^{behind}](?s:.*))?" if kinds else "", values, problem)


def _of_types(option: dict[str, Any], kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield what an option says of values of these types, if there are such."""
    told = [kind for kind in types_told(option) if kind in kinds]
    part = {word: value for word, value in option.items() if word != "oneOf"}
    if isinstance(part.get("enum"), list):
        part["enum"] = [value for value in part["enum"] if _is_of(value, told)]
    if part.get("enum") == [] or ("const" in part and not _is_of(part["const"], told)):
        return
    if told and part.get("not") != {}:
        yield {**part, "type": told if len(told) > 1 else told[0]}


def _is_of(value: object, kinds: Sequence[str]) -> bool:
    whole = isinstance(value, float) and value.is_integer()
    return _has(kinds, "integer" if whole else JSON_TYPES[type(value)])


def _has(kinds: Sequence[str], kind: str) -> bool:
    return kind in kinds or (kind == "integer" and "number" in kinds)


def _listed(part: dict[str, Any]) -> list[str]:
    values = [part["const"]] if "const" in part else part.get("enum")
    return values if isinstance(values, list) else []


def _not_told_apart(strings: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str | None:
    """Return "oneOf" if a value may follow two parts of options, of which it must follow one."""
    texts = [text for part in strings for text in _listed(part)]
    kinds = [
        kind for part in others for kind in {"number" if k == "integer" else k for k in types_told(part)}
    ]
    several = len(strings) > 1 and not all(map(_listed, strings))
    apart = not several and len(texts) == len(set(texts)) and len(kinds) == len(set(kinds))
    return None if apart else "oneOf"


def unenforced_list(parameters: dict[str, Any]) -> str | None:
    """Return the keyword of all arguments together that a list of them does not follow by itself."""
    forms = parts_of_forms(parameters)
    for parts in forms:
        told: dict[str, Any] = {}
        listed = {name for part in parts for name in part["properties"]}
        names = listed.union(*(part["required"] for part in parts))
        for index, part in enumerate(parts):
            words = (*OF_TYPE["object"], *OF_ANY)
            for word in words:
                if word in part and word not in LISTED and not _follows(word, part, parts):
                    return word
            if "object" not in types_told(part):
                return "type"
            for word in ("additionalProperties", "unevaluatedProperties"):
                # The first part is the schema itself, of which the others are a part.
                own = listed if word == "unevaluatedProperties" and not index else part["properties"].keys()
                if part.get(word, True) not in (True, {}) and not names <= own:
                    return word
            if any(told.setdefault(name, value) != value for name, value in _restricted(part)):
                return "properties"
    if any("oneOf" in part for parts in forms for part in parts):
        pairs = permutations([dict(_summary(parts)) for parts in forms], 2)
        if not all(_excluded(one, other) for one, other in pairs):
            return "oneOf"
    return None


def _follows(word: str, part: dict[str, Any], parts: Sequence[dict[str, Any]]) -> bool:
    """Whether any list of the arguments follows a keyword for the number of properties."""
    required = {name for each in parts for name in each["required"]}
    if not isinstance(part[word], int):
        return False
    if word == "minProperties":
        return bool(part[word] <= len(required))
    return word == "maxProperties" and part[word] >= len(
        required.union(*(each["properties"] for each in parts))
    )


def _restricted(part: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the properties with what restricts them."""
    for name, schema in part["properties"].items():
        if isinstance(schema, dict):
            schema = {
                word: value
                for word, value in schema.items()
                if word in HANDED_ON or word in ("$ref", *COMBINED)
            }
        yield name, schema


def _summary(parts: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    required = {name for part in parts for name in part["required"]}
    properties = {name: value for part in parts for name, value in part["properties"].items()}
    yield "required", required
    yield "names", required | properties.keys()
    yield "values", {name: _values(properties.get(name)) for name in required}


def _excluded(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether arguments as one form lists them are never of the other form."""
    if not other["required"] <= one["names"]:
        return True
    for name in one["required"] & other["required"]:
        first, second = one["values"][name], other["values"][name]
        if first and second and first.isdisjoint(second):
            return True
    return False


def _values(schema: Any) -> frozenset[str]:
    """Return the JSON texts of the values that a schema lists."""
    if not isinstance(schema, dict):
        return frozenset()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list):
        return frozenset()
    # 1.0 is 1, which JSON spells in two ways, and true is not.
    whole = (int(value) if isinstance(value, float) and value.is_integer() else value for value in values)
    return frozenset(json.dumps(value, sort_keys=True) for value in whole)
