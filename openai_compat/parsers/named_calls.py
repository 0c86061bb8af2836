"""Reads calls that are a name and the JSON text of the arguments."""

from __future__ import annotations

import msgspec

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.grammars import Tag, arguments_schema, schema_value, tag
from microvllm.openai_compat.parsers.json_calls import JsonCalls, call_arguments
from microvllm.openai_compat.parsers.scanner import Reading, Scanner
from microvllm.openai_compat.parsers.writer import Writer

SEPARATOR = "<｜tool▁sep｜>"
FENCE = "```"
MISTRAL_LIST = JsonCalls(("[TOOL_CALLS]",), wrap=("[TOOL_CALLS][", "]"), separator=", ")


class DeepSeekCalls(msgspec.Struct, frozen=True):
    """DeepSeek V3.1's `name<sep>{...}` and V3's `function<sep>name` with the arguments as a block of code."""

    separator: str = ""
    fenced: bool = False
    wrap: tuple[str, str] = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    call: tuple[str, str] = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")

    @property
    def starts(self) -> tuple[str, ...]:
        return self.wrap[0], self.call[0]

    @property
    def in_reasoning(self) -> bool:
        return True

    def triggers(self, name: str) -> str:
        return self.wrap[0]

    def tag(self, function: Function, checked: bool) -> Tag:
        value = schema_value(arguments_schema(function) if checked else {"type": "object"})
        if self.fenced:
            begin = f"{self.call[0]}function{SEPARATOR}{function.name}\n{FENCE}json\n"
            return tag(begin, value, f"\n{FENCE}{self.call[1]}")
        return tag(f"{self.call[0]}{function.name}{SEPARATOR}", value, self.call[1])

    def calls(self, scan: Scanner, write: Writer, start: str) -> Reading[None]:
        made = False
        while True:
            if start != self.call[0]:
                yield from scan.space()
                if not (yield from scan.literal(self.call[0])):
                    break
            start = ""
            name = yield from scan.word()
            if not (yield from scan.literal(SEPARATOR)):
                return
            if name == "function" and not (yield from scan.ahead("{")):
                name = yield from scan.word()
            yield from scan.space()
            yield from scan.literal(f"{FENCE}json", FENCE)
            yield from scan.space()
            stops = (self.call[1], self.wrap[1])
            if not write.accepts(name) or not (yield from call_arguments(scan, write, name, None, stops)):
                return
            made = True
            scan.record = []
            yield from scan.space()
            yield from scan.literal(FENCE)
            yield from scan.space()
            yield from scan.literal(self.call[1])
        if made:
            yield from scan.literal(self.wrap[1])
            scan.record = None


class MistralCalls(msgspec.Struct, frozen=True):
    """Mistral's list of JSON objects (up to v7), and its `name[CALL_ID]id[ARGS]{...}` (from v11 on).

    The ids of its templates have nine characters.
    """

    starts: tuple[str, ...] = ("[TOOL_CALLS]",)
    wrap: tuple[str, str] = MISTRAL_LIST.wrap
    separator: str = MISTRAL_LIST.separator

    @property
    def in_reasoning(self) -> bool:
        return True

    def triggers(self, name: str) -> str:
        return self.starts[0]

    def tag(self, function: Function, checked: bool) -> Tag:
        return MISTRAL_LIST.tag(function, checked)

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


DEEPSEEK_V3 = DeepSeekCalls("\n", fenced=True)
DEEPSEEK_V31 = DeepSeekCalls()
MISTRAL = MistralCalls()
