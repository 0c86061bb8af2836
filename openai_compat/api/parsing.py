"""Parses what a chat generates: how a request's outputs are read, and the events of each choice.

An endpoint that writes messages feeds a `ParsedChoice` the deltas of its stream and writes the events, or has
a whole choice read as a `ParsedMessage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from microvllm.openai_compat.api.tools import ToolUse
from microvllm.openai_compat.parsers.events import Content, Event, Function, ParsedMessage, Reasoning, fold
from microvllm.openai_compat.parsers.output import OutputParser, Thinking
from microvllm.openai_compat.parsers.registry import (
    AUTO,
    REASONING_FORMATS,
    detect_formats,
    make_parser,
)
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import ThinkingBudget
from microvllm.runtime.text.detokenizer import TextDelta

if TYPE_CHECKING:
    from microvllm.openai_compat.api.streams import Outcome
    from microvllm.openai_compat.config import AnswerArgs
    from microvllm.runtime.process.client import EngineClient


@dataclass(frozen=True)
class Formats:
    """The formats in which a server's model writes calls and reasoning, by name; None where there is none.

    `thinking` has the tags around the reasoning, and `think_start` and `think_end` are their token ids.
    """

    calls: str | None = None
    reasoning: str | None = None
    thinking: Thinking | None = None
    think_start: tuple[int, ...] = ()
    think_end: tuple[int, ...] = ()

    @classmethod
    def of(cls, client: EngineClient, args: AnswerArgs) -> Formats:
        """Return the formats that the options name, or for `auto` the chat template shows."""
        calls, reasoning = args.tool_call_parser, args.reasoning_parser
        if AUTO in (calls, reasoning):
            shown = detect_formats(client.processor.template_source)
            calls, reasoning = (
                found if name == AUTO else name for name, found in zip((calls, reasoning), shown, strict=True)
            )
        if reasoning is None:
            return cls(calls)
        thinking = REASONING_FORMATS[reasoning]
        if isinstance(thinking, str):  # harmony, which has channels
            return cls(calls, reasoning)
        start, end = (tuple(client.tokenizer.encode(tag, False)) for tag in (thinking.start, thinking.end))
        return cls(calls, reasoning, thinking, start, end)


@dataclass(frozen=True)
class Parsing:
    """How the outputs of one request are parsed.

    `tools` are those that may be called. `opened` says whether the prompt ends within reasoning (True) or
    behind it (False); None if the model decides. Without `with_reasoning` the reasoning is left out.
    """

    formats: Formats
    tools: ToolUse | None = None
    opened: bool | None = None
    with_reasoning: bool = True
    parallel: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the text is the answer as it is."""
        return self.tools is None and self.formats.reasoning is None

    def choice(self) -> ParsedChoice:
        """Return the parser of one output."""
        return ParsedChoice(self)

    def parser(self) -> OutputParser | None:
        if self.is_plain:
            return None
        functions = [
            Function(tool.function.name, tool.function.parameters or {}, tool.function.strict is True)
            for tool in (self.tools.allowed if self.tools is not None else ())
        ]
        return make_parser(
            self.formats.calls,
            self.formats.reasoning,
            tools=functions,
            prompt_ends_in_reasoning=self.opened,
            parallel=self.parallel,
        )

    @property
    def reasons_first(self) -> bool:
        """Whether an output begins with reasoning that it does not open itself."""
        thinking = self.formats.thinking
        return thinking is not None and (thinking.implied if self.opened is None else self.opened)

    def budget(self, max_tokens: int | None) -> ThinkingBudget | None:
        """Return the engine's form of `thinking_token_budget`. Raises `InvalidRequestError`."""
        if max_tokens is None or max_tokens < 0:
            return None
        if self.formats.thinking is None:
            raise InvalidRequestError(
                "thinking_token_budget needs a server with a --reasoning-parser whose format has tags around "
                "the reasoning.",
                "thinking_token_budget",
            )
        if self.opened is False:  # there is no reasoning
            return None
        start = [] if self.reasons_first else [*self.formats.think_start]
        return ThinkingBudget(max_tokens=max_tokens, start=start, end=[*self.formats.think_end])


class ParsedChoice:
    """Parses one output as it arrives. `reasoning_tokens` counts those between the tags, None without any."""

    def __init__(self, parsing: Parsing) -> None:
        self._parser = parsing.parser()
        self._with_reasoning = parsing.with_reasoning
        self._named = parsing.tools is not None and parsing.tools.named
        formats = parsing.formats
        self._counter: ReasoningCounter | None = None
        if formats.thinking is not None:
            self._counter = ReasoningCounter(
                formats.think_start, formats.think_end, inside=parsing.reasons_first
            )

    @property
    def reasoning_tokens(self) -> int | None:
        return None if self._counter is None else self._counter.count

    def feed(self, delta: TextDelta) -> list[Event]:
        """Return the events of a delta; the last one, with a finish reason, ends the output."""
        if self._parser is None:
            return [Content(delta.text)] if delta.text else []
        if self._counter is not None:
            self._counter.add(delta.token_ids)
        events = self._parser.feed(delta.text, delta.token_ids)
        if delta.finish_reason is not None:
            events += self._parser.end(cut_off=delta.finish_reason != "stop")
        if not self._with_reasoning:
            events = [event for event in events if not isinstance(event, Reasoning)]
        return events

    def read(self, outcome: Outcome) -> ParsedMessage:
        """Return the message of a whole choice."""
        return fold(self.feed(TextDelta(outcome.token_ids, outcome.text, outcome.finish_reason)))

    def finish_reason(self, reason: str | None) -> str | None:
        """Return OpenAI's finish reason: "tool_calls" for a choice that ended by itself and has calls.

        With calls of the one function that the request names it is "stop".
        """
        called = self._parser is not None and self._parser.num_calls > 0 and not self._named
        return "tool_calls" if called and reason == "stop" else reason


class ReasoningCounter:
    """Counts the tokens between two sequences of ids; with `inside` the first `start` is not written."""

    def __init__(self, start: Sequence[int], end: Sequence[int], *, inside: bool) -> None:
        self.count = 0
        self._inside = inside
        self._start, self._end = list(start), list(end)
        self._tail: list[int] = []

    def add(self, token_ids: Sequence[int]) -> None:
        """Count the next tokens of the output."""
        for token in token_ids:
            tag = self._end if self._inside else self._start
            self._tail = [*self._tail, token][-len(tag) :]
            self.count += self._inside
            if self._tail == tag:
                self.count -= len(tag) * self._inside
                self._inside, self._tail = not self._inside, []
