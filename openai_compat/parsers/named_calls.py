"""Reads calls that are a name and the JSON text of the arguments."""

from __future__ import annotations

from functools import partial

import msgspec

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.grammars import (
    Tag,
    arguments_schema,
    constant,
    schema_value,
    sequence,
    tag,
)
from microvllm.openai_compat.parsers.json_calls import JsonCalls, call_arguments
from microvllm.openai_compat.parsers.scanner import Reading, Scanner
from microvllm.openai_compat.parsers.writer import Writer

FENCE = "```"
MISTRAL_LIST = JsonCalls(("[TOOL_CALLS]",), wrap=("[TOOL_CALLS][", "]"), separator=", ")


class NamedCalls(msgspec.Struct, frozen=True):
    """Calls as a name, `between`, and the arguments, with `call` around each and `wrap` around all.

    With `fenced` the name stands behind "function" and `between`, and the arguments are a block of code. With
    `numbered` it is an id that holds the name: `functions.name:0`.
    """

    wrap: tuple[str, str]
    call: tuple[str, str]
    between: str
    separator: str = ""
    fenced: bool = False
    numbered: bool = False

    @property
    def starts(self) -> tuple[str, ...]:
        return self.wrap[0], self.call[0]

    @property
    def in_reasoning(self) -> bool:
        return True

    @property
    def tokens(self) -> tuple[str, ...]:
        return (*self.wrap, *self.call, self.between)

    def trigger(self, name: str) -> str:
        return self.wrap[0]

    def tag(self, function: Function, checked: bool) -> Tag:
        value = schema_value(arguments_schema(function) if checked else {"type": "object"})
        if self.fenced:
            begin = f"{self.call[0]}function{self.between}{function.name}\n{FENCE}json\n"
            return tag(begin, value, f"\n{FENCE}{self.call[1]}")
        if self.numbered:
            begin = f"{self.call[0]}functions.{function.name}:"
            numbered = sequence([{"type": "regex", "pattern": "[0-9]{1,3}"}, constant(self.between), value])
            return tag(begin, numbered, self.call[1])
        return tag(f"{self.call[0]}{function.name}{self.between}", value, self.call[1])

    def others(self, function: Function, checked: bool) -> list[tuple[str, Tag]]:
        return [(self.call[0], self.tag(function, checked))]

    def calls(self, scan: Scanner, write: Writer, start: str) -> Reading[None]:
        one = partial(self._call, scan, write)
        yield from scan.calls(self.call[0], self.wrap[1], one, begun=start == self.call[0])

    def _call(self, scan: Scanner, write: Writer) -> Reading[bool]:
        yield from scan.space()
        name, call_id = (yield from scan.word()), None
        yield from scan.space()
        if not (yield from scan.literal(self.between)):
            return False
        if name == "function" and not (yield from scan.ahead("{")):
            name = yield from scan.word()
        if self.numbered:
            call_id, name = name, name.rpartition(":")[0].removeprefix("functions.") or name
        yield from scan.space()
        yield from scan.literal(f"{FENCE}json", FENCE)
        yield from scan.space()
        stops = (self.call[1], self.wrap[1])
        if not write.accepts(name) or not (yield from call_arguments(scan, write, name, call_id, stops)):
            return False
        yield from scan.space()
        yield from scan.closing(FENCE)
        yield from scan.space()
        yield from scan.closing(self.call[1])
        return True


class MistralCalls(msgspec.Struct, frozen=True):
    """Mistral's list of JSON objects (up to v7), and its `name[CALL_ID]id[ARGS]{...}` (from v11 on).

    Both are read, and `named` ones are what a grammar has the model write. Ids have nine characters.
    """

    named: bool = False
    starts: tuple[str, ...] = ("[TOOL_CALLS]",)

    @property
    def wrap(self) -> tuple[str, str]:
        return ("", "") if self.named else MISTRAL_LIST.wrap

    @property
    def separator(self) -> str:
        return "" if self.named else MISTRAL_LIST.separator

    @property
    def in_reasoning(self) -> bool:
        return True

    @property
    def tokens(self) -> tuple[str, ...]:
        return "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

    def trigger(self, name: str) -> str:
        return self.starts[0]

    def tag(self, function: Function, checked: bool) -> Tag:
        if not self.named:
            return MISTRAL_LIST.tag(function, checked)
        value = schema_value(arguments_schema(function) if checked else {"type": "object"})
        return tag(f"{self.starts[0]}{function.name}[ARGS]", value, "")

    def others(self, function: Function, checked: bool) -> list[tuple[str, Tag]]:
        if not self.named:
            return []
        call_id = {"type": "regex", "pattern": "[a-zA-Z0-9]{9}"}
        written = sequence([call_id, constant("[ARGS]"), self.tag(function, checked)["content"]])
        return [(self.starts[0], tag(f"{self.starts[0]}{function.name}[CALL_ID]", written, ""))]

    def calls(self, scan: Scanner, write: Writer, start: str) -> Reading[None]:
        yield from scan.space()
        if (yield from scan.ahead("[", "{")):
            yield from MISTRAL_LIST.calls(scan, write, start)
            return
        name = yield from scan.word()
        call_id = (yield from scan.word()) if (yield from scan.literal("[CALL_ID]")) else None
        yield from scan.literal("[ARGS]")
        yield from scan.space()
        if write.accepts(name):
            yield from call_arguments(scan, write, name, call_id, self.starts)
