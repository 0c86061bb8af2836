"""The table of request fields of each endpoint: every field that OpenAI or vLLM 0.33 defines has its row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from microvllm.openai_compat.api.fields import (
    Parser,
    Table,
    anything,
    array,
    array_of,
    boolean,
    choice,
    honoured,
    ignored,
    integer,
    map_of,
    mapping,
    number,
    one_or_many,
    parser,
    record,
    refused,
    string,
    table,
    token_ids,
)
from microvllm.openai_compat.errors import Fault
from microvllm.runtime.request import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_N,
    MAX_STOP_TOKEN_IDS,
)

MAX_SALT_CHARS = 128
MAX_TOOLS = 1024
MAX_STOP_STRINGS = 1024  # that --max-stop-strings may allow
MAX_ALLOWED_TOKEN_IDS = 1 << 18  # as many as the largest vocabularies have
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_BAD_IN_SALT = re.compile(r"[@/\\\x00-\x1f\x7f]")
# A template variable may steer the template, never the rendering: names such as `tokenize` or
# `chat_template` would reach into it (CVE-2025-62426).
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
TEMPLATE_KWARGS = ("enable_thinking", "thinking", "date_string")


@parser(type="string", pattern=f"^(?:{_REQUEST_ID.pattern})$")
def request_id(value: Any) -> str:
    """A client's own id: it is echoed in headers, logs and bodies, so it must be safe there."""
    if not _REQUEST_ID.fullmatch(string(value)):
        raise Fault("string_pattern_mismatch", "Input should be 1 to 128 letters, digits, '.', '_' or '-'")
    return str(value)


@parser(type="string", minLength=1, maxLength=MAX_SALT_CHARS, pattern=r"^[^@/\\\x00-\x1f\x7f]*$")
def cache_salt(value: Any) -> str:
    text = string(value)
    if not 1 <= len(text) <= MAX_SALT_CHARS or _BAD_IN_SALT.search(text):
        raise Fault(
            "value_error",
            f"Input should be 1 to {MAX_SALT_CHARS} characters, none of '@', '/', '\\' or control characters",
        )
    return text


@parser(type="string", minLength=1)
def nonempty(value: Any) -> str:
    if string(value) == "":
        raise Fault("string_too_short", "Input should have at least 1 character")
    return str(value)


@parser(
    type="object",
    properties={name: {"type": ["boolean", "string"], "maxLength": 256} for name in TEMPLATE_KWARGS},
    additionalProperties=False,
)
def template_kwargs(value: Any) -> dict[str, bool | str]:
    kwargs = mapping(value)
    for name, item in kwargs.items():
        if name not in TEMPLATE_KWARGS:
            raise Fault("extra_forbidden", f"Only {', '.join(TEMPLATE_KWARGS)} are supported")
        if type(item) is not bool and not (type(item) is str and len(item) <= 256):
            raise Fault("value_error", f"{name} should be a boolean or a string of at most 256 characters")
    return kwargs


def stop_strings(max_items: int) -> Parser[list[str]]:
    """One stop string or a list of them; how many a server takes, `--max-stop-strings` decides."""
    return one_or_many(string, max_items)


_STREAM_OPTIONS = record(include_usage=boolean, continuous_usage_stats=boolean)


@parser(**_STREAM_OPTIONS.schema)
def stream_options(value: Any) -> dict[str, Any]:
    """Empty only if the client wrote `{}`: whatever else it wrote needs a stream, unknown options too."""
    known = _STREAM_OPTIONS(value)
    return {"include_usage": False, **known} if value else known


# What the endpoints check themselves, because the bounds are theirs.
_TOKEN = {"type": "integer", "minimum": 0}
_TOKENS = {"type": "array", "items": _TOKEN, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
PROMPT = anything.described(
    anyOf=[
        _TEXT,
        _TOKENS,
        {"type": "array", "items": _TEXT, "minItems": 1},
        {"type": "array", "items": _TOKENS, "minItems": 1},
    ]
)
MESSAGES = array.described(
    items={
        "type": "object",
        "properties": {
            "role": {"type": "string"},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": ["object", "string"]}},
                    {"type": "null"},
                ]
            },
        },
        "required": ["role"],
    }
)


_FUNCTION = record(name=nonempty, description=string, parameters=mapping, strict=boolean)


@parser(
    type="object",
    properties={
        "type": choice("function").schema,
        "function": {
            **_FUNCTION.schema,
            "properties": {**_FUNCTION.schema["properties"], "name": nonempty.schema},
            "required": ["name"],
        },
    },
    required=["function"],
)
def _tool(value: Any) -> dict[str, Any]:
    """A tool as vLLM hands it to the chat template: null where there is no description or no parameters."""
    if mapping(value).get("type", "function") != "function":
        raise Fault("literal_error", "type: Input should be 'function'")
    if "function" not in value:
        raise Fault("missing", "function: Field required")
    function = _FUNCTION(value["function"])
    if "name" not in function:
        raise Fault("missing", "function.name: Field required")
    shown = {name: function.get(name) for name in ("name", "description", "parameters")}
    return {"type": "function", "function": {**shown, **function}}


_TOOL_LIST = array_of(_tool, MAX_TOOLS)


@parser(**_TOOL_LIST.schema, minItems=1)
def tools(value: Any) -> list[dict[str, Any]]:
    """The tools that the chat template shows; an empty list is refused, as in vLLM and in OpenAI's API."""
    found = _TOOL_LIST(value)
    if not found:
        raise Fault("too_short", "List should have at least 1 item")
    return found


_COMMON = (
    # honoured: what to sample and how
    honoured("model", string),
    honoured("max_tokens", integer()),
    honoured("temperature", number.described(minimum=0, maximum=2)),
    honoured("top_p", number.described(exclusiveMinimum=0, maximum=1)),
    honoured("top_k", integer().described(minimum=-1)),
    honoured("min_p", number.described(minimum=0, maximum=1)),
    honoured("n", integer().described(minimum=1, maximum=MAX_N), 1),
    honoured("seed", integer()),
    honoured("stop", stop_strings(MAX_STOP_STRINGS), []),
    honoured("stop_token_ids", token_ids(MAX_STOP_TOKEN_IDS), []),
    honoured("presence_penalty", number.described(minimum=-2, maximum=2)),
    honoured("frequency_penalty", number.described(minimum=-2, maximum=2)),
    honoured("repetition_penalty", number.described(exclusiveMinimum=0)),
    honoured("logit_bias", map_of(number, MAX_LOGIT_BIAS), {}),
    honoured("allowed_token_ids", token_ids(MAX_ALLOWED_TOKEN_IDS)),
    honoured("bad_words", array_of(string, MAX_BAD_WORDS), []),
    honoured("ignore_eos", boolean, False),
    honoured("min_tokens", integer().described(minimum=0), 0),
    honoured("include_stop_str_in_output", boolean, False),
    honoured("skip_special_tokens", boolean, True),
    honoured("spaces_between_special_tokens", boolean, True),
    honoured(
        "repetition_detection",
        record(max_pattern_size=integer(), min_pattern_size=integer(), min_count=integer()),
    ),
    honoured("use_beam_search", boolean, False),
    honoured("length_penalty", number, 1.0),
    # honoured: what to make of the prompt
    honoured("truncate_prompt_tokens", integer(low=-1)),
    honoured("truncation_side", choice("left", "right")),
    # honoured: how to answer
    honoured("stream", boolean, False),
    honoured("stream_options", stream_options),
    honoured("echo", boolean, False),
    honoured("stream_interval", integer(low=1)),
    honoured("prompt_logprobs", integer()),
    honoured("logprob_token_ids", token_ids(MAX_LOGPROB_TOKEN_IDS)),
    honoured("return_tokens_as_token_ids", boolean),
    honoured("return_token_ids", boolean, False),
    honoured("cache_salt", cache_salt, ""),
    honoured("priority", integer(), 0),
    honoured("request_id", request_id),
    # ignored on purpose: accounting, routing and storage hints that change no token
    ignored("user"),
    ignored("metadata"),
    ignored("store"),
    ignored("service_tier"),
    ignored("safety_identifier"),
    ignored("prompt_cache_key"),
    ignored("prompt_cache_retention"),
    ignored("session_id"),
    # ignored on purpose: parts of vLLM that a dense text model does not have
    ignored("watermarking"),
    ignored("return_weight_versions"),
    ignored("routed_experts_prompt_start"),
    ignored("return_token_offsets"),
    ignored("mm_payload"),
    ignored("return_mm_kwargs"),
    ignored("media_io_kwargs"),
    ignored("mm_processor_kwargs"),
)
# Refused, with the values that ask for nothing; what a request asks for most comes first in the error.
_REFUSED = (
    refused("response_format", {"type": "text"}),
    refused("structured_outputs"),
    refused("guided_json"),
    refused("guided_regex", ""),
    refused("guided_choice", []),
    refused("guided_grammar", ""),
    refused("best_of", 1),
    refused("logits_processors", []),
    refused("thinking_token_budget"),
    refused("vllm_xargs", {}),
    refused("kv_transfer_params", {}),
    refused("ec_transfer_params", {}),
)

COMPLETIONS = table(
    *_COMMON,
    honoured("prompt", PROMPT),
    honoured("add_special_tokens", boolean, True),
    honoured("logprobs", integer()),
    refused("top_logprobs", 0),
    refused("suffix", ""),
    refused("prompt_embeds"),
    *_REFUSED,
)

CHAT = table(
    *_COMMON,
    honoured("messages", MESSAGES, required=True),
    honoured("max_completion_tokens", integer()),
    honoured("add_special_tokens", boolean, False),
    honoured("add_generation_prompt", boolean),
    honoured("continue_final_message", boolean, False),
    honoured("chat_template_kwargs", template_kwargs, {}),
    honoured("reasoning_effort", choice(*EFFORTS)),
    honoured("logprobs", boolean, False),
    honoured("top_logprobs", integer(), 0),
    honoured("return_prompt_text", boolean, False),
    ignored("prediction"),
    ignored("include_reasoning"),  # there is no reasoning parser, so there is nothing to leave out
    ignored("parallel_tool_calls"),  # without tool calls it has no meaning
    ignored("verbosity"),
    # Shown to the template; without this choice the model's calls would have to be parsed.
    honoured("tools", tools, only_with=("tool_choice", "none")),
    refused("tool_choice", "none"),
    refused("functions", []),
    refused("function_call", "none"),
    refused("modalities", ["text"]),
    refused("audio"),
    refused("web_search_options"),
    refused("documents", []),
    refused("chat_template"),
    *_REFUSED,
)

# What an answer that is one text and nothing about it has no place for, and the values that ask for nothing.
_NOT_FOR_ONE_TEXT: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "return_tokens_as_token_ids": (False,),
    "suffix": ("",),
    "prompt_embeds": (),
}


def _one_text(*, stream: bool) -> Table:
    """The rows of an endpoint that continues one prompt; `stream` is what is done unless a body says it."""
    return table(
        *(row for row in (*_COMMON, *_REFUSED) if row.name not in {"stream", *_NOT_FOR_ONE_TEXT}),
        honoured("prompt", nonempty, required=True),
        honoured("add_special_tokens", boolean, True),
        honoured("stream", boolean, stream),
        *(refused(name, *harmless) for name, harmless in _NOT_FOR_ONE_TEXT.items()),
    )


GENERATE = _one_text(stream=False)
GENERATE_STREAM = _one_text(stream=True)

TOKENIZE = table(
    honoured("model", string),
    honoured("prompt", string),
    honoured("messages", MESSAGES),
    honoured("add_special_tokens", boolean),
    honoured("add_generation_prompt", boolean),
    honoured("continue_final_message", boolean, False),
    honoured("chat_template_kwargs", template_kwargs, {}),
    honoured("return_token_strs", boolean, False),
    ignored("media_io_kwargs"),
    ignored("mm_processor_kwargs"),
    honoured("tools", tools),
    refused("chat_template"),
)

DETOKENIZE = table(
    honoured("model", string),
    honoured("tokens", array.described(items=_TOKEN), required=True),
)

PROFILE = table(
    honoured("profile_prefix", request_id, ""),
    refused("delay_iterations", 0),
    refused("max_iterations", 0),
    refused("profiler_kwargs", {}),
)
