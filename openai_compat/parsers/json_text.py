"""Copies a JSON value out of a text that arrives in pieces, and mends it where a model wrote it wrong.

Valid JSON is copied character by character. What models get wrong has one meaning and gets it: a bracket or
quote that is missing at the end, a comma too many or too few, a line break, quote or backslash in a string,
and Python's spelling (single quotes, True, None). Anything else that is no JSON becomes a string. So what was
written is the beginning of valid JSON at every point, and `finish` makes it whole.
"""

from __future__ import annotations

import json
import re
import sys

NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
PLAIN = {quote: re.compile(rf'[^"\\\x00-\x1f{quote}]+') for quote in "\"'"}
ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
DIGITS = {"u": 6, "x": 4, "U": 10}  # the whole length of an escape sequence; the last two are Python's
HEX = "0123456789abcdefABCDEF"
OPENED_BY = {"}": "{", "]": "["}
CLOSED_BY = {"{": "}", "[": "]"}
VALUE, KEY, COLON, AFTER = range(4)


class JsonText:
    """One JSON value, from its first character to its last; `done` says that it is whole.

    `closer` ends an object, too.
    """

    __slots__ = (
        "_bare",
        "_closers",
        "_comma",
        "_ending",
        "_ends",
        "_escape",
        "_is_key",
        "_open",
        "_out",
        "_quote",
        "_stack",
        "_state",
        "done",
    )

    def __init__(self, closer: str = "}") -> None:
        self._closers = {"}", "]", closer}
        self._ends = frozenset(",\n") | self._closers  # of a number or word
        self._stack: list[str] = []
        self._open = {"{": 0, "[": 0}  # brackets of each kind on the stack
        self._state = VALUE
        self._quote = ""  # of the string that is being read
        self._escape = ""  # a backslash and what was read of its sequence
        self._ending: list[str] = []  # a quote that may end the string, and the space behind it
        self._is_key = False
        self._bare: list[str] = []  # a number or word that is being read
        self._comma = ""  # with the space behind it: not written in front of a closing bracket
        self._out: list[str] = []
        self.done = False

    def feed(self, text: str, position: int, stops: str = "") -> tuple[str, int]:
        """Read from `position` on; return the JSON text, and the position behind what was read.

        That is the end of `text`, the end of the value (of a number or word: what ends it is not read), or a
        character of `stops` outside of a string.
        """
        while position < len(text) and not self.done:
            if self._quote and not (self._ending and text[position] in stops):
                position = self._string(text, position)
            elif text[position] in stops:
                break
            elif self._bare and not self._stack and text[position] in self._ends:
                self._end_bare()
            else:
                self._step(text[position])
                position += 1
        return self._flush(), position

    def step(self, char: str) -> str:
        """Read one character, whatever it is."""
        return self.feed(char, 0)[0]

    def finish(self) -> str:
        """Write what the value lacks to be whole, and return it."""
        if self._quote:
            self._end_escape()
            self._end_string()
            self._ending.clear()
        if not self.done:
            self._end_bare()
        while not self.done:
            self._close("}" if self._stack and self._stack[-1] == "{" else "]")
        return self._flush()

    def _flush(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        return text

    # ---- strings ------------------------------------------------------------------------------------

    def _string(self, text: str, position: int) -> int:
        """Read on in a string; return the position behind what was read."""
        if self._ending:
            return self._decide_ending(text, position)
        if self._escape:
            return self._escaped(text, position)
        match = PLAIN[self._quote].match(text, position)
        if match is not None:
            self._out.append(match.group())
            return match.end()
        char = text[position]
        if char == self._quote and self._stack:
            self._ending.append(char)
        elif char == self._quote:
            self._end_string()
        elif char == "\\":
            self._escape = char
        else:  # a control character, or the other kind of quote
            self._out.append(json.dumps(char)[1:-1])
        return position + 1

    def _decide_ending(self, text: str, position: int) -> int:
        """Read on behind a quote: it ends the string if what may come behind a string does."""
        char = text[position]
        if char in " \t\r\n":
            self._ending.append(char)
            return position + 1
        is_end = char in (",:" if self._is_key else ",") or char in self._closers
        is_end = is_end or (char in "\"'" and "\n" in self._ending)  # a comma is missing
        seen = self._ending[:]
        self._ending.clear()
        if is_end:
            self._end_string()
            for space in seen[1:]:
                self._step(space)
        else:
            self._out.append(json.dumps("".join(seen))[1:-1])
        return position

    def _escaped(self, text: str, position: int) -> int:
        if len(self._escape) > 1 and text[position] not in HEX:  # \u without its four digits
            self._end_escape()
            return position
        self._escape += text[position]
        kind = self._escape[1]
        if len(self._escape) < DIGITS.get(kind, 0):
            return position + 1
        if ESCAPE.fullmatch(self._escape):
            self._out.append(self._escape)
        elif kind == "'":
            self._out.append(kind)
        elif kind in DIGITS and (code := int(self._escape[2:], 16)) <= sys.maxunicode:
            self._out.append(json.dumps(chr(code), ensure_ascii=False)[1:-1])
        else:  # a lone backslash, as in the regular expression \d
            self._out.append(json.dumps(self._escape)[1:-1])
        self._escape = ""
        return position + 1

    def _end_escape(self) -> None:
        self._out.append(json.dumps(self._escape)[1:-1])
        self._escape = ""

    def _end_string(self) -> None:
        self._out.append('"')
        self._quote = ""
        self._state = COLON if self._is_key else AFTER
        self.done = not self._stack

    # ---- everything else ----------------------------------------------------------------------------

    def _step(self, char: str) -> None:
        if self._bare:
            if char not in self._ends and not (self._is_key and char in ":="):
                self._bare.append(char)
                return
            self._end_bare()
        if char in " \t\r\n":
            if self._comma:
                self._comma += char
            else:
                self._out.append(char)
        elif char in self._closers:
            self._close("]" if char == "]" else "}")
        elif self._state == AFTER:
            self._comma = ","
            self._state = KEY if self._stack[-1] == "{" else VALUE
            if char != ",":
                self._step(char)
        elif self._state == COLON:
            self._out.append(":" if char == ":" else ": ")
            self._state = VALUE
            if char not in ":=":
                self._step(char)
        elif char == "," and self._stack:
            self._missing_value()
            if self._state == AFTER:
                self._step(char)
        else:
            self._begin(char)

    def _begin(self, char: str) -> None:
        """Begin a key or value with its first character."""
        self._out.append(self._comma)
        self._comma = ""
        self._is_key = self._state == KEY
        if char in "\"'":
            self._out.append('"')
            self._quote = char
        elif char in "{[" and not self._is_key:
            self._out.append(char)
            self._stack.append(char)
            self._open[char] += 1
            self._state = KEY if char == "{" else VALUE
        else:
            self._bare.append(char)

    def _end_bare(self) -> None:
        if not self._bare:
            return
        text = "".join(self._bare)
        self._bare.clear()
        word = text.rstrip()
        space = text[len(word) :]
        if self._is_key:
            word = json.dumps(word, ensure_ascii=False)
        elif not NUMBER.fullmatch(word):
            word = WORDS.get(word) or json.dumps(word, ensure_ascii=False)
        self._out.append(word + space)
        self._state = COLON if self._is_key else AFTER
        self.done = not self._stack

    def _missing_value(self) -> None:
        """Write null behind a key that has no value."""
        if self._state == COLON:
            self._out.append(":")
            self._state = VALUE
        if self._state == VALUE and self._stack and self._stack[-1] == "{":
            self._out.append("null")
            self._state = AFTER

    def _close(self, char: str) -> None:
        """Close brackets up to the one that `char` closes; nothing if none is open."""
        opener = OPENED_BY[char]
        if not self._stack:
            self._out.append("null")
            self.done = True
            return
        while self._open[opener]:
            self._missing_value()
            self._comma = ""
            last = self._stack.pop()
            self._open[last] -= 1
            self._out.append(CLOSED_BY[last])
            self._state = AFTER
            if last == opener:
                break
        self.done = not self._stack
