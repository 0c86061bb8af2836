"""Writes the grammar of calls that have to be made, or made by their schema, in the format of the model.

The grammar is a tree of structural tags (`StructuredOutput` of kind `structural_tag`): what it allows is read
as a call by the parser of the format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.schema import argument_types, property_names
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import StructuredOutput

Tag = dict[str, Any]
UNCHECKED = ("pattern", "minLength", "maxLength", "format")  # of a string that stands between tags


class CallForm(Protocol):
    """How calls are written: `wrap` stands around all of them, `separator` between two."""

    @property
    def wrap(self) -> tuple[str, str]: ...

    @property
    def separator(self) -> str: ...

    @property
    def tokens(self) -> tuple[str, ...]:
        """Texts that may be special tokens of the vocabulary: they have to be in the output's text."""

    def trigger(self, name: str) -> str:
        """Return the beginning of `wrap` and a call of this function that occurs in calls only."""

    def tag(self, function: Function, checked: bool) -> Tag:
        """Return the tag of a call, with arguments by the schema if `checked`."""

    def others(self, function: Function, checked: bool) -> list[tuple[str, Tag]]:
        """Return the other ways in which models begin a call, each with its trigger."""


def tool_grammar(
    form: CallForm,
    functions: Sequence[Function],
    choice: Literal["auto", "required"],
    *,
    parallel: bool = True,
) -> StructuredOutput | None:
    """Return the grammar of an output with calls of these functions, None where any text may be one.

    With "required" it is a call, or if `parallel` several, by the functions' schemas. With "auto" it is free
    text with or without calls, those of `strict` functions by their schemas; it is only needed if there is
    one. Raises `InvalidRequestError` for a strict schema that the format cannot enforce.
    """
    opening, closing = form.wrap
    if choice == "required":
        calls = several([form.tag(function, True) for function in functions], form.separator, parallel)
        around = [constant(opening)] if opening else [], [constant(closing)] if closing else []
        output = sequence([*around[0], calls, *around[1]])
    elif not any(function.strict for function in functions):
        return None
    else:
        tags = [form.tag(function, function.strict) for function in functions]
        triggers = [form.trigger(function.name) for function in functions]
        if opening:
            more = [constant(form.separator)] if form.separator else []
            more = [either([constant(""), sequence([*more, several(tags, form.separator)])])]
            tags = [
                tag(opening + call["begin"], sequence([{**call, "begin": ""}, *more[:parallel]]), closing)
                for call in tags
            ]
        for trigger, call in (way for f in functions for way in form.others(f, f.strict)):
            triggers.append(trigger)
            tags.append(call)
        output = {
            "type": "triggered_tags",
            "triggers": list(dict.fromkeys(triggers)),
            "tags": tags,
            "stop_after_first": not parallel,
        }
    spec = json.dumps({"type": "structural_tag", "format": output}, ensure_ascii=False)
    return StructuredOutput(kind="structural_tag", spec=spec)


def constant(text: str) -> Tag:
    """Return the format of a given text."""
    return {"type": "const_string", "value": text}


def schema_value(schema: dict[str, Any]) -> Tag:
    """Return the format of a JSON value that follows a schema."""
    return {"type": "json_schema", "json_schema": schema}


def sequence(elements: Sequence[Tag]) -> Tag:
    """Return the format of several in a row."""
    return {"type": "sequence", "elements": list(elements)} if elements else constant("")


def tag(begin: str, content: Tag, end: str) -> Tag:
    """Return the format of a text, a format, and a text."""
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def either(elements: Sequence[Tag]) -> Tag:
    """Return the format of one of several."""
    return {"type": "or", "elements": list(elements)}


def arguments_schema(function: Function) -> dict[str, Any]:
    """Return the schema of the arguments, which are an object; without parameters they are empty."""
    if not function.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **function.parameters}


def several(tags: Sequence[Tag], separator: str, parallel: bool = True) -> Tag:
    """Return the format of one of the tags, or if `parallel` of any number but none."""
    return {
        "type": "tags_with_separator",
        "tags": list(tags),
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }


class Argument(NamedTuple):
    """One of a function's arguments, where each is written on its own; `is_text`: it may be any text."""

    key: str
    schema: dict[str, Any]
    is_text: bool
    required: bool


def arguments(function: Function) -> list[Argument]:
    """Return the arguments that the schema of a function lists."""
    parameters = function.parameters
    shared = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
    required = parameters.get("required")
    result = []
    for key in property_names(parameters):
        types, schema = argument_types(parameters, key), parameters["properties"][key]
        schema = {**(schema if isinstance(schema, dict) else {}), **shared}
        needed = isinstance(required, list) and key in required
        result.append(Argument(key, schema, not types or "string" in types, needed))
    return result


def text(function: Function, argument: Argument) -> Tag:
    """Return the format of a text that stands between tags: any, or one of those the schema lists.

    Raises `InvalidRequestError` if the schema of a `strict` function restricts it in another way.
    """
    schema = argument.schema
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return either([constant(value) for value in values])
    found = [name for name in UNCHECKED if name in schema]
    if found and function.strict:
        raise InvalidRequestError(
            f"The format of the model's calls cannot enforce `{found[0]}` of the argument "
            f"{argument.key!r:.100} of the strict function {function.name!r}.",
            "tools",
        )
    return {"type": "any_text"}
