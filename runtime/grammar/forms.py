"""Makes a `StructuredOutput` of what users write: vLLM's options, or one value of a kind."""

from __future__ import annotations

from typing import Any, Literal

import orjson

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import StructuredOutput

Kind = Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]
KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_OF_JSON = ("json", "json_object", "structural_tag")
_TYPES: dict[Kind, tuple[tuple[type, ...], str]] = {
    "json": ((str, dict, bool), "a schema or its JSON text"),
    "regex": ((str,), "a string"),
    "choice": ((list, tuple), "a list of strings"),
    "grammar": ((str,), "a string"),
    "json_object": ((bool,), "true or false"),
    "structural_tag": ((str, dict), "an object or its JSON text"),
}


def make_form(
    kind: Kind, value: Any, field: str, whitespace: str | None = None, additional_properties: bool = True
) -> StructuredOutput:
    """Return the form of a kind; what is no text already becomes JSON. Raises `InvalidRequestError`."""
    types, words = _TYPES[kind]
    if not isinstance(value, types):
        raise InvalidRequestError(f"{field}: {kind} must be {words}, got {value!r:.100}.", field)
    if kind not in _OF_JSON and (whitespace is not None or not additional_properties):
        option = "disable_additional_properties" if whitespace is None else "a limit of whitespace"
        raise InvalidRequestError(f"{field}: {option} is for JSON, not for {kind}.", field)
    try:
        spec = value if isinstance(value, str) else orjson.dumps(value).decode()
    except TypeError:  # nested too deeply; offline also what is no JSON
        raise InvalidRequestError(f"{field}: {kind} cannot be written as JSON.", field) from None
    return StructuredOutput(
        kind=kind,
        spec="" if kind == "json_object" else spec,
        whitespace=whitespace,
        additional_properties=additional_properties,
        field=field,
    )


def form_of(options: Any, field: str) -> StructuredOutput:
    """Return the form that vLLM's `StructuredOutputsParams`, or an object with its attributes, requests.

    Raises `InvalidRequestError` unless exactly one kind is given, and for a value of the wrong type.
    """
    kinds = [kind for kind in KINDS if getattr(options, kind) not in (None, False)]
    if len(kinds) != 1:
        problem = f"not {' and '.join(kinds)}" if kinds else "none is given"
        raise InvalidRequestError(f"{field} must have exactly one of {', '.join(KINDS)}; {problem}.", field)
    if options.disable_any_whitespace and options.whitespace_pattern is not None:
        raise InvalidRequestError(
            f"{field}: disable_any_whitespace leaves nothing that whitespace_pattern could allow.", field
        )
    whitespace = "" if options.disable_any_whitespace else options.whitespace_pattern
    additional = not options.disable_additional_properties
    return make_form(kinds[0], getattr(options, kinds[0]), field, whitespace, additional)
