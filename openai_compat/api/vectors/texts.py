"""Runs every request for vectors, from its checked body to the vectors: embeddings, scores and rerankings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request

from microvllm.openai_compat.api.generation import check_model, id_suffix, request_priority, request_rank
from microvllm.openai_compat.api.prompts import MAX_PROMPT_TOKENS, Truncation
from microvllm.openai_compat.api.request_log import log_end, log_start
from microvllm.openai_compat.api.usage import usage
from microvllm.openai_compat.api.vectors.requests import VectorRequest
from microvllm.openai_compat.errors import Fault, shape_error
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.vectors import POOLING_PARAMS, VectorForm

if TYPE_CHECKING:
    from microvllm.runtime.process.client import EngineClient
    from microvllm.runtime.process.token_stream import TokenStream

MAX_INPUTS = 2048  # as many as OpenAI takes


async def make_vectors(
    request: Request,
    state: ServerState,
    body: VectorRequest,
    prefix: str,
    read: Callable[[], list[list[int]]],
    *,
    dimensions: int | None = None,
    renders: bool = False,
) -> tuple[str, list[np.ndarray], dict[str, Any]]:
    """Return the id of the response, a vector for each text, [size] float32, and the usage.

    `read` returns the checked token ids of the texts; it runs in a worker thread, of those for chat templates
    if it `renders`. A client that leaves, or a text that fails, ends the others.
    """
    client = state.client
    if not state.args.skip_model_name_validation:
        check_model(body.model, state)
    form = VectorForm.of(client.config.spec, dimensions, body.use_activation)
    client.check_room()
    name = f"{prefix}-{id_suffix(request, body)}"
    options: dict[str, Any] = {"priority": request_priority(request, body), "cache_salt": body.cache_salt}
    if (rank := request_rank(request, state)) is not None:
        options["rank"] = rank
    prompts = await (client.run_rendering if renders else client.run_blocking)(read)
    if state.args.enable_log_requests:
        log_start(name, prompts, POOLING_PARAMS)
    streams = await client.submit_all(prompts, POOLING_PARAMS, **options)
    num_tokens = sum(map(len, prompts))
    for stream in streams:
        stream.name = name
    try:
        with state.lifecycle.interruptible(request.scope):
            vectors = await _read_all(streams, form)
    finally:
        for stream in streams:
            stream.abort()
        log_end(name, streams, num_tokens)
    cached = None
    if state.args.enable_prompt_tokens_details:
        cached = sum(stream.num_cached_tokens for stream in streams)
    return name, vectors, usage(num_tokens, 0, cached)


async def _read_all(streams: Sequence[TokenStream], form: VectorForm) -> list[np.ndarray]:
    found = []
    for stream in streams:
        async for _ in stream:  # one delta, without a token
            pass
        found.append(form.read(stream.pooled))
    return found


def split_inputs(value: Any, field: str) -> list[Any]:
    """Return the entries of a text, a list of texts, a list of ids or a list of lists of ids.

    Only their number and types are checked here. Raises `InvalidRequestError` naming the field.
    """
    entries = value if isinstance(value, list) and not (value and type(value[0]) is int) else [value]
    if len(entries) > MAX_INPUTS:
        raise InvalidRequestError(f"{field} has {len(entries)} entries, the limit is {MAX_INPUTS}.", field)
    kinds = {type(entry) for entry in entries}
    if entries and kinds != {str} and kinds != {list}:
        fault = Fault("Input should be a string, a list of strings, token ids or lists of token ids")
        raise shape_error([(f"body.{field}", fault)])
    if not all(entries) or not entries:
        at = next((f"[{i}]" for i, entry in enumerate(entries) if not entry and entries != [value]), "")
        raise InvalidRequestError(f"{field}{at} must not be empty.", field)
    return entries


def tokenize_inputs(
    client: EngineClient,
    entries: Sequence[Any],
    field: str,
    add_special_tokens: bool,
    truncation: Truncation | None,
) -> list[list[int]]:
    """Return the checked ids of entries of `split_inputs`; runs in a worker thread."""
    found = []
    for entry in entries:
        if isinstance(entry, str):
            ids = _tokenize(client, entry, add_special_tokens, truncation)
        elif set(map(type, entry)) != {int}:
            raise shape_error([(f"body.{field}", Fault("Token ids should be integers"))])
        else:
            ids = entry
        found.append(check_input(client, ids, field, truncation))
    check_total(found, field)
    return found


def check_input(client: EngineClient, ids: list[int], field: str, truncation: Truncation | None) -> list[int]:
    """Return ids of one text, cut where truncation is requested. Raises `InvalidRequestError`."""
    if truncation is not None and len(ids) > truncation.limit:
        ids = ids[-truncation.limit :] if truncation.side == "left" else ids[: truncation.limit]
    client.processor.check_prompt(ids, field)
    return ids


def check_total(prompts: Sequence[Sequence[int]], field: str) -> None:
    """Raise `InvalidRequestError` if the texts of one request have too many tokens together."""
    if sum(map(len, prompts)) > MAX_PROMPT_TOKENS:
        raise InvalidRequestError(f"{field} has more than {MAX_PROMPT_TOKENS} tokens together.", field)


def _tokenize(
    client: EngineClient, text: str, add_special_tokens: bool, truncation: Truncation | None
) -> list[int]:
    """Tokenise a text. What is cut of it leaves the special tokens around it, unless a side is named."""
    processor = client.processor
    if truncation is None:
        return processor.tokenize_prompt(text, add_special_tokens)
    text = truncation.cut_text(text, processor.max_chars) if truncation.side else text[: processor.max_chars]
    ids = processor.tokenize_prompt(text, add_special_tokens)
    if len(ids) <= truncation.limit or truncation.side or not add_special_tokens:
        return ids
    bare = processor.tokenize_prompt(text, False)
    around = len(ids) - len(bare)
    if around >= truncation.limit:
        return ids
    front = next((at for at in range(around + 1) if ids[at : at + len(bare)] == bare), around)
    kept = bare[: truncation.limit - around]
    return [*ids[:front], *kept, *ids[front + len(bare) :]]
