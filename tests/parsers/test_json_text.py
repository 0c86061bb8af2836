"""JSON that is copied and mended as it arrives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microvllm.openai_compat.parsers.json_text import JsonText

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


def copy(text: str, size: int = 10**9) -> str:
    value, out = JsonText(), ""
    for start in range(0, len(text), size):
        piece, end = value.feed(text[start : start + size], 0)
        out += piece
        if value.done:
            assert start + end <= len(text)
            return out
    return out + value.finish()


@given(st.dictionaries(st.text(), VALUES) | st.lists(VALUES), st.booleans(), st.sampled_from((None, 2)))
@settings(max_examples=50, deadline=None)
def test_valid_json_is_copied(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert copy(text) == copy(text, 1) == copy(text, 3) == text


@given(st.text(alphabet="{}[]\",:=\\u0a1-tn' \n.e"))
@settings(max_examples=300, deadline=None)
def test_whatever_stands_there_becomes_valid_json(text: str) -> None:
    whole = copy("{" + text)
    json.loads(whole)
    assert copy("{" + text, 1) == whole


@given(st.text(alphabet="{}[]\",:\\u0a1-tn' \n.e", max_size=30))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_the_beginning_of_valid_json(text: str) -> None:
    out, value = "", JsonText()
    for char in "{" + text:
        out += value.feed(char, 0)[0]
        # A reader of valid JSON only finds nothing to mend in it, and completes it.
        again = JsonText()
        assert out.startswith(again.feed(out, 0)[0])
        json.loads(copy(out))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('{"a": [1, {"b": 2', {"a": [1, {"b": 2}]}),
        ('{"a": "never closed', {"a": "never closed"}),
        ('{"a": 1,}', {"a": 1}),
        ('{"a": [1, 2,], }', {"a": [1, 2]}),
        ('{"a": 1\n"b": "x"\n"c": 2}', {"a": 1, "b": "x", "c": 2}),
        ('{"a": [1}', {"a": [1]}),
        ('{"a": "one\ntwo\tthree"}', {"a": "one\ntwo\tthree"}),
        (r'{"a": "\d+\.\w"}', {"a": r"\d+\.\w"}),
        (r'{"a": "\u12"}', {"a": r"\u12"}),
        ("{'a': 'it\\'s \"x\"', 'b': True, 'c': None}", {"a": 'it\'s "x"', "b": True, "c": None}),
        ('{"a": }', {"a": None}),
        ('{"a"}', {"a": None}),
        ("{a: b c, d: 01}", {"a": "b c", "d": "01"}),
        ('{"a": [,1,,2]}', {"a": [1, 2]}),
        ('{"a": {]}}', {"a": {}}),
        ('{"a": "print("x y")", "b": "say "no" now"}', {"a": 'print("x y")', "b": 'say "no" now'}),
        ("{'a': 'it's', 'b': 1}", {"a": "it's", "b": 1}),
        ('{"a": "the "x": y", "b" : 1}', {"a": 'the "x": y', "b": 1}),
        ('{"a": "one "\n)" }', {"a": 'one "\n)'}),
        ('{"a": "one "', {"a": "one "}),
    ],
)
def test_mended(written: str, meant: Any) -> None:
    assert json.loads(copy(written)) == json.loads(copy(written, 1)) == meant
