"""Writes the grammar of calls that have to be made, or made by their schema, in the format of the model.

The grammar is a tree of structural tags (`StructuredOutput` of kind `structural_tag`): what it allows is read
as a call by the parser of the format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.schema import (
    MAX_FORMS,
    Arguments,
    definitions_of,
    forms_of,
    moved,
    options_of,
    refers,
    types_of,
    types_told,
)
from microvllm.openai_compat.parsers.strict import unenforced_list, ways_of
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import StructuredOutput

Tag = dict[str, Any]
# With more of both a grammar is longer than any that is compiled.
MAX_ARGUMENTS = 4096  # of one function, in all forms that these may have
MAX_REFERRED = 1 << 19  # characters of what arguments refer to, of each of them
MAX_FOLLOWED = 1 << 21  # likewise, of texts too, whose references are followed here


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
    """One of a function's arguments, where each is written on its own; `is_text`: it may be a text.

    `read_as` are the types that `typed` gives its text, whichever form the arguments have.
    """

    key: str
    schema: dict[str, Any]
    is_text: bool
    required: bool
    read_as: frozenset[str]


def argument_lists(function: Function, can_write: Callable[[str], object]) -> list[list[Argument]]:
    """Return the arguments that the schema of a function lists, of each form that they may have.

    `can_write` says whether the format of the calls can write an argument of this name; one that it cannot is
    left out. Raises `InvalidRequestError` if that is required, and for a schema with too many forms.
    """
    forms = forms_of(function.parameters)
    if len(forms) == MAX_FORMS:
        raise InvalidRequestError(
            f"The arguments of the function {function.name!r} have {MAX_FORMS} forms or more.", "tools"
        )
    # All of a grammar is written before it is measured.
    if sum(len(form["properties"].keys() | set(form["required"])) for form in forms) > MAX_ARGUMENTS:
        raise InvalidRequestError(
            f"The function {function.name!r} has more than {MAX_ARGUMENTS} arguments in all forms.", "tools"
        )
    whole = definitions_of(function.parameters) if refers(function.parameters) else {}
    size = len(json.dumps(whole))
    schemas = [schema for form in forms for schema in form["properties"].values()] if whole else []
    if sum(map(refers, schemas)) * size > MAX_FOLLOWED:
        raise _refer_too_much(function)
    if function.strict and (found := unenforced_list(function.parameters)):
        raise InvalidRequestError(
            f"The format of the model's calls cannot enforce `{found}` of the arguments together of the "
            f"strict function {function.name!r}.",
            "tools",
        )
    read_as = Arguments(function.parameters)
    lists = [_arguments(function, form, whole, can_write, read_as) for form in forms]
    holding = sum("$defs" in each.schema and not each.is_text for items in lists for each in items)
    if holding * size > MAX_REFERRED:
        raise _refer_too_much(function)
    return lists


def _refer_too_much(function: Function) -> InvalidRequestError:
    return InvalidRequestError(
        f"Too many arguments of the function {function.name!r} refer to parts of its schema.", "tools"
    )


def takes_any(function: Function) -> bool:
    """Whether a schema lists no arguments and says what others may be, which is only enforced in JSON.

    Raises `InvalidRequestError` if the function is `strict`.
    """
    forms = forms_of(function.parameters)
    found = any(
        form.get("additionalProperties") not in (None, False) and not (form["properties"] or form["required"])
        for form in forms
    )
    if found and function.strict:
        raise InvalidRequestError(
            "The format of the model's calls cannot enforce `additionalProperties` of the strict function "
            f"{function.name!r}, which lists no arguments.",
            "tools",
        )
    return found


def _arguments(
    function: Function,
    form: dict[str, Any],
    whole: dict[str, Any],
    can_write: Callable[[str], object],
    read_as: Arguments,
) -> list[Argument]:
    """`whole`: the definitions of the parameters; {} where there are no references."""
    required = dict.fromkeys(form["required"])
    result = []
    for key in {**form["properties"], **required}:
        schema = form["properties"].get(key)
        if not can_write(key) or schema is False:
            if key in required:
                raise InvalidRequestError(
                    f"The format of the model's calls cannot write the required argument {key!r:.100} of the "
                    f"function {function.name!r}.",
                    "tools",
                )
            continue
        types = types_of(schema, function.parameters)
        own = schema if isinstance(schema, dict) else {}
        if whole and refers(own):
            own = {**moved(own), "$defs": whole}
        is_text = not types or "string" in types
        result.append(Argument(key, own, is_text, key in required, read_as.types(key) if is_text else types))
    return result


def values(function: Function, argument: Argument, *, marked: bool = False) -> list[tuple[bool, Tag]]:
    """Return the formats in which the value of an argument stands between tags, and whether each is text.

    `marked`: the tags show which. Raises `InvalidRequestError` if the schema of a `strict` function restricts
    a text in a way that cannot be enforced.
    """
    if not argument.is_text:
        return [(False, schema_value(argument.schema))]
    ways = ways_of(options_of(argument.schema, argument.schema), argument.read_as, marked=marked)
    if not function.strict and (not ways.texts or any(types_told(part) != ["null"] for part in ways.others)):
        return [(True, {"type": "any_text"})]
    problem = ways.problem or (None if ways.texts is None or ways.texts or ways.others else "enum")
    if function.strict and problem is not None:
        raise InvalidRequestError(
            f"The format of the model's calls cannot enforce `{problem}` of the argument "
            f"{argument.key!r:.100} of the strict function {function.name!r}.",
            "tools",
        )
    found: list[tuple[bool, Tag]] = []
    if ways.texts is None:
        found.append((True, {"type": "any_text", **({"pattern": ways.pattern} if ways.pattern else {})}))
    elif ways.texts:
        found.append((True, either([constant(value) for value in ways.texts])))
    if ways.others:
        schema = ways.others[0] if len(ways.others) == 1 else {"anyOf": ways.others}
        if "$defs" in argument.schema and refers(schema):
            schema = {**schema, "$defs": argument.schema["$defs"]}
        found.append((False, schema_value(schema)))
    return found
