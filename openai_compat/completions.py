"""POST /v1/completions: text (or token ids) in, text out, whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from microvllm.openai_compat.body import read_object
from microvllm.openai_compat.completion_chunks import CompletionChunks
from microvllm.openai_compat.errors import Fault, shape_error
from microvllm.openai_compat.fields import parse_fields
from microvllm.openai_compat.generation import Generation, begin, priority_of, usage
from microvllm.openai_compat.sampling import sampling_params
from microvllm.openai_compat.schemas import COMPLETIONS
from microvllm.openai_compat.sse import EventStream, StreamOptions, event_chunks
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import ContextLengthError, InvalidRequestError
from microvllm.runtime.output import TextDelta

if TYPE_CHECKING:
    from microvllm.runtime.client import EngineClient

MAX_PROMPTS = 1024
MAX_SEQUENCES = 4096  # prompts times n
# Of all sequences together: each one's prompt travels to the engine, and `return_token_ids` repeats it.
MAX_PROMPT_TOKENS = 1 << 20
DEFAULT_MAX_TOKENS = 16


async def create_completion(request: Request) -> Response:
    state: ServerState = request.app.state.server
    fields = parse_fields(COMPLETIONS, await read_object(request, state))
    generation = begin(request, fields, state, "cmpl")
    max_tokens = DEFAULT_MAX_TOKENS if fields["max_tokens"] is None else fields["max_tokens"]
    echo_only = max_tokens == 0 and fields["echo"]
    params = sampling_params(
        fields, state.client, max_tokens=1 if echo_only else max_tokens, max_tokens_field="max_tokens"
    )
    priority = priority_of(request, fields)
    prompts = split_prompts(fields["prompt"], state.client.config.max_model_len)
    if len(prompts) * params.n > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{len(prompts)} prompts with n={params.n} are more than {MAX_SEQUENCES} sequences.", "n"
        )
    check_total(sum(len(prompt) for prompt in prompts if type(prompt) is list), params.n)
    ids = await state.client.run_blocking(_tokenize, state.client, prompts, fields["add_special_tokens"])
    check_total(sum(map(len, ids)), params.n)
    echoes = [""] * (len(prompts) * params.n)
    if fields["echo"]:
        texts = await state.client.run_blocking(_texts, state.client, prompts)
        echoes = [text for text in texts for _ in range(params.n)]
    if echo_only:
        generation.n = params.n
        generation.streams = [PromptOnly(prompt) for prompt in ids for _ in range(params.n)]
    else:
        await generation.submit(state, ids, params, fields, priority)
    if fields["stream"]:
        writer = CompletionChunks(generation, echoes, fields["return_token_ids"])
        options = StreamOptions.of(fields, state.args)
        events = event_chunks(generation, writer, options, state.args.enable_prompt_tokens_details)
        return EventStream(generation, events, state.lifecycle)
    try:
        body = await state.lifecycle.run(_answer(generation, state, fields, echoes), request.receive)
    finally:
        generation.abort()
    return Response(body, media_type="application/json")


def split_prompts(value: Any, max_model_len: int) -> list[str | list[int]]:
    """The prompts of a request: a text, a list of texts, a list of ids or a list of lists of ids.

    Only their number and lengths are checked here; `_tokenize` looks at the ids. Raises
    `InvalidRequestError` naming `prompt`, `ContextLengthError` for ids beyond the context.
    """
    if isinstance(value, list) and value and type(value[0]) is not int:
        if len(value) > MAX_PROMPTS:
            raise InvalidRequestError(
                f"prompt has {len(value)} entries, the limit is {MAX_PROMPTS}.", "prompt"
            )
        kinds = {type(item) for item in value}
        if kinds != {str} and kinds != {list}:
            raise _prompt_shape()
        prompts = value
    else:
        prompts = [value]
    for prompt in prompts:
        if prompt is None or prompt in ("", []):
            raise InvalidRequestError(
                "Either prompt or prompt_embeds must be provided and non-empty.", "prompt"
            )
        if type(prompt) is str:
            continue
        if type(prompt) is not list:
            raise _prompt_shape()
        if len(prompt) > max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
                f"contains {len(prompt)} input tokens, which exceeds this limit even without any output "
                "tokens. Please reduce the length of the input prompt.",
                "input_tokens",
            )
    return prompts


def check_total(tokens: int, n: int) -> None:
    """Raises `InvalidRequestError` if the prompts of one request have too many tokens together."""
    if tokens * n > MAX_PROMPT_TOKENS:
        raise InvalidRequestError(
            f"The prompts with n={n} have more than {MAX_PROMPT_TOKENS} tokens together.", "n"
        )


def _check_ids(ids: list[Any]) -> None:
    if set(map(type, ids)) != {int}:
        raise _prompt_shape()
    if min(ids) < 0:
        fault = Fault("greater_than_equal", "Token ids should be greater than or equal to 0")
        raise shape_error([("body.prompt", fault)])


def _prompt_shape() -> InvalidRequestError:
    fault = Fault(
        "prompt_type", "Input should be a string, a list of strings, token ids or lists of token ids"
    )
    return shape_error([("body.prompt", fault)])


def _tokenize(
    client: EngineClient, prompts: Sequence[str | list[int]], add_special_tokens: bool
) -> list[list[int]]:
    """The checked ids of every prompt; runs in a worker thread."""
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = client.processor.tokenize_prompt(prompt, add_special_tokens)
        else:
            _check_ids(prompt)
            ids = prompt
        client.processor.check_prompt(ids)
        found.append(ids)
    return found


def _texts(client: EngineClient, prompts: Sequence[str | list[int]]) -> list[str]:
    """The prompts as text, for `echo`; runs in a worker thread."""
    return [
        prompt if isinstance(prompt, str) else client.tokenizer.decode(prompt, skip_special_tokens=False)
        for prompt in prompts
    ]


class PromptOnly:
    """Stands in for a token stream when nothing is to be generated: `echo` with `max_tokens` 0."""

    num_cached_tokens = 0

    def __init__(self, prompt_token_ids: list[int]) -> None:
        self.prompt_token_ids = prompt_token_ids

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        yield TextDelta(token_ids=[], text="", finish_reason="length", stop_reason=None)

    def abort(self) -> None:
        pass


async def _answer(
    generation: Generation, state: ServerState, fields: Mapping[str, Any], echoes: list[str]
) -> bytes:
    """The JSON body of a whole answer; members and their order are vLLM's, nulls included."""
    with_ids = fields["return_token_ids"]
    choices, completion_tokens = [], 0
    for index, outcome in enumerate(await generation.collect()):
        completion_tokens += len(outcome.token_ids)
        choices.append(
            {
                "index": index,
                "text": echoes[index] + outcome.text,
                "logprobs": None,
                "finish_reason": outcome.finish_reason,
                "stop_reason": outcome.stop_reason,
                "token_ids": outcome.token_ids if with_ids else None,
                "prompt_logprobs": None,
                "prompt_token_ids": generation.streams[index].prompt_token_ids if with_ids else None,
                "routed_experts": None,
                "weight_versions": None,
            }
        )
    cached = generation.cached_tokens if state.args.enable_prompt_tokens_details else None
    return orjson.dumps(
        {
            "id": generation.id,
            "object": "text_completion",
            "created": generation.created,
            "model": generation.model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": state.fingerprint,
            "usage": usage(generation.prompt_tokens, completion_tokens, cached),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
    )
