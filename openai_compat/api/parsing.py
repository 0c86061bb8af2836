"""Parses what a chat generates: how a request's outputs are made and read, and the events of each choice.

An endpoint that writes messages feeds a `ParsedChoice` the deltas of its stream and writes the events, or has
a whole choice read as a `ParsedMessage`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from microvllm.openai_compat.api.formats import Formats
from microvllm.openai_compat.api.tools import ToolUse
from microvllm.openai_compat.parsers.events import Content, Event, Function, ParsedMessage, Reasoning, fold
from microvllm.openai_compat.parsers.grammars import tool_grammar
from microvllm.openai_compat.parsers.output import OutputParser
from microvllm.openai_compat.parsers.registry import TOOL_FORMATS, make_parser
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import SamplingParams, StructuredOutput, ThinkingBudget
from microvllm.runtime.text.detokenizer import TextDelta
from microvllm.runtime.text.reasoning import ReasoningTags

if TYPE_CHECKING:
    from microvllm.openai_compat.api.streams import Outcome


@dataclass(frozen=True)
class Parsing:
    """How the outputs of one request are made and read.

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

    @property
    def reasons_first(self) -> bool:
        """Whether an output begins with reasoning that it does not open itself."""
        thinking = self.formats.thinking
        return thinking is not None and (thinking.implied if self.opened is None else self.opened)

    @property
    def functions(self) -> list[Function]:
        return [
            Function(tool.function.name, tool.function.parameters or {}, tool.function.strict is True)
            for tool in (self.tools.allowed if self.tools is not None else ())
        ]

    def parser(self) -> OutputParser | None:
        """Return a parser of one output; None if there is nothing to parse."""
        if self.is_plain:
            return None
        return make_parser(
            self.formats.calls,
            self.formats.reasoning,
            tools=self.functions,
            prompt_ends_in_reasoning=self.opened,
            parallel=self.parallel,
        )

    # ---- what the engine has to enforce -------------------------------------------------------------

    def constrained(self, params: SamplingParams, budget: int | None) -> SamplingParams:
        """Return the parameters with the form of the output and the budget of its reasoning.

        Raises `InvalidRequestError` naming the field of what cannot be enforced.
        """
        changes: dict[str, Any] = {}
        form = self._form(params.structured_outputs)
        if form is not params.structured_outputs:
            changes["structured_outputs"] = form
        thinking = self._budget(budget)
        if thinking is not None:
            changes["thinking"] = thinking
        if not self.is_plain and self.formats.in_special_tokens(calls=self.tools is not None):
            changes["skip_special_tokens"] = False
        return msgspec.structs.replace(params, **changes) if changes else params

    def _budget(self, max_tokens: int | None) -> ThinkingBudget | None:
        if max_tokens is None or max_tokens < 0:
            return None
        thinking, ids, field = self.formats.thinking, self.formats.ids, "thinking_token_budget"
        if thinking is None:
            raise InvalidRequestError(f"{field} needs a server with a --reasoning-parser.", field)
        if ids is None or thinking.answer:
            raise InvalidRequestError(f"{field} needs a model with a token that ends the reasoning.", field)
        if self.opened is False:  # there is no reasoning
            return None
        tags = {"start": ids.start, "end": ids.end, "blank": ids.blank}
        return ThinkingBudget(max_tokens=max_tokens, begun=self.reasons_first, **tags)

    def _form(self, answer: StructuredOutput | None) -> StructuredOutput | None:
        """Return the form of the output; `answer` is the requested one of the answer."""
        use = self.tools
        if use is None or self.formats.calls is None:
            return self._behind_reasoning(answer, call=False)
        calls, functions = TOOL_FORMATS[self.formats.calls], self.functions
        free = use.choice == "auto"
        if answer is not None and not free and answer.field != "response_format":
            raise InvalidRequestError(
                f"{answer.field} cannot be combined with a `tool_choice` that leaves no answer but calls.",
                answer.field,
            )
        if free and answer is None:
            form, field = tool_grammar(calls, functions, "auto", parallel=self.parallel), "tools"
        else:
            parallel = self.parallel and not use.named
            form, field = tool_grammar(calls, functions, "required", parallel=parallel), "tool_choice"
            if form is not None and answer is not None and free:
                form, field = _either(form, answer), answer.field
        return self._behind_reasoning(form and msgspec.structs.replace(form, field=field), call=True)

    def _behind_reasoning(self, form: StructuredOutput | None, *, call: bool) -> StructuredOutput | None:
        if form is None or self.formats.reasoning is None or self.opened is False:
            return form
        ids = self.formats.ids
        if ids is None and not self.reasons_first:
            return form  # from its beginning: where its end cannot be seen, there is no reasoning
        if ids is None:
            raise InvalidRequestError(
                f"{form.field} needs a model with a token that ends the reasoning, or no --reasoning-parser.",
                form.field,
            )
        return msgspec.structs.replace(
            form,
            after=ids.call if call else ids.answer,
            opens=[] if self.reasons_first else ids.start,
            head=[] if self.reasons_first or call else ids.plain,
        )

    def choice(self) -> ParsedChoice:
        """Return the reader of one output."""
        return ParsedChoice(self)


def _either(calls: StructuredOutput, answer: StructuredOutput) -> StructuredOutput:
    """Return the form of an output that is calls, or an answer in its own form."""
    formats: dict[str, Any] = {
        "json": lambda: {"type": "json_schema", "json_schema": json.loads(answer.spec)},
        "json_object": lambda: {"type": "json_schema", "json_schema": {"type": "object"}},
        "regex": lambda: {"type": "regex", "pattern": answer.spec},
        "choice": lambda: {
            "type": "or",
            "elements": [{"type": "const_string", "value": text} for text in json.loads(answer.spec)],
        },
    }
    if answer.kind not in formats:
        raise InvalidRequestError(
            f'{answer.field} of this kind cannot be combined with tools, unless `tool_choice` is "none".',
            answer.field,
        )
    elements = [json.loads(calls.spec)["format"], formats[answer.kind]()]
    spec = {"type": "structural_tag", "format": {"type": "or", "elements": elements}}
    return msgspec.structs.replace(answer, kind="structural_tag", spec=json.dumps(spec, ensure_ascii=False))


class ParsedChoice:
    """Reads one output as it arrives. `reasoning_tokens` counts those between the tags, None without any."""

    def __init__(self, parsing: Parsing) -> None:
        self._parser = parsing.parser()
        self._with_reasoning = parsing.with_reasoning
        self._named = parsing.tools is not None and parsing.tools.named
        ids = parsing.formats.ids
        self._counter: ReasoningCounter | None = None
        if ids is not None and parsing.formats.thinking is not None:
            # Channels are marked by tokens that no text has; tags may stand in a text.
            blank = None if parsing.formats.thinking.answer else ids.blank
            self._counter = ReasoningCounter(ids.start, ids.end, inside=parsing.reasons_first, blank=blank)

    @property
    def reasoning_tokens(self) -> int | None:
        return None if self._counter is None else self._counter.count

    @property
    def held(self) -> str:
        """The text that came and has become no event yet."""
        return "" if self._parser is None else self._parser.held

    def feed(self, delta: TextDelta) -> list[Event]:
        """Return the events of a delta; the last one, with a finish reason, ends the output."""
        if self._parser is None:
            return [Content(delta.text)] if delta.text else []
        if self._counter is not None:
            self._counter.add(delta.token_ids)
        events = self._parser.feed(delta.text, delta.token_ids)
        if delta.finish_reason is not None:
            # A stop string may end an output anywhere, the model's own end is that of what it was writing.
            whole = delta.finish_reason == "stop" and not isinstance(delta.stop_reason, str)
            events += self._parser.end(cut_off=not whole)
        if not self._with_reasoning:
            events = [event for event in events if not isinstance(event, Reasoning)]
        return events

    def read(self, outcome: Outcome) -> ParsedMessage:
        """Return the message of a whole choice."""
        ended = outcome.finish_reason, outcome.stop_reason
        return fold(self.feed(TextDelta(outcome.token_ids, outcome.text, *ended)))

    def finish_reason(self, reason: str | None) -> str | None:
        """Return OpenAI's finish reason: "tool_calls" for a choice that ended by itself and has calls.

        With calls of the one function that the request names it is "stop".
        """
        called = self._parser is not None and self._parser.num_calls > 0 and not self._named
        return "tool_calls" if called and reason == "stop" else reason


class ReasoningCounter:
    """Counts the tokens of the reasoning; `inside`: the output begins within it. See `ReasoningTags`."""

    def __init__(
        self,
        start: Sequence[int],
        end: Sequence[int],
        *,
        inside: bool,
        blank: Collection[int] | None = None,
    ) -> None:
        self._tags = ReasoningTags(start, end, blank, begun=inside)
        self._place = self._tags.first

    @property
    def count(self) -> int:
        return self._place.count

    def add(self, token_ids: Sequence[int]) -> None:
        """Count the next tokens of the output."""
        for token in token_ids:
            self._place = self._tags.after(self._place, token)
