"""Parses one output of a model into events as it arrives: reasoning, answer and calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from microvllm.openai_compat.parsers.events import Event
from microvllm.openai_compat.parsers.grammars import CallForm
from microvllm.openai_compat.parsers.scanner import Reading, Scanner
from microvllm.openai_compat.parsers.writer import Writer

Grammar = Callable[[Scanner, Writer], Reading[None]]


class Thinking(msgspec.Struct, frozen=True):
    """The tags around a model's reasoning.

    `implied` says that an output begins with reasoning even if neither the prompt nor itself opens it.
    `answer` and `call` are the texts that the answer and a call begin behind, "" for `end`; `plain` is what
    an answer without reasoning begins behind.
    """

    start: str
    end: str
    implied: bool = False
    answer: str = ""
    call: str = ""
    plain: str = ""


class CallGrammar(CallForm, Protocol):
    """How calls are read.

    `starts` are the texts they begin with. `calls` is resumed behind such a text and reads the calls there.
    What it takes while `Scanner.record` is a list, and no call begins, is text.
    """

    @property
    def starts(self) -> tuple[str, ...]: ...

    @property
    def in_reasoning(self) -> bool:
        """Whether `starts` are unmistakable, so that they are looked for in reasoning, too."""

    def calls(self, scan: Scanner, write: Writer, start: str) -> Reading[None]: ...


class OutputParser:
    """Parses one output; `feed` and `end` return the events that the text decided.

    However the text is cut into pieces, the events fold to the same message.
    """

    def __init__(self, grammar: Grammar, writer: Writer) -> None:
        self._scan = Scanner()
        self._write = writer
        self._run: Reading[None] | None = grammar(self._scan, writer)
        self._resume()

    @property
    def num_calls(self) -> int:
        """Number of calls so far."""
        return self._write.num_calls

    @property
    def held(self) -> str:
        """The text that came last and may still become text of the answer or the reasoning."""
        scan = self._scan
        return self._write.held + "".join(scan.record or ()) + scan.text[scan.position :]

    @property
    def reasons(self) -> bool:
        """Whether text that follows now would be reasoning."""
        return self._write.reasons

    def feed(self, text: str, token_ids: Sequence[int] = ()) -> list[Event]:
        """Parse the next piece of the output."""
        if not text:
            return []
        self._scan.add(text)
        self._resume()
        return self._write.take()

    def end(self, *, cut_off: bool = False) -> list[Event]:
        """End the output; `cut_off` says that a limit of tokens did it.

        A call that is not whole then keeps the arguments it has; otherwise they are completed to valid JSON.
        """
        self._scan.closed = True
        self._scan.cut_off = cut_off
        self._resume()
        self._write.end()
        return self._write.take()

    def _resume(self) -> None:
        if self._run is not None:
            try:
                next(self._run)
            except StopIteration:
                self._run = None


def tagged(thinking: Thinking | None, calls: CallGrammar | None, *, opened: bool | None) -> Grammar:
    """Return the grammar of an output with reasoning between tags, and calls.

    `opened` says whether the prompt ends within reasoning (True) or behind it (False), if that is known.
    """

    def grammar(scan: Scanner, write: Writer) -> Reading[None]:
        if thinking is not None and (thinking.implied if opened is None else opened):
            write.switch(reasons=True)
            # Some models write the tag although the template did.
            mark = scan.record = []
            yield from scan.space()
            if not (yield from scan.literal(thinking.start)):
                write.text("".join(mark))
            scan.record = None
        cut = partial(_cut, scan, write)
        while True:
            tag = yield from scan.passage(_tags(thinking, calls, write.reasons), write.text, cut)
            if not tag:
                return
            if thinking is not None and tag == thinking.end:
                write.switch(reasons=False)
            elif thinking is not None and tag == thinking.start:
                if write.may_open:
                    write.switch(reasons=True)
                else:
                    write.text(tag)
            elif calls is not None:
                scan.record = [tag]
                yield from calls.calls(scan, write, tag)
                give_back(scan, write)
                if scan.cut_off and write.behind_call:
                    return  # what is left is the beginning of another call

    return grammar


def _tags(thinking: Thinking | None, calls: CallGrammar | None, reasons: bool) -> tuple[str, ...]:
    own = () if thinking is None else (thinking.end if reasons else thinking.start,)
    return own if calls is None or (reasons and not calls.in_reasoning) else (*own, *calls.starts)


def give_back(scan: Scanner, write: Writer) -> None:
    """Write as text what was taken for a call and is none."""
    record, scan.record = scan.record, None
    if record:
        _cut(scan, write, "".join(record))


def _cut(scan: Scanner, write: Writer, text: str) -> None:
    """Write what may be the beginning of a tag or call, unless a limit cut off another call there."""
    if not (scan.cut_off and write.behind_call):
        write.text(text)
