"""Names the formats of calls and of reasoning, and makes parsers of them."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping, Sequence

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.harmony import HARMONY, HARMONY_THINKING, HarmonyCalls, harmony
from microvllm.openai_compat.parsers.json_calls import JsonCalls
from microvllm.openai_compat.parsers.named_calls import DEEPSEEK_V3, DEEPSEEK_V31, MISTRAL
from microvllm.openai_compat.parsers.output import CallGrammar, OutputParser, Thinking, tagged
from microvllm.openai_compat.parsers.pythonic import LLAMA4_PYTHONIC, PYTHONIC
from microvllm.openai_compat.parsers.writer import Writer, call_id
from microvllm.openai_compat.parsers.xml_calls import DEEPSEEK_V4, DEEPSEEK_V32, GLM45, GLM47, QWEN3_CODER

AUTO = "auto"
HERMES = JsonCalls(("<tool_call>",), "</tool_call>", around=("<tool_call>\n", "\n</tool_call>"))
LLAMA3_JSON = JsonCalls(("<|python_tag|>",), bare=("{",), separator="; ", key="parameters")
# By vLLM's names.
TOOL_FORMATS: Mapping[str, CallGrammar | HarmonyCalls] = {
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "deepseek_v32": DEEPSEEK_V32,
    "deepseek_v4": DEEPSEEK_V4,
    "glm45": GLM45,
    "glm47": GLM47,
    "hermes": HERMES,
    "llama3_json": LLAMA3_JSON,
    "llama4_json": LLAMA3_JSON,
    "llama4_pythonic": LLAMA4_PYTHONIC,
    "mistral": MISTRAL,
    "openai": HARMONY,
    "pythonic": PYTHONIC,
    "qwen3_coder": QWEN3_CODER,
    "qwen3_json": HERMES,
    "qwen3_xml": QWEN3_CODER,
}
THINK = Thinking("<think>", "</think>")
REASONING_FORMATS: Mapping[str, Thinking] = {
    "deepseek_r1": Thinking("<think>", "</think>", implied=True),
    "deepseek_v3": THINK,
    "deepseek_v4": THINK,
    "glm45": THINK,
    "glm47": THINK,
    "holo2": THINK,
    "mistral": Thinking("[THINK]", "[/THINK]"),
    "openai_gptoss": HARMONY_THINKING,
    "qwen3": THINK,
}


def make_parser(
    tool_format: str | None,
    reasoning_format: str | None,
    *,
    tools: Sequence[Function] = (),
    prompt_ends_in_reasoning: bool | None = None,
    parallel: bool = True,
    new_id: Callable[[], str] | None = None,
) -> OutputParser:
    """Return a parser of one output; the formats are keys of the tables above.

    Without `tools` nothing is a call. `prompt_ends_in_reasoning` is what `ends_in_reasoning` says of the
    prompt; None leaves it to the format. Unless `parallel`, calls after the first are dropped.
    """
    calls = TOOL_FORMATS[tool_format] if tool_format is not None and tools else None
    thinking = REASONING_FORMATS[reasoning_format] if reasoning_format is not None else None
    if new_id is None:
        new_id = mistral_id if calls is MISTRAL else call_id
    writer = Writer({tool.name: tool for tool in tools}, new_id, parallel)
    if isinstance(calls, HarmonyCalls) or thinking is HARMONY_THINKING:
        return OutputParser(harmony, writer)
    return OutputParser(tagged(thinking, calls, opened=prompt_ends_in_reasoning), writer)


def mistral_id() -> str:
    """Return a new id of a call: Mistral's templates refuse any that has not nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


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
