"""Writes the events of one output: text of the answer or of the reasoning, and calls."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping

from microvllm.openai_compat.parsers.events import Arguments, Content, Event, Function, Reasoning, ToolCall

MAX_HELD = 2  # line breaks that formats put between a text and a tag


def call_id() -> str:
    """Return a new id of a call."""
    return f"chatcmpl-tool-{secrets.token_hex(12)}"


class Channel:
    """The answer or the reasoning.

    Line breaks next to a tag are the format's, not the text's: those at the ends of the text are dropped,
    those around a call in its middle become the ones in front of it. So up to two at the end are held back.
    """

    __slots__ = ("_held", "_is_empty", "after_tag", "event")

    def __init__(self, event: type[Content] | type[Reasoning]) -> None:
        self.event = event
        self.after_tag = False
        self._held = ""
        self._is_empty = True

    def add(self, text: str) -> str:
        """Return what is to be shown now."""
        if self.after_tag:
            text = text.lstrip("\n")
            if not text:
                return ""
            self.after_tag = False
            if self._is_empty:
                self._held = ""
        text = self._held + text
        tail = text[-MAX_HELD:]
        end = len(text) - len(tail) + len(tail.rstrip("\n"))
        self._held = text[end:]
        self._is_empty = self._is_empty and not end
        return text[:end]

    def paragraph(self) -> None:
        """Begin a paragraph, unless it is the first."""
        self._held = "" if self._is_empty else "\n\n"

    @property
    def held(self) -> str:
        """What was held back, "" if a tag was last."""
        return "" if self.after_tag else self._held


class Writer:
    """Collects events until `take` is called. `functions` are those that may be called, by name."""

    def __init__(
        self, functions: Mapping[str, Function], new_id: Callable[[], str] = call_id, parallel: bool = True
    ) -> None:
        self.functions = functions
        self.num_calls = 0
        self._new_id = new_id
        self._parallel = parallel
        self._answer = Channel(Content)
        self._reasoning = Channel(Reasoning)
        self._channel = self._answer
        self._has_text = False  # of the answer since its beginning or the last tag
        self._events: list[Event] = []

    def take(self) -> list[Event]:
        """Return the events since the last time."""
        events, self._events = self._events, []
        return events

    @property
    def held(self) -> str:
        """Line breaks that wait for what follows them."""
        return self._channel.held

    @property
    def reasons(self) -> bool:
        """Whether text is reasoning."""
        return self._channel is self._reasoning

    @property
    def may_open(self) -> bool:
        """Whether reasoning may begin here: no text of the answer since its beginning or the last call."""
        return not (self.reasons or self._has_text)

    @property
    def behind_call(self) -> bool:
        """Whether the last that was written is a call."""
        return self.num_calls > 0 and self.may_open

    def switch(self, *, reasons: bool) -> None:
        """Let text that follows be reasoning or answer; a tag said so."""
        self.separate()
        self._channel = self._reasoning if reasons else self._answer

    def paragraph(self) -> None:
        """Begin a paragraph where text of another message follows; call it behind a tag."""
        self._channel.paragraph()

    def separate(self) -> None:
        """Note a tag between texts."""
        self._answer.after_tag = self._reasoning.after_tag = True
        self._has_text = False

    def text(self, text: str) -> None:
        """Write text of the answer or the reasoning."""
        self._has_text = self._has_text or not text.isspace()
        shown = self._channel.add(text)
        if shown:
            self._events.append(self._channel.event(shown))

    def accepts(self, name: str) -> bool:
        """Whether this name makes a call: in reasoning, where models think aloud, it has to be declared."""
        return bool(name) and (name in self.functions or not self.reasons)

    def call(self, name: str, call_id: str | None = None) -> None:
        """Begin a call."""
        self.separate()
        if self._parallel or not self.num_calls:
            self._events.append(ToolCall(self.num_calls, call_id or self._new_id(), name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Write a piece of the arguments of the last call."""
        if text and (self._parallel or self.num_calls == 1):
            self._events.append(Arguments(self.num_calls - 1, text))

    def string(self, text: str) -> None:
        """Write a piece of a string within the arguments."""
        self.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    def end(self) -> None:
        """Write what was held back."""
        shown = self._channel.held
        if shown:
            self._events.append(self._channel.event(shown))
