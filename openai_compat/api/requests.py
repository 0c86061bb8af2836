"""Defines the request bodies of the API as msgspec structs.

Every field that OpenAI or vLLM 0.33 defines has one of three states: it is honoured (an attribute of the
struct), ignored on purpose (`ignored`), or refused with a 400 that names it as soon as its value requests
something (`refused`). A name that is in none of them is ignored, as in vLLM.

`reading.py` reads them, and the OpenAPI document is derived from them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType, inspect

from microvllm.runtime import request as parameters
from microvllm.runtime.request import INT64_MAX, Int64, TokenId

MAX_SALT_CHARS = 128
MAX_TOOLS = 1024
FORM_FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_choice", "guided_grammar")
MAX_STOP_STRINGS = 1024  # that --max-stop-strings may allow
MAX_ALLOWED_TOKEN_IDS = 1 << 18  # as many as the largest vocabularies have
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: tuple[str, ...] = get_args(Effort)
# A template variable may steer the template, never the rendering: names such as `tokenize` or
# `chat_template` would reach into it (CVE-2025-62426).
TemplateVariable = Literal["enable_thinking", "thinking", "date_string"]
END = r"(?![\s\S])"  # the end of the text in Python's dialect and in JavaScript's: `$` allows a newline
# A client's own id is echoed in headers, logs and bodies, so its characters must be harmless there.
RequestId = Annotated[
    str,
    Meta(
        pattern=rf"^[A-Za-z0-9._-]{{1,128}}{END}",
        extra={"problem": "Input should be 1 to 128 letters, digits, '.', '_' or '-'"},
    ),
]
CacheSalt = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_SALT_CHARS,
        pattern=rf"^[^@/\\\x00-\x1f\x7f]*{END}",
        extra={
            "problem": f"Input should be 1 to {MAX_SALT_CHARS} characters, "
            "none of '@', '/', '\\' or control characters"
        },
    ),
]
NonEmpty = Annotated[str, Meta(min_length=1)]
# Nothing that ends a name in one of the formats in which models write calls.
FunctionName = Annotated[
    str,
    Meta(
        pattern=rf"^[^\s\x00-\x1f\x7f\"'`<>{{}}()\[\]=,|\\]{{1,128}}{END}",
        extra={
            "problem": "Input should be 1 to 128 characters, no spaces, quotes, brackets or any of <>=,|\\"
        },
    ),
]
# What the endpoints check themselves, because the bounds are theirs.
_TOKEN = {"type": "integer", "minimum": 0}
TOKENS = {"type": "array", "items": _TOKEN, "minItems": 1}
TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}
TOKEN_LISTS = {"type": "array", "items": TOKENS, "minItems": 1}
Prompt = Annotated[Any, Meta(extra_json_schema={"anyOf": [TEXT, TOKENS, TEXTS, TOKEN_LISTS]})]
_CONTENT = [
    {"type": "string"},
    {"type": "array", "items": {"type": ["object", "string"]}},
    {"type": "null"},
]
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": {"anyOf": _CONTENT}},
    "required": ["role"],
}
Messages = Annotated[list[Any], Meta(extra_json_schema={"items": _MESSAGE})]
TemplateValue = Annotated[
    Annotated[str, Meta(max_length=256)] | bool,
    Meta(extra={"problem": "Input should be a boolean or a string of at most 256 characters"}),
]
TemplateKwargs = Annotated[
    dict[TemplateVariable, TemplateValue],
    Meta(extra_json_schema={"propertyNames": {"enum": list(get_args(TemplateVariable))}}),
]


# Whether it is a schema is checked where it is compiled.
Schema = Annotated[Any, Meta(extra_json_schema={"anyOf": [{"type": "object"}, {"type": "boolean"}]})]
SchemaOrText = Annotated[Any, Meta(extra_json_schema={"anyOf": [{"type": "object"}, {"type": "string"}]})]


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options`: which chunks carry the usage. There is no obfuscation, which may not be wanted."""

    include_usage: bool = False
    continuous_usage_stats: bool | UnsetType = UNSET
    include_obfuscation: bool = False


class Function(msgspec.Struct, kw_only=True):
    """A function as vLLM shows it to the chat template: null where it has no description or parameters."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | UnsetType = UNSET
    defer_loading: bool | UnsetType = UNSET


class Tool(msgspec.Struct, kw_only=True):
    """A tool of a chat request, which is a function. What `defer_loading` means is the chat template's."""

    hints: ClassVar[Mapping[str, str]] = {"function": ", an object with the name and the parameters"}

    type: Literal["function"] = "function"
    function: Function
    defer_loading: bool | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.function.defer_loading is UNSET:
            self.function.defer_loading = self.defer_loading


class NamedFunction(msgspec.Struct, kw_only=True):
    """The name of a function that may or must be called."""

    name: NonEmpty


class NamedTool(msgspec.Struct, kw_only=True):
    """A tool by its name."""

    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(msgspec.Struct, kw_only=True):
    """The tools that may be called, of those of the request, and whether one of them must be."""

    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class ToolChoice(msgspec.Struct, kw_only=True):
    """`tool_choice` as an object: the function that must be called, or the allowed tools."""

    type: Literal["function", "allowed_tools"] = "function"
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class JsonSchema(msgspec.Struct, kw_only=True):
    """The schema of a `response_format`, as OpenAI wraps it. It is enforced with `strict` and without."""

    name: str | None = None
    description: str | None = None
    schema: Schema = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """`response_format`: free text, a JSON object, JSON by a schema, or vLLM's structural tags."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: list[Any] | None = None
    triggers: list[Any] | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's `structured_outputs`: exactly one kind, and how JSON may be written."""

    json: SchemaOrText = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


class Body(msgspec.Struct, kw_only=True):
    """The base of all request bodies.

    `refused` maps each name to the values, beside null, that request nothing; `renamed` those among them that
    have another name here.
    """

    ignored: ClassVar[tuple[str, ...]] = ()
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    renamed: ClassVar[Mapping[str, str]] = {}


class GenerationRequest(Body, kw_only=True):
    """The fields that all endpoints that generate have in common."""

    ignored: ClassVar[tuple[str, ...]] = (
        # accounting, routing and storage hints that change no token
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "session_id", "guided_decoding_backend"),
        # parts of vLLM that a dense text model does not have
        *("watermarking", "return_weight_versions", "routed_experts_prompt_start", "return_token_offsets"),
        *("mm_payload", "return_mm_kwargs", "media_io_kwargs", "mm_processor_kwargs"),
    )
    # The error lists them in this order and names the first as its `param`: the weightiest come first.
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "logits_processors": ([],),
        "thinking_token_budget": (-1,),
        "vllm_xargs": ({},),
        "kv_transfer_params": ({},),
        "ec_transfer_params": ({},),
        "structural_tag": (),  # of vLLM before 0.12, beside `guided_*`
    }

    model: str | None = None
    # what to sample and how; `check_sampling` checks the ranges
    max_tokens: Int64 | None = None
    temperature: parameters.Temperature | None = None
    top_p: parameters.TopP | None = None
    top_k: parameters.TopK | None = None
    min_p: parameters.MinP | None = None
    n: parameters.NumSamples = 1
    seed: Int64 | None = None
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS)] = []
    stop_token_ids: parameters.StopTokenIds = []
    presence_penalty: parameters.Penalty | None = None
    frequency_penalty: parameters.Penalty | None = None
    repetition_penalty: parameters.RepetitionPenalty | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=parameters.MAX_LOGIT_BIAS)] = {}
    allowed_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_ALLOWED_TOKEN_IDS)] | None = None
    bad_words: Annotated[list[str], Meta(max_length=parameters.MAX_BAD_WORDS)] = []
    ignore_eos: bool = False
    min_tokens: parameters.Count = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool = True
    repetition_detection: parameters.RepetitionDetection | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    # the form of the output
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    # what to make of the prompt
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=INT64_MAX)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    # how to respond
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    stream_interval: Annotated[int, Meta(ge=1, le=INT64_MAX)] | None = None
    prompt_logprobs: Int64 | None = None
    logprob_token_ids: parameters.LogprobTokenIds | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool = False
    cache_salt: CacheSalt = ""
    priority: Int64 = 0
    request_id: RequestId | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def drop_prompt(self) -> None:
        """Free what the prompts were made of; it is not read any more."""
        for name in {"prompt", "messages", *FORM_FIELDS}.intersection(self.__struct_fields__):
            setattr(self, name, None)


class CompletionRequest(GenerationRequest, kw_only=True):
    """The body of /v1/completions."""

    refused = {
        "top_logprobs": (0,),
        "suffix": ("",),
        "prompt_embeds": (),
        **GenerationRequest.refused,
    }

    prompt: Prompt = None
    add_special_tokens: bool = True
    logprobs: Int64 | None = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """The body of /v1/chat/completions."""

    ignored = (
        *GenerationRequest.ignored,
        "prediction",
        "verbosity",
    )
    refused = {
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "moderation": (),
        "prompt_cache_options": ({}, {"mode": "implicit"}),
        "documents": ([],),
        "chat_template": (),
        **GenerationRequest.refused,
    }
    del refused["thinking_token_budget"]

    messages: Messages
    max_completion_tokens: Int64 | None = None
    add_special_tokens: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = {}
    reasoning_effort: Effort | None = None
    logprobs: bool = False
    top_logprobs: Int64 = 0
    return_prompt_text: bool = False
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    thinking_token_budget: Annotated[int, Meta(ge=-1, le=INT64_MAX)] | None = None


class PromptRequest(CompletionRequest, kw_only=True):
    """One prompt to continue. The refused fields have no place in the response and stay at their defaults."""

    refused = {
        **GenerationRequest.refused,
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

    prompt: NonEmpty


class PromptStreamRequest(PromptRequest, kw_only=True):
    """The body of /generate_stream: that of /generate, streamed unless it says otherwise."""

    stream: bool = True


class TokenizeRequest(Body, kw_only=True):
    """The body of /tokenize: a prompt or a conversation."""

    ignored = ("media_io_kwargs", "mm_processor_kwargs")
    refused = {"chat_template": ()}

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = {}
    return_token_strs: bool = False
    # what a conversation has at /v1/chat/completions only
    truncate_prompt_tokens: ClassVar[None] = None
    truncation_side: ClassVar[None] = None
    echo: ClassVar[bool] = False
    reasoning_effort: ClassVar[None] = None
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None


class DetokenizeRequest(Body, kw_only=True):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Any], Meta(extra_json_schema={"items": _TOKEN})]


class ProfileRequest(Body, kw_only=True):
    """The body of /start_profile."""

    refused = {"delay_iterations": (0,), "max_iterations": (0,), "profiler_kwargs": ({},)}

    profile_prefix: RequestId = ""


@functools.cache
def all_fields(kind: type[Body]) -> dict[str, inspect.Field]:
    """Return the struct's fields by their names."""
    struct = cast(inspect.StructType, inspect.type_info(kind))
    return {field.name: field for field in struct.fields}


def honoured_fields(kind: type[Body]) -> dict[str, inspect.Field]:
    """Return the fields that a body of this type may give, by their names."""
    return {name: field for name, field in all_fields(kind).items() if name not in kind.refused}


def is_harmless(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Return whether a value is null or one of the harmless ones."""
    if value is None:
        return True
    # bool is an int in Python, but `logprobs: false` and `logprobs: 0` request different things.
    return any(isinstance(value, bool) == isinstance(known, bool) and value == known for known in harmless)
