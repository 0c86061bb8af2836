"""The names of formats, and what chat templates show of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from call_formats import FORMATS, MORE_FORMATS

from microvllm.openai_compat.parsers.formats import REASONING_FORMATS, TOOL_FORMATS
from microvllm.openai_compat.parsers.harmony import TAGS
from microvllm.openai_compat.parsers.registry import (
    SHOWN_REASONING,
    SHOWN_TOOLS,
    detect_formats,
    ends_in_reasoning,
    make_parser,
    tokens_of,
)

CALL = [("f", {"a": "b"})]


def test_every_format_is_tested() -> None:
    """Names of one and the same grammar stand for each other."""
    tested = {id(TOOL_FORMATS[name]) for name, _ in {**FORMATS, **MORE_FORMATS}.values()}
    assert {name for name, form in TOOL_FORMATS.items() if id(form) not in tested} == {"openai"}


def test_the_documentation_names_every_format() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text("utf-8")
    calls, reasoning = page.split("\n## Reasoning\n")
    for text, table in ((calls, TOOL_FORMATS), (reasoning, REASONING_FORMATS)):
        rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        names = [name for row in rows for name in re.findall("`([^`]+)`", row) if not name.startswith("--")]
        assert sorted(names) == sorted(table)


def test_names_that_templates_show_exist() -> None:
    assert {name for _, name in SHOWN_TOOLS} <= TOOL_FORMATS.keys()
    assert {name for _, name in SHOWN_REASONING} <= REASONING_FORMATS.keys()


@pytest.mark.parametrize("case", {**FORMATS, **MORE_FORMATS})
def test_a_template_that_writes_a_call_shows_its_format(case: str) -> None:
    """Or another name of the same tags. Those without tags are shown by what templates explain."""
    name, render = {**FORMATS, **MORE_FORMATS}[case]
    found, _ = detect_formats(f"{{% for message in messages %}}{render(CALL)}{{% endfor %}}")
    explained = (
        "llama3_json",
        "pythonic",
        "olmo3",
        "granite-20b-fc",
        "internlm",
        "jamba",
        "mimo",
        "phi4_mini_json",
    )
    if name in explained and found is None:
        return
    assert found is not None and make_parser(found, None, tools=())
    assert TOOL_FORMATS[found].tokens == TOOL_FORMATS[name].tokens


@pytest.mark.parametrize(
    ("template", "formats"),
    [
        ("<tool_call></tool_call> <think></think>", ("hermes", "qwen3")),
        ("<tool_call><function=a><parameter=b></think>", ("qwen3_coder", "qwen3")),
        ("<|start|>assistant<|channel|>analysis<|message|>", ("openai", "openai_gptoss")),
        ("<tool_call>{function-name}\n<arg_key></think>", ("glm45", "qwen3")),
        ("<tool_call>{function-name}<arg_key></think>", ("glm47", "qwen3")),
        ("[TOOL_CALLS] [THINK][/THINK]", ("mistral", "mistral")),
        ("<｜Assistant｜></think>", (None, "deepseek_r1")),
        ("<｜Assistant｜></think> thinking <｜tool▁calls▁begin｜>", ("deepseek_v31", "deepseek_v3")),
        ('{"name": function name, "parameters": dictionary}', ("llama3_json", None)),
        ("[func_name1(a=1)] <|header_start|>", ("llama4_pythonic", None)),
        ("[func_name1(a=1)]", ("pythonic", None)),
        ("<|im_start|>assistant", (None, None)),
    ],
)
def test_what_templates_show(template: str, formats: tuple[str | None, str | None]) -> None:
    assert detect_formats(template) == formats


def test_the_tokens_that_a_parser_has_to_see() -> None:
    assert tokens_of("hermes", "qwen3") == {"<tool_call>", "</tool_call>", "<think>", "</think>"}
    assert tokens_of(None, "openai_gptoss") >= set(TAGS)
    assert tokens_of(None, None) == frozenset()


def test_the_prompt_says_where_it_ends() -> None:
    assert ends_in_reasoning("qwen3", "<|im_start|>assistant\n<think>\n") is True
    assert ends_in_reasoning("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n") is False
    assert ends_in_reasoning("qwen3", "<|im_start|>assistant\n") is None
    assert ends_in_reasoning(None, "<think>\n") is None


def test_ids() -> None:
    text = '[TOOL_CALLS][{"name": "f", "arguments": {}}]'
    from microvllm.openai_compat.parsers.events import Function, ToolCall

    events = make_parser("mistral", None, tools=[Function("f")]).feed(text)
    ids = [event.id for event in events if isinstance(event, ToolCall)]
    assert len(ids) == 1 and len(ids[0]) == 9 and ids[0].isalnum()
