"""Writes structural tags as a Lark grammar: free text in which tags hold a form.

Two descriptions are read. The older one, as in vLLM's `response_format`:

    {"structures": [{"begin": "<f>", "schema": {...}, "end": "</f>"}, ...], "triggers": ["<f"]}

The newer one is that of XGrammar's documentation, a tree of formats below `format`: `const_string`,
`json_schema`, `regex`, `any_text`, `sequence`, `or`, `tag`, `triggered_tags` and `tags_with_separator`. What
is not in this list is refused by name. With `at_least_one` the output begins with a tag. The `any_text` of a
tag may have `excludes`, the texts that it does not hold, and a member of ours, the `pattern` that it matches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.grammar.json_schema import prepare

MAX_DEPTH = 50
TEXT = r"/(?s:.*)/"


def literal(text: str, special: Mapping[str, int]) -> str:
    """Return the grammar's spelling of a text, in which the texts of special tokens stand for these."""
    if not special:
        return json.dumps(text, ensure_ascii=False)
    names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    pieces = re.split(f"({names})", text)
    spelt = [
        f"<[{special[piece]}]>" if index % 2 else json.dumps(piece, ensure_ascii=False)
        for index, piece in enumerate(pieces)
        if piece
    ]
    return " ".join(spelt) or '""'


class StructuralTags:
    """Collects the rules of one grammar; `special` maps the texts of special tokens to their ids."""

    def __init__(
        self, special: Mapping[str, int], whitespace: str | None, additional_properties: bool
    ) -> None:
        self._special = special
        self._options = whitespace, additional_properties
        self._rules: list[str] = []

    def grammar(self, tags: Any) -> str:
        """Return the Lark grammar of a description. Raises `InvalidRequestError` naming the member."""
        if not isinstance(tags, dict):
            raise InvalidRequestError("structural tags must be an object")
        if "format" in tags:
            start = self._format(tags["format"], "format", 0)
        else:
            structures = _list(tags, "structures", "structures")
            made = []
            for index, item in enumerate(structures):
                at = f"structures[{index}]"
                content = {"type": "json_schema", "json_schema": _member(item, "schema", (dict, bool), at)}
                made.append({"type": "tag", "content": content, **_only(item, ("begin", "end"))})
            start = self._triggered({"tags": made, "triggers": _list(tags, "triggers", "triggers")}, "", 0)
        return "\n".join([f"start: {start}", *self._rules])

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def _literal(self, text: str) -> str:
        return literal(text, self._special)

    def _format(self, value: Any, at: str, depth: int) -> str:
        """Return a name or an expression in brackets for a format."""
        kind = _member(value, "type", (str,), at)
        if depth > MAX_DEPTH:
            raise InvalidRequestError(f"{at} is nested more than {MAX_DEPTH} levels deep")
        formats: dict[str, Callable[[Any, str, int], str]] = {
            "const_string": self._constant,
            "json_schema": self._schema,
            "regex": self._regex,
            "any_text": self._text,
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
        }
        if kind not in formats:
            raise InvalidRequestError(f"{at}.type: {kind!r:.100} is not supported; {', '.join(formats)} are")
        return formats[kind](value, at, depth + 1)

    def _constant(self, value: Any, at: str, depth: int) -> str:
        return self._rule(self._literal(_member(value, "value", (str,), at)))

    def _schema(self, value: Any, at: str, depth: int) -> str:
        _known(value, ("type", "json_schema", "style"), at)
        if value.get("style", "json") != "json":
            raise InvalidRequestError(f"{at}.style: {value['style']!r:.100} is not supported")
        schema = prepare(_member(value, "json_schema", (dict, bool), at), *self._options)
        return self._rule(f"%json {json.dumps(schema)}")

    def _regex(self, value: Any, at: str, depth: int) -> str:
        from llguidance import regex_to_lark

        _known(value, ("type", "pattern"), at)
        return self._rule(f"/{regex_to_lark(_member(value, 'pattern', (str,), at), 'dws')}/")

    def _text(self, value: Any, at: str, depth: int) -> str:
        _known(value, ("type",), at)
        return self._rule(TEXT)

    def _sequence(self, value: Any, at: str, depth: int) -> str:
        elements = _list(value, "elements", f"{at}.elements")
        for index, item in enumerate(elements[:-1]):
            if isinstance(item, dict) and item.get("type") == "any_text":
                raise InvalidRequestError(
                    f"{at}.elements[{index}]: any_text must be last, or the content of a tag"
                )
        return self._rule(
            " ".join(self._format(item, f"{at}.elements[{i}]", depth) for i, item in enumerate(elements))
        )

    def _or(self, value: Any, at: str, depth: int) -> str:
        elements = _list(value, "elements", f"{at}.elements")
        return self._rule(
            " | ".join(self._format(item, f"{at}.elements[{i}]", depth) for i, item in enumerate(elements))
        )

    def _tag(self, value: Any, at: str, depth: int, trigger: str = "") -> str:
        """Return a tag without its trigger, the beginning of `begin`."""
        _known(value, ("type", "begin", "content", "end"), at)
        begin = _member(value, "begin", (str,), at)[len(trigger) :]
        end = _member(value, "end", (str, list), at)
        ends = [end] if isinstance(end, str) else end
        if not ends or not all(isinstance(item, str) for item in ends):
            raise InvalidRequestError(f"{at}.end must be a string or a list of strings")
        content = _member(value, "content", (dict,), at)
        if content.get("type") == "any_text" and any(ends):
            body = self._text_until(ends, _text_in_tag(content, f"{at}.content"))
        else:
            closing = " | ".join(self._literal(item) for item in ends)
            body = f"{self._format(content, f'{at}.content', depth)} ({closing})"
        return self._rule(f"{self._literal(begin)} {body}" if begin else body)

    def _text_until(self, ends: Sequence[str], text: str = TEXT) -> str:
        """Return a rule for text up to the first of some strings, which may hold special tokens."""
        rules = []
        for end in ends:
            spelt = self._literal(end)
            at = json.JSONDecoder().raw_decode(spelt)[1] if spelt.startswith('"') else 0
            if spelt[at:]:  # a special token, which no text has
                self._rules.append(f"T{len(self._rules)}: {text} {spelt[:at]}")
                rules.append(self._rule(f"T{len(self._rules) - 1} {spelt[at:]}"))
            else:
                rules.append(self._rule(f"{text} {spelt}", "[lazy]"))
        return rules[0] if len(rules) == 1 else f"({' | '.join(rules)})"

    def _triggered(self, value: Any, at: str, depth: int) -> str:
        """Free text in which each trigger must go on as one of the tags that begin with it."""
        prefix = f"{at}." if at else ""
        _known(value, ("type", "triggers", "tags", "at_least_one", "stop_after_first"), at)
        triggers = _list(value, "triggers", f"{prefix}triggers")
        tags = _list(value, "tags", f"{prefix}tags")
        if not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise InvalidRequestError(f"{prefix}triggers must be non-empty strings")
        by_trigger: dict[str, list[str]] = {}
        whole = []
        for index, tag in enumerate(tags):
            place = f"{prefix}tags[{index}]"
            begin = _member(tag, "begin", (str,), place)
            trigger = next((known for known in triggers if begin.startswith(known)), None)
            if trigger is None:
                raise InvalidRequestError(f"{place}.begin: {begin!r:.100} begins with none of the triggers")
            by_trigger.setdefault(trigger, []).append(self._tag(tag, place, depth, trigger))
            whole.append(f"{self._literal(trigger)} {by_trigger[trigger][-1]}")
        calls = [
            f"{self._text_until([trigger])} ({' | '.join(rests)})" for trigger, rests in by_trigger.items()
        ]
        call, first, text = self._rule(" | ".join(calls)), self._rule(" | ".join(whole)), self._rule(TEXT)
        if _flag(value, "stop_after_first", at):
            return first if _flag(value, "at_least_one", at) else self._rule(f"{call} | {text}")
        return self._rule(
            f"{first} {call}* {text}" if _flag(value, "at_least_one", at) else f"{call}* {text}"
        )

    def _separated(self, value: Any, at: str, depth: int) -> str:
        _known(value, ("type", "tags", "separator", "at_least_one", "stop_after_first"), at)
        tags = _list(value, "tags", f"{at}.tags")
        tag = self._rule(" | ".join(self._tag(item, f"{at}.tags[{i}]", depth) for i, item in enumerate(tags)))
        body = tag
        if not _flag(value, "stop_after_first", at):
            separator = _member(value, "separator", (str,), at)
            body = f"{tag} ({self._literal(separator)} {tag})*" if separator else f"{tag}+"
        return self._rule(body if _flag(value, "at_least_one", at) else f"({body})?")


def _text_in_tag(value: Any, at: str) -> str:
    """Return the expression of an `any_text` that is the content of a tag."""
    from llguidance import regex_to_lark

    _known(value, ("type", "pattern", "excludes"), at)
    text, excluded = TEXT, value.get("excludes") or []
    if value.get("pattern") is not None:
        text = f"/{regex_to_lark(_member(value, 'pattern', (str,), at), 'dws')}/"
    if not isinstance(excluded, list) or not all(isinstance(item, str) and item for item in excluded):
        raise InvalidRequestError(f"{at}.excludes must be a list of non-empty strings")
    if excluded:
        texts = " | ".join(json.dumps(item, ensure_ascii=False) for item in excluded)
        text = f"({text} & ~({TEXT} ({texts}) {TEXT}))"
    return text


def schemas_of_tags(tags: Any, begin: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each schema of a checked description with the text that begins the innermost tag around it."""
    if isinstance(tags, list):
        for item in tags:
            yield from schemas_of_tags(item, begin)
    elif isinstance(tags, dict):
        begin = tags["begin"] or begin if isinstance(tags.get("begin"), str) else begin
        for name in ("json_schema", "schema"):
            if name in tags:
                yield begin, tags[name]
        for name in ("format", "structures", "tags", "elements", "content"):
            yield from schemas_of_tags(tags.get(name), begin)


def _member(value: Any, name: str, kinds: tuple[type, ...], at: str) -> Any:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{at} must be an object")
    if not isinstance(value.get(name), kinds):
        words = " or ".join(
            {str: "a string", dict: "an object", bool: "a boolean", list: "a list"}[k] for k in kinds
        )
        raise InvalidRequestError(f"{at}.{name} must be {words}")
    return value[name]


def _list(value: Any, name: str, at: str) -> list[Any]:
    found = value.get(name)
    if not isinstance(found, list) or not found:
        raise InvalidRequestError(f"{at} must be a list that is not empty")
    return found


def _flag(value: Any, name: str, at: str) -> bool:
    found = value.get(name, False)
    if not isinstance(found, bool):
        raise InvalidRequestError(f"{at}.{name} must be true or false")
    return found


def _only(value: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: value[name] for name in names if name in value}


def _known(value: Any, names: Sequence[str], at: str) -> None:
    """Refuse members that change the meaning and are not implemented; null and false request nothing."""
    for name, item in value.items():
        if name not in names and item is not None and item is not False and item != []:
            raise InvalidRequestError(f"{at}.{name} is not supported")
