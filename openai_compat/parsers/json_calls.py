"""Reads calls that are JSON objects: `{"name": ..., "arguments": {...}}`."""

from __future__ import annotations

import json

import msgspec

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.grammars import Tag, arguments_schema, schema_value, tag
from microvllm.openai_compat.parsers.json_text import JsonText
from microvllm.openai_compat.parsers.scanner import Reading, Scanner
from microvllm.openai_compat.parsers.writer import Writer

ARGUMENTS = ("arguments", "parameters")
FENCES = ("```json", "```")
HEADS = ('"name"', '"type"', '"function"')


class JsonCalls(msgspec.Struct, frozen=True):
    """Calls as JSON objects behind a tag, one or several, alone or in a list.

    `end` is the tag that closes them, "" if there is none. `bare` are texts that begin calls without a tag:
    there a call begins with its name, which has to be declared, and has arguments; anything else is text.

    The others say how a template writes calls, see `CallForm`: `around` stands around an object, `key` is the
    name of its arguments.
    """

    tags: tuple[str, ...]
    end: str = ""
    bare: tuple[str, ...] = ()
    wrap: tuple[str, str] = ("", "")
    around: tuple[str, str] = ("", "")
    separator: str = "\n"
    key: str = "arguments"

    @property
    def starts(self) -> tuple[str, ...]:
        return self.tags + self.bare

    @property
    def in_reasoning(self) -> bool:
        return not self.bare

    @property
    def tokens(self) -> tuple[str, ...]:
        return (*self.tags, self.end)

    def trigger(self, name: str) -> str:
        return '{"name": "' if self.bare else self.tags[0]

    def tag(self, function: Function, checked: bool) -> Tag:
        schema = arguments_schema(function) if checked else {"type": "object"}
        begin = f'{self.around[0]}{{"name": {quoted(function.name)}, "{self.key}": '
        return tag(begin, schema_value(schema), "}" + self.around[1])

    def others(self, function: Function, checked: bool) -> list[tuple[str, Tag]]:
        call = {**self.tag(function, checked), "end": "}"}
        head = call["begin"].removeprefix(self.around[0])
        tags = self.tags if self.bare else self.tags[1:]
        found = [(start, {**call, "begin": start + head}) for start in tags]
        if self.bare:
            # The texts that `json_call` takes for the beginning of a call.
            named = f'"function": {quoted(function.name)}, "{self.key}": '
            found.append(('{"type": "function"', {**call, "begin": f'{{"type": "function", {head[1:]}'}))
            found.append(('{"function": "', {**call, "begin": f"{{{named}"}))
        return found

    def calls(self, scan: Scanner, write: Writer, start: str) -> Reading[None]:
        stops = (self.end, *self.tags) if self.end else self.tags
        bare = start in self.bare
        made = False
        if bare:
            scan.put_back(start)  # the bracket is a part of the call
            scan.record = []
        while True:
            yield from scan.space()
            if (yield from scan.ahead("{")):
                yield from json_call(scan, write, bare, stops)
                if scan.record is not None:
                    return
                made = True
                scan.record = []  # what stands between two calls
            elif not (yield from scan.literal("[", *FENCES[: 0 if bare else 2], *(",;]}" if made else ""))):
                break
        if made:
            if self.end:
                yield from scan.closing(self.end)
            scan.record = None


def json_call(scan: Scanner, write: Writer, bare: bool, stops: tuple[str, ...]) -> Reading[None]:
    """Read the object that comes next, and write the call if it is one.

    It is one once its name is known and its arguments begin as an object, as null, or as a string that holds
    an object; or if it has a name and nothing else. Arguments in front of the name wait for it.
    """
    name: str | None = None
    call_id: str | None = None
    held: list[str] | None = None
    started = has_more = False
    quotes = ('"',) if bare else ('"', "'")
    yield from scan.literal("{")
    while True:
        yield from scan.space()
        key = ""
        if (yield from scan.literal(",")):
            continue
        if bare and not started:
            heads = tuple(f'"{key}"' for key in ARGUMENTS) if name else HEADS
            key = (yield from scan.literal(*heads))[1:-1]
        elif (yield from scan.ahead(*quotes)):
            key = yield from _string(scan)
            if not (key or started):
                return
        if not key:
            break
        yield from scan.space()
        yield from scan.literal(":")
        yield from scan.space()
        if bare and key == "type" and not started:
            if not (yield from scan.literal('"function"')):
                return
            continue
        is_string = bool((yield from scan.ahead(*quotes)))
        if bare and key not in ARGUMENTS and not (started or is_string):
            return
        if key in ARGUMENTS and not started:
            if name and write.accepts(name):
                started = yield from call_arguments(scan, write, name, call_id, stops)
                if not started:
                    return
            else:
                held = []
                yield from scan.json(held.append, stops)
        elif key in ("name", "function") and is_string and name is None:
            if bare:
                # A name may have letters that JSON can escape.
                names = {quoted(name, ascii_): name for name in write.functions for ascii_ in (False, True)}
                name = names.get((yield from scan.literal(*names)))
                if name is None:
                    return
            else:
                name = yield from _string(scan)
            if held is not None:
                arguments = as_object("".join(held))
                if arguments is None or not write.accepts(name):
                    return
                begin(scan, write, name, call_id)
                write.arguments(arguments)
                started = True
        elif key == "function" and name is None and (yield from scan.ahead("{")):
            called = write.num_calls
            yield from json_call(scan, write, bare, stops)
            if write.num_calls == called:
                return
            started = True
        elif key == "id" and is_string:
            call_id = yield from _string(scan)
        else:
            has_more |= key != "type"
            yield from scan.json(lambda _: None, stops)
    closed = yield from scan.literal("}")
    whole = closed or bool((yield from scan.ahead(*stops))) or (scan.closed and not scan.cut_off)
    if name and not started and not has_more and not bare and whole and write.accepts(name):
        begin(scan, write, name, call_id)
        write.arguments("{}")


def quoted(text: str, ascii_: bool = False) -> str:
    """Return the JSON text of a string."""
    return json.dumps(text, ensure_ascii=ascii_)


def begin(scan: Scanner, write: Writer, name: str, call_id: str | None = None) -> None:
    """Write the beginning of a call: from here on what was taken is no text."""
    scan.record = None
    write.call(name, call_id)


def as_object(text: str) -> str | None:
    """Return the arguments that a whole value stands for, as the text of an object, if it does."""
    text = text.strip()
    if text.startswith('"'):
        text = json.loads(text).strip()
        value = JsonText()
        text = value.feed(text, 0)[0] + value.finish()
    return "{}" if text in ("", "null") else text if text.startswith("{") else None


def call_arguments(
    scan: Scanner, write: Writer, name: str, call_id: str | None, stops: tuple[str, ...]
) -> Reading[bool]:
    """Begin the call and write its arguments; False if what comes next can be none."""
    if (yield from scan.ahead("{")):
        begin(scan, write, name, call_id)
        yield from scan.json(write.arguments, stops)
        return True
    if not (yield from scan.ahead('"', "null", "None", *stops)):
        return False
    pieces: list[str] = []
    if not (yield from scan.ahead(*stops)):
        yield from scan.json(pieces.append, stops)
    arguments = None if scan.closed and scan.cut_off else as_object("".join(pieces))
    if arguments is None:
        return False
    begin(scan, write, name, call_id)
    write.arguments(arguments)
    return True


def _string(scan: Scanner) -> Reading[str]:
    """Take the JSON string that comes next; "" if the output ends in it."""
    pieces: list[str] = []
    return str(json.loads("".join(pieces))) if (yield from scan.json(pieces.append)) else ""
