"""The OpenAPI 3.1 document of the server, made of its endpoints and of the types that bodies are read as."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

import microvllm
from microvllm.openai_compat.api import answers
from microvllm.openai_compat.api.descriptions import DESCRIPTIONS
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.requests import MAX_STOP_STRINGS, Body, honoured_fields
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.errors import is_anthropic

# vLLM's names of the two forms of a body, and the field that each needs.
FORMS = {"TokenizeCompletionRequest": "prompt", "TokenizeChatRequest": "messages"}
PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")  # as Starlette writes it: {model:path}
NOTHING: tuple[Any, ...] = (None, "", [], {})  # defaults that only say that nothing was given


def build_document(
    endpoints: Iterable[Endpoint], args: ServerArgs, *, pooling: bool = False
) -> dict[str, Any]:
    """Returns the document of a server with these options: its endpoints, except undocumented ones.

    `pooling`: its model makes vectors.
    """
    with_keys = bool(args.api_keys)
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {}
    for endpoint in endpoints:
        if endpoint.documented and endpoint.is_on(args, pooling=pooling):
            operations = paths.setdefault(PATH_PARAMETER.sub(r"{\1}", endpoint.path), {})
            for method in sorted(endpoint.methods):
                operations[method.lower()] = _operation(endpoint, method, with_keys and endpoint.needs_key)
            if endpoint.body is not None:
                schemas[endpoint.body.__name__] = request_schema(endpoint.body, args.max_stop_strings)
    whole = schemas["TokenizeRequest"]["properties"]
    for form, needed in FORMS.items():
        members = {name: part for name, part in whole.items() if name == needed or name not in FORMS.values()}
        schemas[form] = {"type": "object", "properties": members, "required": [needed]}
    schemas["TokenizeRequest"]["oneOf"] = [_reference(form) for form in FORMS]
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "microvllm",
            "version": microvllm.__version__,
            "description": "An OpenAI-compatible server, with the names and answers of vLLM.",
        },
        "servers": [{"url": args.root_path or "/"}],
        "paths": paths,
        "components": {"schemas": {**schemas, **answers.SCHEMAS}},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def request_schema(kind: type[Body], max_stop_strings: int = MAX_STOP_STRINGS) -> dict[str, Any]:
    """Return the schema of a request body: what is honoured, what is ignored, what is refused.

    The types give the shapes in their canonical form, without the lax spellings.
    """
    fields = honoured_fields(kind)
    _, parts = msgspec.json.schema_components([kind], ref_template="{name}")
    properties: dict[str, Any] = {}
    for name, field in fields.items():
        declared = parts[kind.__name__]["properties"][name]
        schema = _plain(declared, parts)
        if name == "stop":
            schema["anyOf"][1]["maxItems"] = max_stop_strings
        if not field.required:
            schema = _or_null(schema)
        if declared.get("default") not in NOTHING:
            schema["default"] = declared["default"]
        schema["description"] = DESCRIPTIONS[name]
        properties[name] = schema
    properties |= {name: {"description": "Accepted and ignored."} for name in kind.ignored}
    for name, harmless in kind.refused.items():
        properties[name] = {
            "enum": [None, *harmless],
            "description": "Not supported: any other value is answered 400.",
        }
    required = [name for name, field in fields.items() if field.required]
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _plain(declared: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a value that is given: without null, default and references to others."""
    if "$ref" in declared:
        struct = parts[declared["$ref"]]
        members = {name: _plain(member, parts) for name, member in struct["properties"].items()}
        required = struct["required"]
        for name in members.keys() - required:
            members[name] = members[name] if "enum" in members[name] else _or_null(members[name])
        return {"type": "object", "properties": members, **({"required": required} if required else {})}
    schema = {key: value for key, value in declared.items() if key not in ("anyOf", "default")}
    for key in ("items", "additionalProperties"):
        if key in schema:
            schema[key] = _plain(schema[key], parts)
    if "enum" in schema:
        schema["type"] = "string"
    options = [_plain(option, parts) for option in declared.get("anyOf", ()) if option != {"type": "null"}]
    return {**schema, **(options[0] if len(options) == 1 else {"anyOf": options} if options else {})}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of what may be left out: null means "not given" everywhere."""
    kind = schema.get("type")
    if isinstance(kind, str) and "enum" not in schema:
        return {**schema, "type": [kind, "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _operation(endpoint: Endpoint, method: str, guarded: bool) -> dict[str, Any]:
    """One method of one path. What the handler's docstring says is what the document says."""
    summary, _, description = (inspect.getdoc(endpoint.handler) or endpoint.path).partition("\n\n")
    names = PATH_PARAMETER.findall(endpoint.path)
    content: dict[str, Any] = {}
    if endpoint.answer is not None:
        content["application/json"] = {"schema": _reference(endpoint.answer)}
    meaning = "Done."
    if endpoint.event is not None:
        content["text/event-stream"] = {"schema": _reference(endpoint.event)}
        meaning = (
            "Done. In a stream each event is `event: ` with its type and `data: ` with such an object."
            if endpoint.named_events
            else "Done. In a stream each event is `data: ` with such a chunk; the last one is `data: [DONE]`."
        )
    responses: dict[str, Any] = {"200": {"description": meaning, **({"content": content} if content else {})}}
    operation: dict[str, Any] = {
        "summary": " ".join(summary.split()),
        "operationId": "_".join(
            (method.lower(), *re.findall(r"\w+", PATH_PARAMETER.sub(r"\1", endpoint.path)))
        ),
        "responses": responses,
    }
    if description.strip():
        operation["description"] = description.strip()
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in endpoint.query.items()]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        body = {"application/json": {"schema": _reference(endpoint.body.__name__)}}
        operation["requestBody"] = {"required": True, "content": body}
        for status, meaning in answers.FAILURES.items():
            name = "AnthropicErrorResponse" if is_anthropic(endpoint.path) else "ErrorResponse"
            error = {"application/json": {"schema": _reference(name)}}
            responses[status] = {"description": meaning, "content": error}
    if guarded:
        operation["security"] = [{"key": []}]
        responses["401"] = {"description": "The key is missing or wrong."}
    return operation


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
