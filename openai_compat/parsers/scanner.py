"""Reads text that arrives in pieces: what every format's grammar is written with.

A grammar is a generator: it takes text from a `Scanner`, and where it needs more it yields and is resumed
when more is there. So it reads like a parser of a whole text, and the same code parses a stream. No primitive
looks at a character a second time, but for the few of a tag that is not decided yet.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator
from typing import TypeVar

from microvllm.openai_compat.parsers.json_text import JsonText

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A parser that yields where it needs more text."""
NAME = re.compile(r"[^\s\"'()\[\]{}<>=,|\\]+")  # what a function of a request may be called
MAX_GAP = 64  # white space between two tags
END = ""
SPACE = re.compile(r"[ \t\r\n]*")


class Tags:
    """A set of strings to be found in text that arrives in pieces."""

    __slots__ = ("_longest", "_prefixes", "search")

    def __init__(self, tags: tuple[str, ...]) -> None:
        by_length = sorted(tags, key=len, reverse=True)
        self.search = re.compile("|".join(map(re.escape, by_length)) or "(?!)").search
        self._prefixes = frozenset(tag[:end] for tag in tags for end in range(1, len(tag)))
        self._longest = max(map(len, by_length), default=1) - 1

    def undecided(self, text: str, start: int) -> int:
        """Return the length of the longest end of `text[start:]` that begins a tag without being one."""
        for size in range(min(self._longest, len(text) - start), 0, -1):
            if text[-size:] in self._prefixes:
                return size
        return 0


@functools.lru_cache(16)  # some have names of requests in them, and take megabytes
def tags_of(*tags: str) -> Tags:
    """Return the set of these strings, compiled once."""
    return Tags(tags)


class Scanner:
    """Holds the text that was not taken yet.

    `closed` says that no more will come, `cut_off` that this was not the model's own end. While `record` is a
    list, whatever is taken is appended to it, so that what turns out to be no call can be given back as text.
    """

    __slots__ = ("closed", "cut_off", "position", "record", "text")

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.closed = False
        self.cut_off = False
        self.record: list[str] | None = None

    def add(self, text: str) -> None:
        """Append text."""
        self.text = self.text[self.position :] + text
        self.position = 0

    def take(self, end: int) -> str:
        """Take the text up to the position `end`."""
        piece = self.text[self.position : end]
        self.position = end
        if self.record is not None and piece:
            self.record.append(piece)
        return piece

    def peek(self) -> Reading[str]:
        """Return the next character without taking it; "" at the end."""
        while self.position == len(self.text):
            if self.closed:
                return ""
            yield
        return self.text[self.position]

    def space(self) -> Reading[str]:
        """Take the white space that comes next, and wait for what follows it."""
        pieces = []
        while (yield from self.peek()).isspace():
            match = SPACE.match(self.text, self.position)
            end = match.end() if match else 0
            pieces.append(self.take(max(end, self.position + 1)))
        return "".join(pieces)

    def put_back(self, text: str) -> None:
        """Undo that `text` was taken, which was the last to be, and without a wait since."""
        self.position -= len(text)
        if self.record is not None:
            self.record[-1] = self.record[-1].removesuffix(text)

    def literal(self, *choices: str) -> Reading[str]:
        """Take the first of `choices` that comes next and return it; return "" if none does."""
        found = yield from self.ahead(*choices)
        self.take(self.position + len(found))
        return found

    def closing(self, *tags: str) -> Reading[str]:
        """Take the tag that comes next, as `literal` does, or its part where the output ends in it."""
        found = yield from self.literal(*tags)
        rest = self.text[self.position :]
        if not found and self.closed and any(tag.startswith(rest) for tag in tags):
            self.take(len(self.text))
        return found

    def calls(
        self, begin: str, closing: str, one: Callable[[], Reading[bool]], *, begun: bool
    ) -> Reading[None]:
        """Read calls one behind the other, each behind its `begin`, then `closing`, which may be "".

        `one` reads on behind the beginning and returns False for what is no call, which ends this; of the
        first call the beginning is taken already if `begun`.
        """
        made = False
        while True:
            if not begun:
                yield from self.space()
                if not (yield from self.literal(begin)):
                    break
            begun = False
            if not (yield from one()):
                return
            made = True
            self.record = []
        if made:
            if closing:
                yield from self.closing(closing)
            self.record = None

    def ahead(self, *choices: str) -> Reading[str]:
        """Return the first of `choices` that comes next, or "", without taking it."""
        while True:
            for choice in choices:
                if self.text.startswith(choice, self.position):
                    return choice
                if not self.closed and choice.startswith(
                    self.text[self.position : self.position + len(choice)]
                ):
                    break
            else:
                return ""
            yield

    def follows(self, *chains: tuple[str, ...]) -> Reading[bool]:
        """Return whether the tags of one of `chains` come next, white space aside; take nothing.

        The tag `END` is the end of the output.
        """
        while True:
            found = [self._follows(chain) for chain in chains]
            if True in found:
                return True
            if None not in found:
                return False
            yield

    def _follows(self, chain: tuple[str, ...]) -> bool | None:
        position = self.position
        for tag in chain:
            space = SPACE.match(self.text, position)
            end = space.end() if space is not None else position
            if end > position + MAX_GAP:
                return False
            position = end + len(tag)
            if end == len(self.text):
                return tag == END if self.closed else None
            rest = self.text[end:position]
            if rest != tag or tag == END:
                # A limit of tokens may have cut the tag off.
                return (True if self.closed else None) if rest and tag.startswith(rest) else False
        return True

    def word(self) -> Reading[str]:
        """Take the name that comes next; "" if none does."""
        pieces = []
        while (yield from self.peek()):
            match = NAME.match(self.text, self.position)
            if match is None:
                break
            pieces.append(self.take(match.end()))
        return "".join(pieces)

    def json(
        self, sink: Callable[[str], object], stops: tuple[str, ...] = (), value: JsonText | None = None
    ) -> Reading[bool]:
        """Pass on the JSON value that comes next, as valid JSON; return whether it came to its own end.

        It also ends, outside of a string, in front of one of `stops`, and with the output; only of an output
        that was cut off is it left as it is, a beginning of valid JSON. `value` is one that was begun.
        """
        value = value or JsonText()
        firsts = "".join({stop[0] for stop in stops})
        while True:
            text, end = value.feed(self.text, self.position, firsts)
            self.take(end)
            if text:
                sink(text)
            if value.done:
                return True
            if self.position == len(self.text) and not self.closed:
                yield
            elif self.position == len(self.text) or (yield from self.ahead(*stops)):
                if not (self.closed and self.cut_off):
                    sink(value.finish())
                return False
            elif text := value.step(self.take(self.position + 1)):
                sink(text)

    def passage(
        self, tags: tuple[str, ...], sink: Callable[[str], object], rest: Callable[[str], object] = len
    ) -> Reading[str]:
        """Pass text on up to the first of `tags`; take and return that tag, or "" at the end of the output.

        Only what may be the beginning of a tag is held back. Where the output ends in it, `rest` gets it.
        """
        wanted = tags_of(*tags)
        while True:
            match = wanted.search(self.text, self.position)
            if match is not None:
                if match.start() > self.position:
                    sink(self.take(match.start()))
                return self.take(match.end())
            end = len(self.text) - wanted.undecided(self.text, self.position)
            if end > self.position:
                sink(self.take(end))
            if self.closed:
                rest(self.take(len(self.text)))
                return ""
            yield
