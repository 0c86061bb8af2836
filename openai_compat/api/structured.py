"""Reads the form that a request wants its output to have: `response_format` and its other names."""

from __future__ import annotations

from microvllm.openai_compat.api.requests import GenerationRequest, ResponseFormat
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.grammar.forms import Kind, form_of, make_form
from microvllm.runtime.request import StructuredOutput

GUIDED: dict[str, Kind] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
TAGS = ("structures", "triggers", "format")


def structured_output(body: GenerationRequest) -> StructuredOutput | None:
    """Return the requested form, which `InputProcessor.prepare` checks; None for free text.

    Raises `InvalidRequestError` naming the field, also for several forms at once.
    """
    forms: list[StructuredOutput] = []
    whitespace = body.guided_whitespace_pattern
    if body.response_format is not None and body.response_format.type != "text":
        forms.append(_of_format(body.response_format, whitespace))
    if body.structured_outputs is not None:
        forms.append(form_of(body.structured_outputs, "structured_outputs"))
    for name, kind in GUIDED.items():
        value = getattr(body, name)
        if value is not None and value not in ("", []):
            forms.append(make_form(kind, value, name, whitespace))
    if whitespace is not None and (not forms or forms[0].whitespace != whitespace):
        name = "guided_whitespace_pattern"
        raise InvalidRequestError(f"{name} needs guided_json or a response_format of JSON.", name)
    if not forms:
        return None
    if len(forms) > 1:
        names = " and ".join(form.field for form in forms)
        raise InvalidRequestError(f"Only one form can be requested, not {names}.", forms[1].field)
    if body.use_beam_search:
        raise InvalidRequestError(f"{forms[0].field} is not supported with beam search.", forms[0].field)
    return forms[0]


def _of_format(given: ResponseFormat, whitespace: str | None) -> StructuredOutput:
    name = "response_format"
    if given.json_schema is not None and given.type != "json_schema":
        raise InvalidRequestError(f"{name}.json_schema needs the type json_schema, not {given.type}.", name)
    if given.type == "json_object":
        return make_form("json_object", True, name, whitespace)
    if given.type == "structural_tag":
        tags = {member: value for member in TAGS if (value := getattr(given, member)) is not None}
        return make_form("structural_tag", tags, name, whitespace)
    if given.json_schema is None or given.json_schema.schema is None:
        missing = "json_schema" if given.json_schema is None else "json_schema.schema"
        raise InvalidRequestError(f"{name}.{missing} must be given for the type json_schema.", name)
    return make_form("json", given.json_schema.schema, name, whitespace)
