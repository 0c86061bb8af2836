"""Grammars of calls that must be made, or by their schema."""

from __future__ import annotations

import json

import pytest
from parser_tools import FUNCTIONS

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.grammars import tool_grammar
from microvllm.openai_compat.parsers.registry import TOOL_FORMATS
from microvllm.runtime.errors import InvalidRequestError

NAMES = pytest.mark.parametrize("name", TOOL_FORMATS)


@NAMES
def test_only_strict_functions_need_a_grammar_with_auto(name: str) -> None:
    form = TOOL_FORMATS[name]
    assert tool_grammar(form, FUNCTIONS, "auto") is None
    strict = Function("f", {"type": "object", "properties": {"a": {"type": "integer"}}}, strict=True)
    made = tool_grammar(form, (*FUNCTIONS, strict), "auto", parallel=False)
    assert made is not None and made.kind == "structural_tag"
    output = json.loads(made.spec)["format"]
    assert output["type"] == "triggered_tags" and output["stop_after_first"]
    assert all(any(tag["begin"].startswith(t) for t in output["triggers"]) for tag in output["tags"])


def test_a_strict_text_that_cannot_be_enforced_is_refused() -> None:
    """Between tags a text is free; in JSON any schema is enforced."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a$"}}}
    with pytest.raises(InvalidRequestError, match="`pattern` of the argument 'a' of the strict function 'f'"):
        tool_grammar(TOOL_FORMATS["qwen3_coder"], [Function("f", schema, strict=True)], "auto")
    assert tool_grammar(TOOL_FORMATS["qwen3_coder"], [Function("f", schema)], "required")
    assert tool_grammar(TOOL_FORMATS["hermes"], [Function("f", schema, strict=True)], "auto")
