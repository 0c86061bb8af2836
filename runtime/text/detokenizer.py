"""Turns token ids into text, piece by piece, with UTF-8 hold-back and stop strings. Torch-free.

`OutputProcessor` turns the step outputs of one request into `TextDelta`s, the same for the server and
offline. Its `Detokenizer` has two parts, each useful alone: a text decoder (ids -> characters that are final)
and `StopMatcher` (characters -> characters that may be shown).
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from microvllm.runtime.errors import EngineError, InvalidRequestError, QueueTimeoutError, RequestDeadlineError
from microvllm.runtime.request import EngineRequest, FinishReason, StepOutput, TokenLogprobs
from microvllm.runtime.text.token_bytes import TokenBytes
from microvllm.runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
PROMPT_TAIL = 8  # prompt tokens that can matter for how the first output token reads
MAX_WINDOW = 64  # tokens that are decoded at once
MAX_BROKEN = 16  # tokens whose U+FFFD are held back; a character has at most 4
REPEATED = "repetition_detected"  # the stop reason that vLLM gives with "repetition"


@dataclass(slots=True)
class TextDelta:
    """What became known since the last one.

    `text` may be "" while bytes of a character or a possible stop string are held back.
    `finish_reason` is "stop", "length", "repetition" or "abort" in the last delta; `stop_reason` is then the
    stop string or stop token id, `REPEATED` for a repetition, None for the end-of-sequence token.
    """

    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None  # one per token, if requested
    # In the first delta, if requested: one per prompt token from the second on.
    prompt_logprobs: list[TokenLogprobs] | None = None
    choice: int = 0  # the number of its stream, where those of several are merged

    def merge(self, later: TextDelta) -> None:
        """Append the delta that follows this one."""
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs
        self.text += later.text
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


class OutputProcessor:
    """Turns the step outputs of one request into deltas."""

    def __init__(self, tokenizer: Tokenizer, request: EngineRequest) -> None:
        params = request.params
        self._detokenizer = Detokenizer(
            tokenizer,
            request.prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop,
            include_stop_str=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def process(self, output: StepOutput) -> TextDelta:
        """Return the delta of one step.

        Raises `EngineError` when the request failed in the engine, `InvalidRequestError` if by its own fault,
        `QueueTimeoutError` or `RequestDeadlineError` when it was ended for its time.

        When a stop string was found, `finish_reason` is "stop" although the engine goes on: the caller
        must abort the request there.
        """
        if output.finish_reason is FinishReason.ERROR:
            if output.param is not None:
                raise InvalidRequestError(output.error or "the request is wrong", output.param)
            raise EngineError(output.error or "the request failed")
        if output.finish_reason is FinishReason.QUEUE_TIMEOUT:
            raise QueueTimeoutError
        if output.finish_reason is FinishReason.REQUEST_TIMEOUT:
            raise RequestDeadlineError
        ended_by_token = output.finish_reason is FinishReason.STOP
        before = self._detokenizer.num_tokens
        text, stop = self._detokenizer.push(output.token_ids, last_is_stop=ended_by_token)
        if stop is not None:
            counted = output.token_ids[: self._detokenizer.num_tokens - before]
            logprobs = None if output.logprobs is None else output.logprobs[: len(counted)]
            return TextDelta(counted, text, str(FinishReason.STOP), stop, logprobs, output.prompt_logprobs)
        reason = None
        if output.finish_reason is not None:
            text += self._detokenizer.finish()
            reason = str(output.finish_reason)
        stop_reason = REPEATED if output.finish_reason is FinishReason.REPETITION else output.stop_reason
        return TextDelta(output.token_ids, text, reason, stop_reason, output.logprobs, output.prompt_logprobs)


class Detokenizer:
    """The text of one sequence's output, as it may be shown.

    The pieces together are the text that the output adds to the prompt: `decode(prompt + output)` without
    `decode(prompt)`, cut at the first stop string. Bytes that are no UTF-8 become U+FFFD. (One deliberate
    difference: where SentencePiece byte tokens are partly invalid, only the invalid bytes become U+FFFD,
    while `decode` gives up the whole run of bytes, characters that were already streamed among them.)

    The stop string that *ends* first in the text counts; of several that end at the same character, the
    first of the list. So the answer does not depend on how the text was cut into tokens. Only matches that
    end in the text of a token after the first `min_tokens` count.
    Text that may still become a stop string is held back, unless `include_stop_str` shows it anyway.

    `num_tokens` counts the output tokens that belong to the answer: all that were pushed, or, once a stop
    string matched, those up to the token that completed it. `stop_hit` is that string.
    """

    __slots__ = ("_decoder", "_include_stop", "_matcher", "_min_tokens", "num_tokens", "stop_hit")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder: TextDecoder
        if tokenizer.token_bytes is not None:
            self._decoder = ByteDecoder(tokenizer.token_bytes, prompt_ids, skip_special_tokens)
        else:
            self._decoder = WindowDecoder(tokenizer, prompt_ids, skip_special_tokens)
        self._matcher = StopMatcher(stop, include_stop_str) if stop else None
        self._include_stop = include_stop_str
        self._min_tokens = min_tokens
        self.num_tokens = 0
        self.stop_hit: str | None = None

    def push(self, token_ids: Sequence[int], *, last_is_stop: bool = False) -> tuple[str, str | None]:
        """Take the next output tokens; return (text to show now, the stop string that matched or None).

        `last_is_stop` says that the engine ended at the last of these ids (end of sequence or a stop token):
        its text is not shown unless `include_stop_str`. After a stop string matched, `num_tokens` tells how
        many output tokens count (ids after the one that completed the match do not), the text returned is
        all there is, and further calls return ("", the stop string).
        """
        if self.stop_hit is not None:
            return "", self.stop_hit
        shown = ""
        silent = len(token_ids) - 1 if last_is_stop and not self._include_stop else -1
        for index, token in enumerate(token_ids):
            self.num_tokens += 1
            if index == silent:
                break
            text = self._decoder.step(token)
            if self._matcher is not None:
                text, self.stop_hit = self._matcher.feed(text, armed=self.num_tokens > self._min_tokens)
                if self.stop_hit is not None:
                    return shown + text, self.stop_hit
            shown += text
        return shown, None

    def finish(self) -> str:
        """End the sequence; returns what was still held back, nothing after a stop string."""
        if self.stop_hit is not None:
            return ""
        tail = self._decoder.finish()
        if self._matcher is None:
            return tail
        # Only the U+FFFD of a broken last character can be new here.
        return self._matcher.release() + tail


class StopMatcher:
    """Finds stop strings in a text that arrives in pieces, and keeps back what may become one.

    Knuth, Morris, Pratt (1977): per stop string one number, the length of the longest suffix of the text
    that is a proper prefix of the stop. It gives both answers: it reaches the whole length at a match, and
    the largest of the numbers is what must be held back. The cost of a character is constant on average.
    """

    __slots__ = ("_fallbacks", "_firsts", "_held", "_include", "_matched", "_stops")

    def __init__(self, stops: Sequence[str], include_stop_str: bool = False) -> None:
        self._stops = list(stops)
        self._fallbacks = [_prefix_function(stop) for stop in stops]
        self._firsts = frozenset(stop[0] for stop in stops)
        self._matched = [0] * len(self._stops)
        self._held = ""
        self._include = include_stop_str

    def feed(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Returns (text that may be shown, the stop string that `text` completed or None).

        When not `armed`, a match is passed over, but its characters may still begin a later one.
        """
        if not self._held and self._firsts.isdisjoint(text) and not any(self._matched):
            return text, None
        matched = self._matched
        for position, char in enumerate(text):
            hit = None
            for index, stop in enumerate(self._stops):
                length, fallback = matched[index], self._fallbacks[index]
                while length and stop[length] != char:
                    length = fallback[length - 1]
                if stop[length] == char:
                    length += 1
                if length == len(stop):
                    if armed and hit is None:
                        hit = stop
                    length = fallback[length - 1]
                matched[index] = length
            if hit is not None:
                seen = self._held + text[: position + 1]
                self._held = ""
                return (seen if self._include else seen[: len(seen) - len(hit)]), hit
        seen = self._held + text
        keep = 0 if self._include else max(matched)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep], None

    def release(self) -> str:
        """End the text; returns what is held back."""
        held, self._held = self._held, ""
        return held


@functools.lru_cache(64)  # the samples of a request have the same stop strings
def _prefix_function(pattern: str) -> tuple[int, ...]:
    """For each prefix of `pattern`, the length of its longest proper suffix that is also its prefix."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        table[index] = length
    return tuple(table)


class TextDecoder(Protocol):
    """Token ids one by one -> characters that no later token changes."""

    def step(self, token: int) -> str: ...

    def finish(self) -> str: ...


class ByteDecoder:
    """For tokenizers whose text is the concatenation of their tokens' bytes: a table and a UTF-8 decoder."""

    __slots__ = ("_at_rest", "_prompt_tail", "_strip", "_table", "_utf8")

    def __init__(self, token_bytes: TokenBytes, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._table = table = token_bytes.visible if skip_special_tokens else token_bytes.all
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        size = len(table)
        # The output may complete a character that the prompt's last tokens began.
        self._utf8.decode(b"".join(table[token] for token in prompt_ids[-PROMPT_TAIL:] if 0 <= token < size))
        self._prompt_tail = bool(self._utf8.getstate()[0])
        self._at_rest = False  # nothing is held back and nothing has to be looked at but the next token
        self._strip = token_bytes.strips_space and not any(
            0 <= token < size and table[token] for token in prompt_ids
        )

    def step(self, token: int) -> str:
        try:
            piece = self._table[token] if token >= 0 else b""
        except IndexError:
            return ""
        if self._at_rest and piece.isascii():  # nearly every token
            return piece.decode("ascii")
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(b" ")
        if self._prompt_tail and piece:
            self._prompt_tail = False
            if piece[0] & 0xC0 != 0x80:  # no continuation byte: what the prompt left open is not the output's
                self._utf8.reset()
        text = self._utf8.decode(piece)
        self._at_rest = not (self._strip or self._prompt_tail or self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        return "" if self._prompt_tail else self._utf8.decode(b"", True)


class WindowDecoder:
    """For any other tokenizer: decode a short window of tokens with each new one, and compare.

    A window begins with tokens whose text was returned already, because decoders treat the first token of a
    text differently, and some a token by the one before it. U+FFFD at the end of a window is held back: it
    may be a part of a character (`MAX_BROKEN` bounds that for all but the last).
    """

    __slots__ = ("_broken", "_ids", "_mark", "_read", "_shown", "_skipped", "_text", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._ids = self._prompt_tail(prompt_ids)
        self._text = self._shown = self._decode(self._ids)  # of the window; what of it was returned
        self._read = len(self._ids)  # tokens of the window whose text was returned
        self._mark = self._read  # where the next window may begin
        self._broken = 0  # tokens in a row after which the text ended in U+FFFD

    def step(self, token: int) -> str:
        if token in self._skipped:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        crowded = len(self._ids) >= MAX_WINDOW
        if text == self._text and not crowded:
            return ""
        self._text = text
        self._broken = self._broken + 1 if text.endswith(REPLACEMENT) else 0
        if not self._broken or len(self._ids) >= 2 * MAX_WINDOW:
            piece = self._show(text)
        elif self._broken <= MAX_BROKEN:
            piece = self._show(text[: text.find(REPLACEMENT, len(self._shown))], held=True)
        else:  # too many for one character, but the last may be a part of the next
            piece = self._show(text[:-1], held=True)
        if self._shown == text and (piece or crowded):
            self._move_on(crowded)
            self._read = len(self._ids)
        return piece

    def finish(self) -> str:
        return self._show(self._text)

    def _show(self, text: str, held: bool = False) -> str:
        """Returns what of the window's text is new. `held` says that the text is not all of the window's."""
        shown = self._shown
        if held and len(text) <= len(shown):
            return ""
        if not text.startswith(shown):
            shown = shown.rstrip(REPLACEMENT)  # the prompt's last character, complete now
        if not text.startswith(shown):
            if held:
                return ""
            # The decoder took back what it gave before: only the new tokens count.
            text = self._decode(self._ids[self._read :])
            self._text = self._shown = self._decode(self._ids)
            return text
        self._shown = text
        return text[len(shown) :]

    def _move_on(self, crowded: bool) -> None:
        """Begins the next window with the last tokens, if they give their text without the others too."""
        last = self._decode(self._ids[self._mark :])
        several = len(self._ids) > self._mark + 1  # of two the second reads as it does within a text
        if several and last and REPLACEMENT not in last and self._shown.endswith(last):
            del self._ids[: self._mark]
            self._mark = len(self._ids)
            self._text = self._shown = last
        elif crowded:
            del self._ids[:-PROMPT_TAIL]
            self._mark = len(self._ids)
            self._text = self._shown = self._decode(self._ids)

    def _prompt_tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the last few tokens of the prompt that have a text, from a whole character on."""
        tail: list[int] = []
        for token in reversed(prompt_ids):
            if token in self._skipped:
                continue
            tail.insert(0, token)
            if len(tail) % PROMPT_TAIL == 0:
                text = self._decode(tail).rstrip(REPLACEMENT)
                if (text and REPLACEMENT not in text) or len(tail) >= MAX_WINDOW:
                    break
        return tail

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, bool(self._skipped))
