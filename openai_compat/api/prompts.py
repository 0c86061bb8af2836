"""Turns the prompts of a request, texts or lists of ids, into checked token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from microvllm.openai_compat.errors import Fault, shape_error
from microvllm.runtime.errors import ContextLengthError, InvalidRequestError

if TYPE_CHECKING:
    from microvllm.openai_compat.api.requests import GenerationRequest, TokenizeRequest
    from microvllm.openai_compat.api.vectors.requests import VectorRequest
    from microvllm.runtime.process.client import EngineClient

MAX_PROMPTS = 1024
# Over all sequences: each sequence's prompt is sent to the engine, and `return_token_ids` repeats it.
MAX_PROMPT_TOKENS = 1 << 20


@dataclass(frozen=True)
class Truncation:
    """`truncate_prompt_tokens`: at most `limit` tokens, the first ones if `side` is "right", else the last.

    As in vLLM, the tokens that the tokenizer puts before a text (BOS) are kept unless a side was requested.
    """

    limit: int
    side: str | None = None

    @classmethod
    def of(
        cls, body: GenerationRequest | TokenizeRequest | VectorRequest, max_model_len: int, room: int = 1
    ) -> Truncation | None:
        """Return the requested truncation, or None. -1 leaves room for so many tokens of output."""
        limit = body.truncate_prompt_tokens
        if limit is None:
            return None
        if limit == 0 or limit > max_model_len:
            problem = "must be -1 or at least 1" if limit == 0 else "cannot be greater than max_model_len"
            raise InvalidRequestError(
                f"truncate_prompt_tokens={limit} {problem} (max_model_len={max_model_len}). "
                "Please request another truncation size.",
                "truncate_prompt_tokens",
            )
        return cls(max(1, max_model_len - room) if limit == -1 else limit, body.truncation_side)

    def cut(self, ids: list[int], kept: Sequence[int] = ()) -> list[int]:
        """Cut `ids` to the limit; `kept` stays at their front if they are cut there."""
        if len(ids) <= self.limit:
            return ids
        if self.side == "right":
            return ids[: self.limit]
        if self.side is None and len(kept) < self.limit and ids[: len(kept)] == list(kept):
            return [*kept, *ids[len(ids) - self.limit + len(kept) :]]
        return ids[-self.limit :]

    def cut_text(self, text: str, max_chars: int) -> str:
        """Cut a text that is too long to be tokenised on the side where its tokens would be cut."""
        return text[:max_chars] if self.side == "right" else text[-max_chars:]


def tokenize_text(
    client: EngineClient, text: str, add_special_tokens: bool, truncation: Truncation | None
) -> list[int]:
    """Return the ids of a text; runs in a worker thread. Raises `ContextLengthError` if it cannot fit."""
    if truncation is None:
        return client.processor.tokenize_prompt(text, add_special_tokens)
    text = truncation.cut_text(text, client.processor.max_chars)
    kept = client.tokenizer.encode("") if add_special_tokens else []
    return truncation.cut(client.processor.tokenize_prompt(text, add_special_tokens), kept)


def split_prompts(value: Any, max_model_len: int, truncation: Truncation | None) -> list[str | list[int]]:
    """Return the prompts of a request: of a text, a list of texts, a list of ids or a list of lists of ids.

    Only their number and lengths are checked here; `tokenize_prompts` looks at the ids. Raises
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
        if len(prompt) > max_model_len and truncation is None:
            raise ContextLengthError(
                f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
                f"contains {len(prompt)} input tokens, which exceeds this limit even without any output "
                "tokens. Please reduce the length of the input prompt.",
                "input_tokens",
            )
    return prompts


def check_total(tokens: int, n: int) -> None:
    """Raise `InvalidRequestError` if the prompts of one request have too many tokens together."""
    if tokens * n > MAX_PROMPT_TOKENS:
        raise InvalidRequestError(
            f"The prompts with n={n} have more than {MAX_PROMPT_TOKENS} tokens together.", "n"
        )


def tokenize_prompts(
    client: EngineClient,
    prompts: Sequence[str | list[int]],
    add_special_tokens: bool,
    truncation: Truncation | None,
) -> list[list[int]]:
    """Return the checked ids of every prompt; runs in a worker thread."""
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = tokenize_text(client, prompt, add_special_tokens, truncation)
        else:
            _check_ids(prompt)
            ids = prompt if truncation is None else truncation.cut(prompt)
        client.processor.check_prompt(ids)
        found.append(ids)
    return found


def prompt_texts(
    client: EngineClient,
    prompts: Sequence[str | list[int]],
    ids: Sequence[list[int]],
    truncation: Truncation | None,
) -> list[str]:
    """Return the prompts as text, for `echo`; runs in a worker thread."""
    return [
        prompt
        if isinstance(prompt, str) and truncation is None
        # Special tokens that the tokenizer put before a text are not part of it.
        else client.tokenizer.decode(own, skip_special_tokens=isinstance(prompt, str))
        for prompt, own in zip(prompts, ids, strict=True)
    ]


def _check_ids(ids: list[Any]) -> None:
    if set(map(type, ids)) != {int}:
        raise _prompt_shape()
    if min(ids) < 0:
        fault = Fault("Token ids should be greater than or equal to 0")
        raise shape_error([("body.prompt", fault)])


def _prompt_shape() -> InvalidRequestError:
    fault = Fault("Input should be a string, a list of strings, token ids or lists of token ids")
    return shape_error([("body.prompt", fault)])
