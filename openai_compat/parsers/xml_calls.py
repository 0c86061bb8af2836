"""Reads calls whose arguments stand between tags, as plain text, one pair of tags each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial

import msgspec

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.grammars import (
    Argument,
    Tag,
    argument_lists,
    constant,
    either,
    sequence,
    tag,
    takes_any,
    values,
)
from microvllm.openai_compat.parsers.json_calls import begin
from microvllm.openai_compat.parsers.scanner import END, Reading, Scanner
from microvllm.openai_compat.parsers.schema import Arguments, typed
from microvllm.openai_compat.parsers.writer import Writer

MAX_NAME_CHARS = 128  # of an argument that is looked for in values
MAX_NAMES_CHARS = 8192  # of all those of a function, in which the tag around each counts
TAG_CHARS = 32


class XmlCalls(msgspec.Struct, frozen=True):
    """Calls as tags.

    `section` are the tags around all calls, `call` what stands in front of the name of a call, behind it and
    at its end, `argument` the same of an argument's name and value. `behind_key` are what may stand between
    the two, but for white space. With `own_lines` a value has lines of its own: a line break at either side
    of it is not a part of it.

    A template writes `line` behind each tag, and with `one_each` a section for each call.

    A string is passed on as it arrives; a value of any other type by the function's schema, once it is whole.
    """

    section: tuple[str, str]
    call: tuple[str, str, str]
    argument: tuple[str, str]
    behind_key: tuple[str, ...]
    value: str = ""
    own_lines: bool = False
    line: str = "\n"
    one_each: bool = False

    @property
    def starts(self) -> tuple[str, ...]:
        return tuple(tag for tag in (self.section[0], self.call[0]) if tag)

    @property
    def in_reasoning(self) -> bool:
        return True

    @property
    def wrap(self) -> tuple[str, str]:
        return (
            ("", "")
            if self.one_each or not self.section[0]
            else (self.section[0] + self.line, self.section[1])
        )

    @property
    def separator(self) -> str:
        return self.line

    @property
    def tokens(self) -> tuple[str, ...]:
        return (*self.section, *self.call, *self.argument, *self.behind_key, self.value)

    def trigger(self, name: str) -> str:
        return self.starts[0]

    def tag(self, function: Function, checked: bool) -> Tag:
        call = self._tag(function, checked)
        if not self.one_each:
            return call
        return tag(
            f"{self.section[0]}\n{call['begin']}", call["content"], f"{call['end']}\n{self.section[1]}"
        )

    def others(self, function: Function, checked: bool) -> list[tuple[str, Tag]]:
        return [(self.call[0], self._tag(function, checked))] if self.section[0] else []

    def _tag(self, function: Function, checked: bool) -> Tag:
        before, behind, end = self.call
        begin = f"{before}{function.name}{behind}{self.line}"
        if not checked or takes_any(function):
            return tag(begin, {"type": "any_text"}, end)
        lists = argument_lists(function, lambda key: not any(end in key for end in self.behind_key))
        forms = (sequence([self._argument(function, item) for item in items]) for items in lists)
        return tag(begin, either(list(forms)), end)

    def _argument(self, function: Function, argument: Argument) -> Tag:
        own, line = "\n" if self.own_lines else "", self.line if self.value else ""
        ways = []
        for is_text, value in values(function, argument, marked=self._marks):
            behind_key = self.behind_key[self._marks and not is_text]
            begin = f"{self.argument[0]}{argument.key}{behind_key}{line}{self.value}{own}"
            if function.strict and value["type"] == "any_text":
                # No part of a text is read as the end of it and further arguments.
                value = {**value, "excludes": self._ends}
                ways.append(sequence([tag(begin, value, self.argument[1]), constant(self.line)]))
            else:
                ways.append(tag(begin, value, f"{own}{self.argument[1]}{self.line}"))
        return either(ways if argument.required else [*ways, constant("")])

    @property
    def _ends(self) -> list[str]:
        """What may end a value, beside its own end: that of the call, and another argument."""
        return [
            *([self.call[2]] if self.section[1] else []),
            *([f"\n{self.argument[0]}"] if self.own_lines else []),
        ]

    @property
    def _marks(self) -> bool:
        """Whether the tags show which values are texts."""
        return len(self.behind_key) > 1

    def calls(self, scan: Scanner, write: Writer, start: str) -> Reading[None]:
        one = partial(self._call, scan, write)
        yield from scan.calls(self.call[0], self.section[1], one, begun=start == self.call[0])

    def _call(self, scan: Scanner, write: Writer) -> Reading[bool]:
        """Read on behind the beginning of a call; False if it is none."""
        _, behind_name, end = self.call
        name = yield from scan.word()
        if not write.accepts(name) or (behind_name and not (yield from scan.literal(behind_name))):
            return False
        if not behind_name:
            yield from scan.space()
            if not (yield from scan.ahead(self.argument[0], end)):
                return False
        begin(scan, write, name)
        function = write.functions.get(name)
        arguments = Arguments(function.parameters if function is not None else {})
        names = tuple(_short(arguments.names)) if self.own_lines else ()
        ends = tuple(tag for tag in (end, self.section[1]) if tag)
        comma, tag = "{", ""
        other: list[str] = []
        while tag not in ends:
            if tag != self.argument[0]:
                yield from scan.space()
                tag = yield from scan.passage((self.argument[0], *ends), other.append)
            if tag != self.argument[0]:
                break
            key: list[str] = []
            tag = yield from scan.passage(self.behind_key, key.append)
            if not tag:
                break
            if self.value:
                yield from scan.space()
                if not (yield from scan.closing(self.value)) and scan.closed:
                    break
            write.arguments(f"{comma}{json.dumps(''.join(key), ensure_ascii=False)}: ")
            comma = ", "
            tag = yield from self._value(scan, write, arguments.types("".join(key)), names, tag)
        if not (scan.closed and scan.cut_off):
            write.arguments("{}" if comma == "{" else "}")
        if other:
            write.text("".join(other))
        return True

    def _value(
        self, scan: Scanner, write: Writer, types: frozenset[str], names: Sequence[str], behind_key: str
    ) -> Reading[str]:
        """Read a value of these types; return the tag it ends with if that is the call's.

        `names`: those of arguments that may follow without the tag that ends this one.
        A tag ends the value only if what may come behind it does, so a value may hold that tag, too.
        """
        if self._marks and (not types or "string" in types):
            if behind_key == self.behind_key[0]:
                types = frozenset(("string",))
            elif behind_key == self.behind_key[1]:
                types = types - {"string"} or types
        is_string = types == {"string"}
        pieces: list[str] = []
        sink = write.string if is_string else pieces.append
        before_key, end = self.argument
        call_end = self.call[2]
        # A model may forget the tag at the end of a value or of a call.
        last = (self.section[1],) if self.section[1] else ()
        behind = {
            end: ((before_key,), (call_end,), (END,), (*last, END)),
            call_end: ((*last, END), (*last, *self.starts[:1])) if last else ((END,),),
        }
        tags: tuple[str, ...] = tuple(behind)
        keys: frozenset[str] = frozenset()
        if self.own_lines:
            yield from scan.literal("\n")
            keys = frozenset(f"\n{before_key}{key}{self.behind_key[0]}" for key in names)
            tags = (*tags, *(f"\n{tag}" for tag in tags), *sorted(keys))
        if is_string:
            write.arguments('"')
        while True:
            tag = yield from scan.passage(tags, sink)
            own = tag.removeprefix("\n")
            if tag in keys:
                scan.put_back(own)
                own = end
                break
            if not tag or (yield from scan.follows(*behind[own])):
                break
            sink(tag)
        if scan.closed and scan.cut_off and not tag:
            return ""
        write.arguments('"' if is_string else typed("".join(pieces), types))
        return "" if own == end else own


def _short(names: Sequence[str]) -> Iterator[str]:
    """Names that may end a value: a set of them takes memory with the square of their lengths, and time."""
    room = MAX_NAMES_CHARS
    for name in names:
        if len(name) <= MAX_NAME_CHARS and (room := room - len(name) - TAG_CHARS) >= 0:
            yield name
