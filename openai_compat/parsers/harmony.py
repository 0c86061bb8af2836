"""Reads the response format of gpt-oss: messages with a channel each.

`<|channel|>analysis<|message|>...<|end|>` is reasoning, `final` the answer, and so is `commentary`, unless it
has a recipient: `<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{...}<|call|>` is a
call, in whatever channel. The format: https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import re

import msgspec

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.grammars import Tag, arguments_schema, schema_value, tag
from microvllm.openai_compat.parsers.json_calls import call_arguments
from microvllm.openai_compat.parsers.output import Thinking, give_back
from microvllm.openai_compat.parsers.scanner import Reading, Scanner
from microvllm.openai_compat.parsers.writer import Writer

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
ANSWER = f"{CHANNEL}final{MESSAGE}"
TAGS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
RECIPIENT = re.compile(r"to=([^\s<]+)")


class HarmonyCalls(msgspec.Struct, frozen=True):
    """Calls as messages with a recipient. A call ends the output, so there is one."""

    wrap: tuple[str, str] = ("", "")
    separator: str = f"{ENDS[2]}{START}assistant"

    @property
    def tokens(self) -> tuple[str, ...]:
        return TAGS

    def trigger(self, name: str) -> str:
        return f"{CHANNEL}commentary to="

    def tag(self, function: Function, checked: bool) -> Tag:
        begin = f"{CHANNEL}commentary to=functions.{function.name} {CONSTRAIN}json{MESSAGE}"
        schema = arguments_schema(function) if checked else {"type": "object"}
        return tag(begin, schema_value(schema), "")

    def others(self, function: Function, checked: bool) -> list[tuple[str, Tag]]:
        call, to = self.tag(function, checked), f"to=functions.{function.name}"
        written = (
            (f"{CHANNEL}analysis to=", f"{CHANNEL}analysis {to} code{MESSAGE}"),
            (f"{START}assistant to=", f"{START}assistant {to}{CHANNEL}commentary {CONSTRAIN}json{MESSAGE}"),
            (" to=functions.", f" {to}{CHANNEL}commentary {CONSTRAIN}json{MESSAGE}"),
        )
        # A special token is no text, so where calls have a grammar the answer's header needs one, too.
        answer = tag(ANSWER, {"type": "any_text"}, "")
        return [(ANSWER, answer), *((trigger, {**call, "begin": begin}) for trigger, begin in written)]


def harmony(scan: Scanner, write: Writer) -> Reading[None]:
    """Read an output that goes on behind `<|start|>assistant`, maybe in the middle of that header."""
    scan.record = []
    yield from scan.space()
    if (yield from scan.literal("to=")):
        yield from _message(scan, write)
    give_back(scan, write)
    while tag := (yield from scan.passage(TAGS, write.text, write.text)):
        if tag not in ENDS:
            scan.record = [tag]
            yield from _message(scan, write)


def _message(scan: Scanner, write: Writer) -> Reading[None]:
    """Read the rest of a header, and the message if it is a call; text is left to be read in its channel."""
    header, tag = scan.record or [], ""
    while tag not in (MESSAGE, *ENDS):
        tag = yield from scan.passage(TAGS, len)
        if not tag:
            break
    head = "".join(header)
    if tag != MESSAGE:
        scan.record = None if header[0] in TAGS else header
        return
    found = RECIPIENT.search(head)
    recipient = found[1] if found is not None else ""
    name = recipient.removeprefix("functions.")
    if write.functions and name and (name != recipient or name in write.functions):
        yield from scan.space()
        if (yield from call_arguments(scan, write, name, None, TAGS)):
            yield from scan.space()
            return
        write.switch(reasons=False)
        give_back(scan, write)
        return
    scan.record = None
    write.switch(reasons=head.partition(CHANNEL)[2].startswith("analysis"))
    write.paragraph()


HARMONY_THINKING = Thinking(
    f"{CHANNEL}analysis{MESSAGE}",
    ENDS[0],
    answer=f"{ENDS[0]}{START}assistant{ANSWER}",
    call=f"{ENDS[0]}{START}assistant",
    plain=ANSWER,
)
