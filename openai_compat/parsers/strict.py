"""Finds what cannot be enforced of a schema whose arguments are written one by one, some as mere text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

from microvllm.openai_compat.parsers.schema import (
    COMBINED,
    HANDED_ON,
    JSON_TYPES,
    OF_ANY,
    OF_TYPE,
    parts_of_forms,
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


def unenforced_text(options: Sequence[dict[str, Any]]) -> str | None:
    """Return the keyword because of which a text may follow none of the options; None if any follows one.

    A text is read as a value of another type where an option has that.
    """
    if any(not restrictions(option) and "type" not in option for option in options):
        found = None
    elif any("string" in types_told(option) and not restrictions(option) for option in options):
        others = (option for option in options if types_told(option) != ["string"])
        found = next((word for option in others for word in restrictions(option)), None)
    else:
        found = next((word for option in options for word in restrictions(option)), "type")
    return found or ("oneOf" if not _of_one_type_each(options) else None)


def _of_one_type_each(options: Sequence[dict[str, Any]]) -> bool:
    """Whether no value follows two of the options, if these are a `oneOf`'s."""
    if not any("oneOf" in option for option in options):
        return True
    types = ["number" if kind == "integer" else kind for option in options for kind in {*types_told(option)}]
    return len(types) == len(set(types))


def listed_texts(schema: dict[str, Any]) -> list[str]:
    """Return the texts of an option that lists strings, or null; none of any other."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if schema.get("type") == "null":
        values = [None]
    if not isinstance(values, list) or not all(value is None or isinstance(value, str) for value in values):
        return []
    types = types_told(schema)
    return ["null" if value is None else value for value in values if JSON_TYPES[type(value)] in types]


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
