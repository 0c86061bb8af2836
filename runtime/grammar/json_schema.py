"""Prepares JSON schemas for llguidance, which enforces draft 2020-12 or refuses, and finds what it refused.

A keyword that llguidance does not enforce is an error of its compiler, never ignored. What is an annotation
in the specification stays one: unknown keywords, and a `format` that is none of `FORMATS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from microvllm.runtime.errors import InvalidRequestError

MAX_DEPTH = 100  # of a schema; llguidance's own parser stops at 128 levels of JSON
# One space, or a newline and an indentation: without a bound a model may fill its context with whitespace.
WHITESPACE = r" |\n[ \t]{0,40}"
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
# Keywords that hold a schema, a list of schemas, or schemas by name.
_SCHEMA = (
    *("additionalProperties", "additionalItems", "contains", "else", "if", "items", "not", "propertyNames"),
    *("then", "unevaluatedItems", "unevaluatedProperties"),
)
_SCHEMAS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_BY_NAME = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


def prepare(schema: Any, whitespace: str | None, additional_properties: bool) -> Any:
    """Return the schema with llguidance's options. Changes `schema`.

    Raises `InvalidRequestError` for what is nested deeper than `MAX_DEPTH`, and for a `minProperties` that
    llguidance does not enforce.
    """
    for path, part in subschemas(schema):
        if isinstance(part.get("propertyNames"), dict):
            _enumerate_names(part, schema)
        if isinstance(part.get("format"), str) and part["format"] not in FORMATS:
            del part["format"]
        if not additional_properties and ("properties" in part or part.get("type") == "object"):
            part.setdefault("additionalProperties", False)
        least, required = part.get("minProperties"), part.get("required")
        # A key that no schema names may come twice, and is one property then.
        if isinstance(least, int) and least > 1 + (len(required) if isinstance(required, list) else 0):
            raise InvalidRequestError(
                f"minProperties is only supported up to one more than is required (at {path}/minProperties)"
            )
    if not isinstance(schema, dict):
        return schema
    # The schema's own options are replaced: among them is one that ignores unsupported keywords.
    pattern = WHITESPACE if whitespace is None else whitespace
    schema["x-guidance"] = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
    return schema


def _enumerate_names(part: dict[str, Any], root: dict[str, Any]) -> None:
    """Write `propertyNames` that are a list or a pattern, as pydantic has them, as properties."""
    names = part["propertyNames"]
    reference = names.get("$ref")
    if isinstance(reference, str) and isinstance(root.get("$defs"), dict):
        names = root["$defs"].get(reference.removeprefix("#/$defs/"), names)
    if not isinstance(names, dict):
        return
    if names.get("type") == "string" and not names.keys() - {"type", "title", "description"}:
        del part["propertyNames"]  # every name is a string; Zod writes this
        return
    if not {"properties", "patternProperties"}.isdisjoint(part):
        return
    value, told = part.get("additionalProperties", True), names.keys() - {"type", "title", "description"}
    choices = names.get("enum")
    if told == {"enum"} and isinstance(choices, list) and all(isinstance(name, str) for name in choices):
        part["properties"] = dict.fromkeys(choices, value)
    elif told == {"pattern"} and isinstance(names["pattern"], str):
        part["patternProperties"] = {names["pattern"]: value}
    else:
        return
    del part["propertyNames"]
    part["additionalProperties"] = False


def subschemas(schema: Any, path: str = "#", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each schema that is an object with its JSON pointer, from the outside in."""
    if not isinstance(schema, dict):
        return
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"the schema is nested more than {MAX_DEPTH} levels deep")
    yield path, schema
    for keyword, value in list(schema.items()):
        below = f"{path}/{keyword}"
        if keyword in _SCHEMA and isinstance(value, dict):
            yield from subschemas(value, below, depth + 1)
        elif keyword in _SCHEMAS and isinstance(value, list):
            for index, item in enumerate(value):
                yield from subschemas(item, f"{below}/{index}", depth + 1)
        elif keyword in _BY_NAME and isinstance(value, dict):
            for name, item in value.items():
                yield from subschemas(item, f"{below}/{name}", depth + 1)


def unsupported(problem: str) -> list[str]:
    """Return the keywords that a message of llguidance's compiler is about."""
    return _QUOTED.findall(problem) if problem.startswith("Unimplemented keys") else []


def locate(schema: Any, problem: str) -> str | None:
    """Return the JSON pointer of what a message of llguidance's compiler is about, if it can be found."""
    keywords = set(unsupported(problem))
    for path, part in subschemas(schema):
        for keyword, value in part.items():
            if keyword in keywords:
                return f"{path}/{keyword}"
            if not isinstance(value, str) or not value:
                continue
            said = {"pattern": value, "type": f"type: {value}", "$ref": value.removeprefix("#")}.get(keyword)
            if said and said in problem:
                return f"{path}/{keyword}"
        for pattern in part.get("patternProperties") or ():
            if pattern and pattern in problem:
                return f"{path}/patternProperties/{pattern}"
    return None
