"""The OpenAPI 3.1 document of the server, made of its routes and of the tables that bodies are read with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import microvllm
from microvllm.openai_compat.api import answers
from microvllm.openai_compat.api.descriptions import DESCRIPTIONS
from microvllm.openai_compat.api.endpoint import Endpoint
from microvllm.openai_compat.api.fields import Fate, JsonSchema, Parser, Table, or_null
from microvllm.openai_compat.api.schemas import TOKENIZE, stop_strings
from microvllm.openai_compat.config import ServerArgs

# vLLM's names of the two forms of a body, and the field that each needs.
FORMS = {"TokenizeCompletionRequest": "prompt", "TokenizeChatRequest": "messages"}
PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")  # as Starlette writes it: {model:path}
NOTHING: tuple[Any, ...] = (None, "", [], {})  # defaults that only say that nothing was given


def build_document(endpoints: Iterable[Endpoint], args: ServerArgs) -> dict[str, Any]:
    """Returns the document of a server with these options: its endpoints, except undocumented ones."""
    with_keys = bool(args.api_keys)
    limits = {"stop": stop_strings(args.max_stop_strings)}
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {}
    for endpoint in endpoints:
        if endpoint.documented and endpoint.is_on(args):
            operations = paths.setdefault(PATH_PARAMETER.sub(r"{\1}", endpoint.path), {})
            for method in sorted(endpoint.methods):
                operations[method.lower()] = _operation(endpoint, method, with_keys and endpoint.needs_key)
            if endpoint.body is not None:
                schemas[endpoint.body.name] = request_schema(endpoint.body.fields, limits)
    for form, needed in FORMS.items():
        rows = TOKENIZE.without(*(set(FORMS.values()) - {needed}))
        schemas[form] = {**request_schema(rows), "required": [needed]}
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


def request_schema(rows: Table, limits: Mapping[str, Parser[Any]] | None = None) -> dict[str, Any]:
    """The schema of a request body: what is honoured, what is ignored, what is refused.

    `limits` has the fields that this server bounds more tightly than the table.
    """
    properties: dict[str, JsonSchema] = {}
    for row in rows.values():
        if row.parse is not None:
            schema = (limits or {}).get(row.name, row.parse).schema
            schema = schema if row.required else or_null(schema)
            default = {} if row.default in NOTHING else {"default": row.default}
            need = f"Only with {row.only_with[0]}: {row.only_with[1]}." if row.only_with else ""
            description = " ".join(filter(None, (DESCRIPTIONS.get(row.name), need)))
            properties[row.name] = {**schema, **default, "description": description}
        elif row.fate is Fate.IGNORED:
            properties[row.name] = {"description": "Accepted and ignored."}
        else:
            properties[row.name] = {
                "enum": [None, *row.harmless],
                "description": "Not supported: any other value is answered 400.",
            }
    required = [row.name for row in rows.values() if row.required]
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


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
            "Done. In a stream each event is `data: ` with such a chunk; the last one is `data: [DONE]`."
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
        body = {"application/json": {"schema": _reference(endpoint.body.name)}}
        operation["requestBody"] = {"required": True, "content": body}
        for status, meaning in answers.FAILURES.items():
            error = {"application/json": {"schema": _reference("ErrorResponse")}}
            responses[status] = {"description": meaning, "content": error}
    if guarded:
        operation["security"] = [{"key": []}]
        responses["401"] = {"description": "The key is missing or wrong."}
    return operation


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
