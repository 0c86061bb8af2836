"""Writes log probabilities in the forms of completions, of chat and of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microvllm.openai_compat.api.requests import GenerationRequest
    from microvllm.openai_compat.api.streams import Stream
    from microvllm.openai_compat.config import ServerArgs
    from microvllm.runtime.request import TokenLogprobs
    from microvllm.runtime.text.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say
MAX_OPEN_BYTES = 3  # of an unfinished UTF-8 character


def finite(logprob: float) -> float:
    """Return the log probability, or `LOWEST` if it is smaller."""
    return logprob if logprob > LOWEST else LOWEST


def as_token_ids(body: GenerationRequest, args: ServerArgs) -> bool:
    """Return whether to show tokens as "token_id:123": the request decides, else the server's option."""
    requested = body.return_tokens_as_token_ids
    return args.return_tokens_as_token_ids if requested is None else requested


class TokenText:
    """Returns the text of each token of one sequence, as it reads after the tokens before it.

    A token that is only a part of a character reads "", the one that completes it reads as the character;
    so the tokens of a sequence together are its text. With `as_ids` a token is "token_id:123" instead.
    """

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._table = None if tokenizer.token_bytes is None else tokenizer.token_bytes.all
        self._as_ids = as_ids
        self._open = b""  # the first bytes of a character that the tokens so far have begun

    def text_of(self, token: int) -> str:
        """Return the text of the token at the current position."""
        if self._as_ids:
            return f"token_id:{token}"
        if self._table is None:
            return self._tokenizer.decode([token], skip_special_tokens=False)
        own = self._own(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            text = self._open + own
            return text[: len(text) - _unfinished(text)].decode("utf-8", "replace")

    def bytes_of(self, token: int) -> list[int]:
        """Return the token's own bytes, or those of its string for a tokenizer without a table of bytes."""
        if self._table is None:
            return list(self._tokenizer.decode([token], skip_special_tokens=False).encode())
        return list(self._own(token))

    def advance(self, token: int) -> None:
        """Move past the current position, which holds this token."""
        if self._table is not None:
            text = self._open + self._own(token)
            self._open = text[len(text) - _unfinished(text) :]

    def _own(self, token: int) -> bytes:
        # A model may have more rows than its tokenizer has tokens.
        return self._table[token] if self._table is not None and token < len(self._table) else b""


def _unfinished(text: bytes) -> int:
    """Return how many bytes at the end are the beginning of a character."""
    for count in range(1, min(MAX_OPEN_BYTES, len(text)) + 1):
        byte = text[-count]
        if byte & 0xC0 != 0x80:  # the first byte of a character, which tells its length
            length = (
                1 if byte >= 0xF8 else 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            )
            return count if length > count else 0
    return 0


class CompletionLogprobs:
    """Writes the `logprobs` objects of one choice of a completion; offsets go on from object to object."""

    def __init__(self, token_text: TokenText) -> None:
        self._token_text = token_text
        self._offset = 0

    def format_tokens(
        self, token_ids: Sequence[int], entries: Iterable[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """Return the object of the next tokens; the entry of a prompt's first token is None."""
        offsets, tokens, values, tops = [], [], [], []
        for token, entry in zip(token_ids, entries, strict=True):
            text = self._token_text.text_of(token)
            offsets.append(self._offset)
            tokens.append(text)
            values.append(None if entry is None else finite(entry.logprobs[0]))
            tops.append(None if entry is None else self._top(entry))
            self._offset += len(text)
            self._token_text.advance(token)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in zip(entry.token_ids, entry.logprobs, strict=True):
            # Of two tokens with the same text the likelier comes first, and is kept.
            found.setdefault(self._token_text.text_of(token), finite(logprob))
        return found


class ChatLogprobs:
    """Writes the `logprobs` objects of one choice of a chat: `count` alternatives per token, -1 for all."""

    def __init__(self, token_text: TokenText, count: int) -> None:
        self._token_text = token_text
        self._count = count

    def format_tokens(self, token_ids: Sequence[int], entries: Iterable[TokenLogprobs]) -> dict[str, Any]:
        content = []
        for token, entry in zip(token_ids, entries, strict=True):
            values = _by_token(entry)
            shown = list(values.items()) if self._count < 0 else list(values.items())[: self._count]
            content.append(
                {
                    **self._one(token, entry.logprobs[0]),
                    "top_logprobs": [self._one(other, logprob) for other, logprob in shown],
                }
            )
            self._token_text.advance(token)
        return {"content": content}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token_text.text_of(token),
            "logprob": finite(logprob),
            "bytes": self._token_text.bytes_of(token),
        }


def prompt_logprobs(tokenizer: Tokenizer, stream: Stream) -> list[dict[str, Any] | None] | None:
    """Return a prompt's log probabilities: null, then {id: {"logprob", "rank", "decoded_token"}} per token.

    None if they were not requested.
    """
    token_ids, entries = stream.prompt_token_ids, stream.prompt_logprobs
    if entries is None:
        return None
    token_text = TokenText(tokenizer)
    token_text.advance(token_ids[0])
    found: list[dict[str, Any] | None] = [None]
    for token, entry in zip(token_ids[1:], entries, strict=True):
        ranks = [entry.rank, *range(1, len(entry.token_ids))]
        position: dict[str, Any] = {}
        for other, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True):
            position.setdefault(
                str(other),
                {"logprob": finite(logprob), "rank": rank, "decoded_token": token_text.text_of(other)},
            )
        found.append(position)
        token_text.advance(token)
    return found


def _by_token(entry: TokenLogprobs) -> dict[int, float]:
    """Return the sampled token's log probability first, then the others', each token once."""
    found: dict[int, float] = {}
    for token, logprob in zip(entry.token_ids, entry.logprobs, strict=True):
        found.setdefault(token, logprob)
    return found
