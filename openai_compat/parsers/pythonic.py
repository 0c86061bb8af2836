"""Reads calls that are written as Python: `[get_weather(city="Paris", days=3), get_time()]`."""

from __future__ import annotations

import json

import msgspec

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.grammars import (
    Tag,
    argument_lists,
    constant,
    either,
    schema_value,
    sequence,
    several,
    tag,
    takes_any,
)
from microvllm.openai_compat.parsers.json_calls import begin
from microvllm.openai_compat.parsers.json_text import JsonText
from microvllm.openai_compat.parsers.scanner import NAME, Reading, Scanner
from microvllm.openai_compat.parsers.writer import Writer

KEY = {"type": "regex", "pattern": "[A-Za-z_][A-Za-z0-9_]*="}


class PythonicCalls(msgspec.Struct, frozen=True):
    """Calls in a list, or `listed` or not between `tags`. The functions are declared, the arguments named."""

    tags: tuple[str, str] = ("", "")
    listed: bool = True

    @property
    def starts(self) -> tuple[str, ...]:
        return tuple(start for start in (self.tags[0], "[" if self.listed else "") if start)

    @property
    def in_reasoning(self) -> bool:
        return False

    @property
    def wrap(self) -> tuple[str, str]:
        return (
            (f"{self.tags[0]}[", f"]{self.tags[1]}")
            if self.listed
            else (f"{self.tags[0]}\n", f"\n{self.tags[1]}")
        )

    @property
    def separator(self) -> str:
        return ", " if self.listed else "\n"

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.tags

    def trigger(self, name: str) -> str:
        return self.tags[0] or f"[{name}("

    def tag(self, function: Function, checked: bool) -> Tag:
        if not checked or takes_any(function):
            keyed = tag("", sequence([KEY, schema_value({})]), "")
            anything = {**several([keyed], ", "), "at_least_one": False}
            return tag(f"{function.name}(", anything, ")")
        forms = []
        for items in argument_lists(function, NAME.fullmatch):
            items = sorted(items, key=lambda argument: not argument.required)
            values = [sequence([constant(f"{item.key}="), schema_value(item.schema)]) for item in items]
            forms.append(_listed(values, sum(item.required for item in items)))
        return tag(f"{function.name}(", either(forms), ")")

    def others(self, function: Function, checked: bool) -> list[tuple[str, Tag]]:
        if not self.tags[0] or not self.listed:
            return []
        call = self.tag(function, checked)
        return [(f"[{function.name}(", tag("[" + call["begin"], {**call, "begin": ""}, "]"))]

    def calls(self, scan: Scanner, write: Writer, start: str) -> Reading[None]:
        made = False
        if start != "[":
            yield from scan.space()
            yield from scan.literal("[")
        while True:
            yield from scan.space()
            if made and (yield from scan.literal(",")):
                continue
            if not (yield from self._call(scan, write)):
                break
            made = True
            scan.record = []
        if made:
            yield from scan.literal("]")
            yield from scan.space()
            if self.tags[1]:
                yield from scan.closing(self.tags[1])
            scan.record = None

    def _call(self, scan: Scanner, write: Writer) -> Reading[bool]:
        name = yield from scan.literal(*(f"{name}(" for name in write.functions))
        if not name:
            return False
        yield from scan.space()
        if (yield from scan.literal(")")):
            begin(scan, write, name[:-1])
            write.arguments("{}")
            return True
        key = yield from scan.word()
        yield from scan.space()
        if not key or not (yield from scan.literal("=")):
            return False
        begin(scan, write, name[:-1])
        value = JsonText(closer=")")
        write.arguments(value.feed(f"{{{json.dumps(key)}: ", 0)[0])
        yield from scan.json(write.arguments, value=value)
        return True


def _listed(values: list[Tag], num_required: int) -> Tag:
    """Return the format of the first `num_required` values and any of the others, with commas between."""
    with_comma = [sequence([constant(", "), value]) for value in values]
    optional = [either([value, constant("")]) for value in with_comma]
    if num_required:
        return sequence([values[0], *with_comma[1:num_required], *optional[num_required:]])
    firsts = [sequence([value, *optional[index + 1 :]]) for index, value in enumerate(values)]
    return either([constant(""), *firsts])
