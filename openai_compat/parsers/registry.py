"""Names the formats of calls and of reasoning, and makes parsers of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.json_calls import HERMES
from microvllm.openai_compat.parsers.output import CallGrammar, OutputParser, Thinking, tagged
from microvllm.openai_compat.parsers.writer import Writer, call_id

AUTO = "auto"
THINK = Thinking("<think>", "</think>")
TOOL_FORMATS: Mapping[str, CallGrammar] = {"hermes": HERMES}
REASONING_FORMATS: Mapping[str, Thinking] = {
    "qwen3": THINK,
    "deepseek_r1": Thinking("<think>", "</think>", implied=True),
}


def make_parser(
    tool_format: str | None,
    reasoning_format: str | None,
    *,
    tools: Sequence[Function] = (),
    prompt_ends_in_reasoning: bool | None = None,
    parallel: bool = True,
    new_id: Callable[[], str] = call_id,
) -> OutputParser:
    """Return a parser of one output.

    Without `tools` nothing is a call. `prompt_ends_in_reasoning` is what `ends_in_reasoning` says of the
    prompt; None leaves it to the format. Unless `parallel`, calls after the first are dropped.
    """
    calls = TOOL_FORMATS[tool_format] if tool_format is not None and tools else None
    thinking = REASONING_FORMATS[reasoning_format] if reasoning_format is not None else None
    writer = Writer({tool.name: tool for tool in tools}, new_id, parallel)
    return OutputParser(tagged(thinking, calls, opened=prompt_ends_in_reasoning), writer)


def ends_in_reasoning(reasoning_format: str | None, prompt: str) -> bool | None:
    """Return whether a prompt ends within reasoning (True) or right behind it (False); None if with neither.

    A template opens the reasoning of the answer, or closes it if there is to be none.
    """
    if reasoning_format is None:
        return None
    thinking = REASONING_FORMATS[reasoning_format]
    end = prompt.rstrip()
    return True if end.endswith(thinking.start) else False if end.endswith(thinking.end) else None


def detect_formats(chat_template: str) -> tuple[str | None, str | None]:
    """Return the formats of calls and of reasoning that a chat template shows."""
    tool = "hermes" if "<tool_call>" in chat_template else None
    return tool, "qwen3" if "</think>" in chat_template else None
