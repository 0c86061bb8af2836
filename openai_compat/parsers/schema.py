"""Gives the text of an argument the type that the function's JSON schema says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from microvllm.openai_compat.parsers.json_text import WORDS, JsonText

MAX_DEPTH = 16  # of references and alternatives
JSON_TYPES: dict[type, str] = {
    bool: "boolean",
    dict: "object",
    float: "number",
    int: "integer",
    list: "array",
    str: "string",
    type(None): "null",
}


def argument_types(parameters: Mapping[str, Any], key: str) -> frozenset[str]:
    """Return the JSON types that an argument may have; empty if the schema does not say."""
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, dict) else None
    return _types(parameters.get("additionalProperties") if schema is None else schema, parameters, MAX_DEPTH)


def property_names(parameters: Mapping[str, Any]) -> list[str]:
    """Return the names of the arguments that the schema lists."""
    properties = parameters.get("properties")
    return list(properties) if isinstance(properties, dict) else []


def _types(schema: object, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    if not isinstance(schema, dict) or not depth:
        return frozenset()
    kind = schema.get("type")
    if isinstance(kind, str | list):
        return frozenset([kind] if isinstance(kind, str) else map(str, kind))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return frozenset(JSON_TYPES[type(value)] for value in values)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        target: object = root
        for name in reference.removeprefix("#/").split("/"):
            target = target.get(name) if isinstance(target, dict) else None
        return _types(target, root, depth - 1)
    found = [
        _types(option, root, depth - 1)
        for name in ("anyOf", "oneOf", "allOf")
        for option in schema.get(name) or ()
    ]
    # An alternative of unknown type may be of any.
    return frozenset().union(*found) if all(found) else frozenset()


def typed(text: str, types: frozenset[str]) -> str:
    """Return the JSON text of an argument written as `text`.

    A text that is no value of these types is a string.
    """
    word = text.strip()
    word = WORDS.get(word, word)
    try:
        kind = JSON_TYPES[type(json.loads(word, parse_constant=_refuse))]
    except (ValueError, RecursionError):
        value = JsonText()
        mended, end = value.feed(word, 0)
        opened = {"{": "object", "[": "array"}.get(word[:1])
        if opened in types and value.done and end == len(word):
            return mended
    else:
        if kind != "string" and _may_be(kind, types):
            return word
    return json.dumps(text, ensure_ascii=False)


def _may_be(kind: str, types: frozenset[str]) -> bool:
    # Where no string may stand, any other value is nearer to what is meant than one.
    return not types or kind in types or "string" not in types or (kind == "integer" and "number" in types)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)  # NaN and Infinity are no JSON
