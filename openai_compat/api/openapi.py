"""The OpenAPI 3.1 document of the server, made of its routes and of the tables that bodies are read with."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.routing import BaseRoute, Route

import microvllm
from microvllm.openai_compat.api import answers
from microvllm.openai_compat.api.descriptions import DESCRIPTIONS
from microvllm.openai_compat.api.fields import Fate, JsonSchema, Parser, Table, or_null
from microvllm.openai_compat.api.schemas import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    GENERATE,
    GENERATE_STREAM,
    TOKENIZE,
    stop_strings,
)
from microvllm.openai_compat.config import ServerArgs
from microvllm.openai_compat.transport.middleware import OPEN_PATHS

# The endpoints that take a body: the name of its schema, and its table.
BODIES: Mapping[str, tuple[str, Table]] = {
    "/v1/completions": ("CompletionRequest", COMPLETIONS),
    "/v1/chat/completions": ("ChatCompletionRequest", CHAT),
    "/v1/completions/render": ("CompletionRequest", COMPLETIONS),
    "/v1/chat/completions/render": ("ChatCompletionRequest", CHAT),
    "/generate": ("PromptRequest", GENERATE),
    "/generate_stream": ("PromptStreamRequest", GENERATE_STREAM),
    "/tokenize": ("TokenizeRequest", TOKENIZE),
    "/detokenize": ("DetokenizeRequest", DETOKENIZE),
}
# vLLM's names of the two forms of a body, and the field that each needs.
FORMS = {"TokenizeCompletionRequest": "prompt", "TokenizeChatRequest": "messages"}
NOTHING: tuple[Any, ...] = (None, "", [], {})  # defaults that only say that nothing was given
PARAMETERS: Mapping[str, Mapping[str, JsonSchema]] = {
    "/server_info": {"config_format": {"enum": ["text", "json"], "default": "text"}},
    "/reset_prefix_cache": {
        "reset_running_requests": {"type": "boolean", "default": False},
        "reset_external": {"type": "boolean", "default": False},
    },
}


def build_document(routes: Iterable[BaseRoute], args: ServerArgs) -> dict[str, Any]:
    """Returns the document of a server with these routes; those without `include_in_schema` are left out."""
    with_keys = bool(args.api_keys)
    limits = {"stop": stop_strings(args.max_stop_strings)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if isinstance(route, Route) and route.include_in_schema:
            for method in sorted((route.methods or set()) - {"HEAD"}):
                operation = _operation(route, method, with_keys and route.path not in OPEN_PATHS)
                paths.setdefault(route.path_format, {})[method.lower()] = operation
    schemas = {name: request_schema(rows, limits) for path, (name, rows) in BODIES.items() if path in paths}
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


def _operation(route: Route, method: str, guarded: bool) -> dict[str, Any]:
    """One method of one path. What the endpoint's docstring says is what the document says."""
    path = route.path_format
    summary, _, description = (inspect.getdoc(route.endpoint) or path).partition("\n\n")
    content: dict[str, Any] = {}
    if path in answers.OF_PATH:
        content["application/json"] = {"schema": _reference(answers.OF_PATH[path])}
    meaning = "Done."
    if path in answers.OF_STREAM:
        content["text/event-stream"] = {"schema": _reference(answers.OF_STREAM[path])}
        meaning = (
            "Done. In a stream each event is `data: ` with such a chunk; the last one is `data: [DONE]`."
        )
    responses: dict[str, Any] = {"200": {"description": meaning, **({"content": content} if content else {})}}
    operation: dict[str, Any] = {
        "summary": " ".join(summary.split()),
        "operationId": "_".join((method.lower(), *re.findall(r"\w+", path))),
        "responses": responses,
    }
    if description.strip():
        operation["description"] = description.strip()
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in route.param_convertors
    ]
    parameters += [
        {"name": name, "in": "query", "schema": schema} for name, schema in PARAMETERS.get(path, {}).items()
    ]
    if parameters:
        operation["parameters"] = parameters
    if path in BODIES:
        body = {"application/json": {"schema": _reference(BODIES[path][0])}}
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
