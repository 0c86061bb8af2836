"""Reads what the JSON schema of a function says of its arguments, and gives their texts these types."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NoReturn
from urllib.parse import unquote

from microvllm.openai_compat.parsers.json_text import WORDS, JsonText

MAX_PARTS = 256  # that the forms of the arguments of one function are made of
MAX_FORMS = 32  # of the arguments of one function
COMBINED = ("anyOf", "oneOf", "allOf")
# Hold schemas by name.
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# JSON schema's keywords restrict values of one type, or of any; every other keyword is an annotation.
OF_TYPE = {
    "string": ("pattern", "minLength", "maxLength", "format"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": (
        *("items", "prefixItems", "additionalItems", "contains", "minItems", "maxItems", "uniqueItems"),
        "unevaluatedItems",
    ),
    "object": (
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies"),
        "unevaluatedProperties",
    ),
    "boolean": (),
    "null": (),
}
OF_TYPE["number"] = OF_TYPE["integer"]
OF_ANY = ("enum", "const", "not", "if", "$ref", "allOf", "anyOf", "$dynamicRef", "$recursiveRef")
# What `options_of` hands on to the options of a schema.
HANDED_ON = {"type", *chain.from_iterable(OF_TYPE.values()), *OF_ANY} - {"$ref", *COMBINED}
MAX_VISITS = 4  # of a part of a schema with other keywords beside it, by `options_of`
VALUES = ("enum", "const", "default", "examples")  # hold values, in which nothing is a keyword
WHOLE = "parameters"
JSON_TYPES: dict[type, str] = {
    bool: "boolean",
    dict: "object",
    float: "number",
    int: "integer",
    list: "array",
    str: "string",
    type(None): "null",
}


class Arguments:
    """What the schema of a function says of each of its arguments; `names` are those that it lists."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = parameters
        self._schemas: dict[str, list[Any]] = {}
        for form in forms_of(parameters):
            for name, schema in form["properties"].items():
                self._schemas.setdefault(name, []).append(schema)
        self.names = list(self._schemas)

    def types(self, key: str) -> frozenset[str]:
        """Return the JSON types that an argument may have; empty if the schema does not say."""
        schemas = self._schemas.get(key) or [self._parameters.get("additionalProperties")]
        return _union(types_of(each, self._parameters) for each in schemas)


def types_of(schema: object, parameters: Mapping[str, Any]) -> frozenset[str]:
    """Return the JSON types of a part of the schema; empty if it does not say."""
    return _union(map(_types, options_of(schema, parameters)))


def forms_of(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the forms that the arguments may have, each a schema with `properties` and `required`.

    What a `$ref` or `allOf` adds to the schema itself is in each of them; an `anyOf` or `oneOf` makes
    several. Of a schema that is made of very many parts these are `MAX_FORMS`, and not all.
    """
    return list(map(_merged, parts_of_forms(parameters)))


def parts_of_forms(parameters: Mapping[str, Any]) -> list[tuple[dict[str, Any], ...]]:
    """Return the schemas of which each form is made, all of which its arguments follow.

    They have no `$ref` but to what is no schema, no `anyOf` and `allOf`, and no `oneOf` of one option alone.
    """
    parts = iter(range(MAX_PARTS))
    forms = _forms(parameters, parameters, parts)
    return forms if next(parts, None) is not None else (forms * MAX_FORMS)[:MAX_FORMS]


def _forms(schema: object, root: Mapping[str, Any], left: Iterator[int]) -> list[tuple[dict[str, Any], ...]]:
    """Return what each form is made of, the schema itself first."""
    given = schema if isinstance(schema, dict) and next(left, None) is not None else {}
    properties, required = given.get("properties"), given.get("required")
    own = {name: value for name, value in given.items() if name not in ("$ref", *COMBINED)}
    if schema is False:
        own["not"] = {}
    own["properties"] = properties if isinstance(properties, dict) else {}
    names = required if isinstance(required, list) else []
    own["required"] = [name for name in names if isinstance(name, str)]
    parts = []
    if isinstance(given.get("$ref"), str):
        parts.append([_target(given["$ref"], root)])
        if not isinstance(parts[0][0], dict | bool):
            own["$ref"] = given["$ref"]
    parts += [[option] for option in _options(given, "allOf")]
    parts += [options for name in ("anyOf", "oneOf") if (options := _options(given, name))]
    if len(_options(given, "oneOf")) > 1:
        own["oneOf"] = given["oneOf"]
    forms: list[tuple[dict[str, Any], ...]] = [(own,)]
    for options in parts:
        each = (form for option in options for form in _forms(option, root, left))
        added = list(islice(each, MAX_FORMS))
        forms = list(islice((one + other for one in forms for other in added), MAX_FORMS))
    return forms


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return several schemas as one, in which the first of them counts most."""
    form, properties = {}, {}
    for part in reversed(parts):
        form.update(part)
        properties.update(part["properties"])
    required = dict.fromkeys(chain.from_iterable(part["required"] for part in parts))
    return {**form, "properties": properties, "required": list(required)}


def _options(schema: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list of schemas; a reference may lead to where it is none."""
    options = schema.get(name)
    return options if isinstance(options, list) else []


def _target(reference: str, root: Mapping[str, Any]) -> object:
    """Return what a JSON pointer (RFC 6901) leads to; None for nothing, and for any other reference."""
    start, *names = unquote(reference).split("/")
    target: object = root if start == "#" else None
    for name in names:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list):
            index = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else len(target)
            target = target[index] if index < len(target) else None
        else:
            target = target.get(name) if isinstance(target, dict) else None
    return target


def options_of(schema: object, root: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas of which a value follows one: references followed, alternatives taken apart.

    What stands beside a reference or alternatives is in each of them. What cannot be taken apart stays: a
    `$ref` to nothing or to itself, several schemas at once (`allOf`), and the `oneOf` that an option is of.
    """
    found: list[dict[str, Any]] = []
    visits: dict[int, list[dict[str, Any]]] = {}  # of parts by identity, for references may form circles
    left: list[tuple[object, dict[str, Any]]] = [(schema, {})]
    while left:
        part, kind = left.pop()
        if not isinstance(part, dict):
            found.append({**kind, "not": {}} if part is False else kind)
            continue
        before = visits.setdefault(id(part), [])
        if kind in before:
            continue
        if len(before) == MAX_VISITS:
            found.append({**kind, "allOf": [part]})
            continue
        before.append(kind)
        own = {name: value for name, value in part.items() if name in HANDED_ON}
        clashes = any(own[name] != kind[name] for name in own.keys() & kind.keys() - {"type"})
        whole = {**kind, **own}
        if "type" in own and "type" in kind:
            whole["type"] = _both(types_told(kind), types_told(own))
            if not whole["type"]:
                continue  # no value is of both
        if clashes:
            whole["allOf"] = [kind, own]
        parts = [options for name in COMBINED if (options := _options(part, name))]
        if isinstance(part.get("$ref"), str):
            target = _target(part["$ref"], root)
            if not isinstance(target, dict | bool):
                whole["$ref"] = part["$ref"]
            parts.insert(0, [target])
        if not parts:
            found.append(whole)
        elif len(parts) == 1 and (len(parts[0]) == 1 or "allOf" not in part):
            if len(_options(part, "oneOf")) > 1:
                whole["oneOf"] = part["oneOf"]
            left += [(option, whole) for option in reversed(parts[0])]
        else:
            found.append({**whole, **{name: part[name] for name in ("$ref", *COMBINED) if name in part}})
    return found or [{"$ref": "#"}]


def types_told(schema: Mapping[str, Any]) -> list[str]:
    """Return the types that `type` names; all for none."""
    kind = schema.get("type")
    return [kind] if isinstance(kind, str) else [*map(str, kind)] if isinstance(kind, list) else [*OF_TYPE]


def _both(first: Sequence[str], second: Sequence[str]) -> str | list[str]:
    """Return the types that values of both have; an integer is a number, too."""
    both = [kind for kind in second if kind in first or (kind == "integer" and "number" in first)]
    if "number" in second and "integer" in first and "integer" not in both:
        both.append("integer")
    return both[0] if len(both) == 1 else both


def refers(schema: object) -> bool:
    """Whether there is a reference in a part of a schema."""
    return '"$ref"' in json.dumps(schema)


def definitions_of(root: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `$defs` with which parts of a schema, `moved`, hold all that they refer to."""
    return {WHOLE: moved(root)}


def moved(value: Any, by_name: bool = False) -> Any:
    """Return a part of a schema with its references to where `definitions_of` puts the whole.

    `by_name`: the part holds schemas by their names, and no keywords.
    """
    if isinstance(value, list):
        return [moved(item) for item in value]
    if not isinstance(value, dict):
        return value
    if by_name:
        return {name: moved(member) for name, member in value.items()}
    return {
        name: f"#/$defs/{WHOLE}{member[1:]}"
        if name == "$ref" and isinstance(member, str) and member.startswith("#")
        else member
        if name in VALUES
        else moved(member, name in BY_NAME)
        for name, member in value.items()
    }


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    kind = schema.get("type")
    if isinstance(kind, str | list):
        return frozenset([kind] if isinstance(kind, str) else map(str, kind))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return frozenset(JSON_TYPES[type(value)] for value in values) if isinstance(values, list) else frozenset()


def _union(kinds: Iterable[frozenset[str]]) -> frozenset[str]:
    found = list(kinds)
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
