"""Makes parsers, by the names of formats or by what a chat template shows."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Sequence

from microvllm.openai_compat.parsers.events import Function
from microvllm.openai_compat.parsers.formats import REASONING_FORMATS, TOOL_FORMATS
from microvllm.openai_compat.parsers.harmony import HARMONY_THINKING, HarmonyCalls, harmony
from microvllm.openai_compat.parsers.named_calls import MistralCalls
from microvllm.openai_compat.parsers.output import OutputParser, tagged
from microvllm.openai_compat.parsers.writer import Writer, call_id

__all__ = [
    "AUTO",
    "REASONING_FORMATS",
    "TOOL_FORMATS",
    "detect_formats",
    "ends_in_reasoning",
    "make_parser",
    "tokens_of",
]
AUTO = "auto"
# What a chat template shows -> the format; the first that holds all of its texts counts.
SHOWN_TOOLS = (
    (("<|channel|>", "<|message|>"), "openai"),
    (("｜DSML｜", "function_calls>"), "deepseek_v32"),
    (("｜DSML｜", "tool_calls>"), "deepseek_v4"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral_v11"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<arg_key>", "{function-name}\n"), "glm45"),
    (("<arg_key>",), "glm47"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<longcat_tool_call>",), "longcat"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<|tool_call|>",), "granite"),
    (("<tool_call>",), "hermes"),
    (("<function_calls>", "pythonic"), "olmo3"),
    (("[func_name1(", "<|header_start|>"), "llama4_pythonic"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("[func_name1(",), "pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (('"name": function name, "parameters"',), "llama3_json"),
)
SHOWN_REASONING = (
    (("<|channel|>", "<|message|>"), "openai_gptoss"),
    (("[THINK]",), "mistral"),
    (("<seed:think>",), "seed_oss"),
    (("<minimax:tool_call>", "</think>"), "minimax_m2"),
    # DeepSeek's later templates open or close the reasoning themselves.
    (("<｜Assistant｜>", "</think>", "thinking"), "deepseek_v3"),
    (("<｜Assistant｜>", "</think>"), "deepseek_r1"),
    (("</think>",), "qwen3"),
)


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
        new_id = mistral_id if isinstance(calls, MistralCalls) else call_id
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


def tokens_of(tool_format: str | None, reasoning_format: str | None) -> frozenset[str]:
    """Return the texts of formats that may be special tokens, which a parser has to be given."""
    texts = TOOL_FORMATS[tool_format].tokens if tool_format is not None else ()
    if reasoning_format is not None:
        thinking = REASONING_FORMATS[reasoning_format]
        texts = (*texts, thinking.start, thinking.end)
        if thinking is HARMONY_THINKING:
            texts = (*texts, *TOOL_FORMATS["openai"].tokens)
    return frozenset(filter(None, texts))


def detect_formats(chat_template: str) -> tuple[str | None, str | None]:
    """Return the formats of calls and of reasoning that a chat template shows."""
    tool, reasoning = (
        next((name for texts, name in table if all(text in chat_template for text in texts)), None)
        for table in (SHOWN_TOOLS, SHOWN_REASONING)
    )
    return tool, reasoning
