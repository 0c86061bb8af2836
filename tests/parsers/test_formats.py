"""Every format of calls: what its template writes is read back, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from call_formats import FORMATS, MORE_FORMATS, harmony
from hypothesis import given, settings
from hypothesis import strategies as st
from parser_tools import FUNCTIONS, argument_pieces, calls_of, check_splits, events_of, parse

from microvllm.openai_compat.parsers.events import Function, fold

ARGUMENTS = {
    "path": "ä/日本/😀.txt",
    "text": "x = {\"a\": [1]}\n\t</tool_call> <tool_call> \\n \\ 'q' <b> [TOOL_CALLS",
    "mode": -12,
    "tags": ["a, b", {"c": [None, True, 1.5]}, []],
}
CALLS = [("write_file", ARGUMENTS), ("get_time", {}), ("get_weather", {"city": "Oslo", "days": 3})]
CASES = pytest.mark.parametrize("case", FORMATS)
OPEN = {  # a call and the beginning of a second: a limit of tokens may end anywhere in it
    case: render(
        [("get_time", {}), ("write_file", {"path": "a", "mode": 1, "text": "b c", "tags": [1, "x"]})]
    )
    for case, (_, render) in FORMATS.items()
}


@pytest.mark.parametrize("case", {**FORMATS, **MORE_FORMATS})
def test_text_around_calls(case: str) -> None:
    name, render = {**FORMATS, **MORE_FORMATS}[case]
    text = f"Let me see: 1 < 2, [x] {{y}}.\n\n{render(CALLS)}\n\nDone, [1] {{z}} <b>."
    message = check_splits(text, (name, None))
    assert calls_of(message) == CALLS
    written_ids = {"mistral_v13": "abcdefgh0", "kimi_k2": "functions.write_file:0"}
    assert message.tool_calls[0].id == written_ids.get(case, "id0")
    assert message.content == "Let me see: 1 < 2, [x] {y}.\n\nDone, [1] {z} <b>."


@CASES
def test_text_between_calls(case: str) -> None:
    name, render = FORMATS[case]
    text = f"{render(CALLS[:1])}\nThen:\n{render(CALLS[1:])}"
    message = parse(text, (name, None))
    assert message == fold(events_of(text, (name, None)))
    assert calls_of(message) == CALLS and message.content == "Then:"


@CASES
def test_json_is_copied_and_all_arguments_stream(case: str) -> None:
    name, render = FORMATS[case]
    events = events_of(render([("write_file", {"path": "a", "text": "one two three"})]), (name, None))
    pieces = argument_pieces(events)
    assert "".join(pieces) == '{"path": "a", "text": "one two three"}'
    assert len(pieces) > 12 and max(map(len, pieces)) < 12


@CASES
@pytest.mark.parametrize("cut_off", [True, False])
def test_an_output_may_end_anywhere(case: str, cut_off: bool) -> None:
    """What is there is the beginning of the arguments, and the whole of some if the model ended by itself."""
    name, text = FORMATS[case][0], OPEN[case]
    whole = calls_of(parse(text, (name, None)))
    for end in range(len(text)):
        message = parse(text[:end], (name, None), cut_off=cut_off)
        for call, (function, arguments) in zip(message.tool_calls, whole, strict=False):
            assert call.name == function
            if not cut_off:  # an unfinished key may be there, too
                assert len(json.loads(call.arguments).keys() - arguments.keys()) <= 1
            else:
                assert json.dumps(arguments).startswith(call.arguments)
        if not message.tool_calls:
            assert (message.content or "").strip() == text[:end].strip()


@pytest.mark.parametrize("case", {**FORMATS, **MORE_FORMATS})
def test_an_output_that_ends_in_a_tag_shows_no_part_of_it(case: str) -> None:
    name, render = {**FORMATS, **MORE_FORMATS}[case]
    text = render([("write_file", {"path": "a", "mode": 1})])
    for end in range(len(text)):
        message = parse(text[:end], (name, None), cut_off=True)
        assert not message.tool_calls or message.content is None, text[:end]


@pytest.mark.parametrize("case", {**FORMATS, **MORE_FORMATS})
def test_a_further_call_that_a_limit_cuts_off_before_its_name_is_no_text(case: str) -> None:
    name, render = {**FORMATS, **MORE_FORMATS}[case]
    if name == "openai":
        pytest.skip("an output has one call")
    text = render([("get_time", {}), ("get_weather", {"city": "x"})])
    for end in range(len(text)):
        message = parse(text[:end], (name, None), cut_off=True)
        assert not message.tool_calls or message.content is None, text[:end]
        assert fold(events_of(text[:end], (name, None), cut_off=True)) == message
    message = parse(f"{text} Well.", (name, None), cut_off=True)
    assert message.content is None or message.content.strip() == "Well."


@pytest.mark.parametrize("case", {**FORMATS, **MORE_FORMATS})
def test_names(case: str) -> None:
    name, render = {**FORMATS, **MORE_FORMATS}[case]
    function = Function("ä@b+c/d:e.f-g_1#")
    message = parse(render([(function.name, {})]), (name, None), tools=[function])
    assert calls_of(message) == [(function.name, {})]


@CASES
def test_undeclared_names(case: str) -> None:
    """Where a call cannot be mistaken the client sees it; elsewhere it is text."""
    name, render = FORMATS[case]
    text = render([("unknown", {"a": 1})])
    message = check_splits(text, (name, None))
    if case in ("llama3_json", "pythonic", "llama4_pythonic"):
        assert message.content == text and not message.tool_calls
    else:
        assert calls_of(message) == [("unknown", {"a": 1})] and message.content is None


KEYS = st.sampled_from(("path", "text", "mode", "tags"))
TEXTS = st.text(
    st.sampled_from("ab \n\"'\\<>/{}[]=,:;()|`é日😀_") | st.characters(exclude_categories=("Cs", "Cc"))
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
WRITE_FILE = st.fixed_dictionaries(
    {}, optional={"path": TEXTS, "text": TEXTS, "mode": st.integers(), "tags": st.lists(VALUES, max_size=3)}
)


@CASES
@given(st.lists(WRITE_FILE, min_size=1, max_size=3), st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_any_arguments(case: str, several: list[dict[str, Any]], size: int) -> None:
    name, render = FORMATS[case]
    calls = [("write_file", arguments) for arguments in several]
    text = render(calls)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    events = events_of(pieces, (name, None))
    message = parse(text, (name, None))
    assert events_of([text], (name, None)) and calls_of(message) == calls, text
    assert "".join(argument_pieces(events)) == "".join(call.arguments for call in message.tool_calls)


@CASES
@given(st.text(alphabet="<>/|=[](){}\"':;,. \nabtool_calfunigpr012"), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_any_text(case: str, text: str, size: int) -> None:
    """Text without a call comes back as it is."""
    name, _ = FORMATS[case]
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for message in (parse(text, (name, "qwen3")), parse("".join(pieces), (name, "qwen3"))):
        assert not message.tool_calls and (message.content or "") == text


PIECES = st.sampled_from(
    ("<", "{", "}", "]", '"', "\\", ",", "\n", " x", "<tool_call>", "</tool_call>", "</think>")
)


@CASES
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_whatever_a_model_gets_wrong(case: str, data: st.DataObject) -> None:
    """However a call is broken: arguments are valid JSON, and a stream equals a whole."""
    name, text = FORMATS[case][0], OPEN[case]
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 4)))
        text = text[:start] + data.draw(PIECES) + text[end:]
    size, cut_off = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    whole = parse(text, (name, "qwen3"), cut_off=cut_off)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert fold(events_of(pieces, (name, "qwen3"), cut_off=cut_off)) == whole, text
    for call in whole.tool_calls:
        if not cut_off:
            assert isinstance(json.loads(call.arguments), dict), text
        else:
            assert call.arguments == "" or call.arguments.startswith("{")
    assert whole.tool_calls or whole.content or whole.reasoning or not text.strip()


HARMONY = ("openai", "openai_gptoss")


def test_harmony() -> None:
    reasoning = "<|channel|>analysis<|message|>Hm, 1 < 2.<|end|><|start|>assistant"
    message = check_splits(reasoning + "<|channel|>final<|message|>Yes.<|return|>", HARMONY)
    assert (message.reasoning, message.content) == ("Hm, 1 < 2.", "Yes.")
    preamble = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    message = check_splits(reasoning + preamble + harmony(CALLS), HARMONY)
    assert (message.reasoning, message.content) == ("Hm, 1 < 2.", "I look.")
    assert calls_of(message) == CALLS


@pytest.mark.parametrize(
    "text",
    [
        '<|channel|>analysis to=functions.get_time code<|message|>{"a": 1}<|call|>',
        '<|start|>assistant to=functions.get_time<|channel|>commentary json<|message|>{"a": 1}',
        '<|channel|>commentary to=get_time <|constrain|>json<|message|>{"a": 1<|call|>',
    ],
)
def test_harmony_recipients(text: str) -> None:
    assert calls_of(check_splits(text, HARMONY)) == [("get_time", {"a": 1})]


def test_harmony_without_tools_and_without_channels() -> None:
    text = "<|channel|>final<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B"
    assert check_splits(text, (None, "openai_gptoss"), tools=()).content == "A\n\nB"
    assert check_splits("Just text.", HARMONY).content == "Just text."
    assert check_splits("<|channel|>commentary to=functions.get_t", HARMONY).content is None


def test_functions_of_the_tests_are_used() -> None:
    assert {function.name for function in FUNCTIONS} == {name for name, _ in CALLS}
