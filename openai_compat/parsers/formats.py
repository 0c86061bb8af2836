"""Lists the formats of calls and of reasoning by vLLM's names; `mistral_v11` is one of ours."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from microvllm.openai_compat.parsers.harmony import HARMONY_THINKING, HarmonyCalls
from microvllm.openai_compat.parsers.json_calls import JsonCalls
from microvllm.openai_compat.parsers.named_calls import MistralCalls, NamedCalls
from microvllm.openai_compat.parsers.output import CallGrammar, Thinking
from microvllm.openai_compat.parsers.pythonic import PythonicCalls
from microvllm.openai_compat.parsers.xml_calls import XmlCalls

HERMES = JsonCalls(("<tool_call>",), "</tool_call>", around=("<tool_call>\n", "\n</tool_call>"))
LLAMA3_JSON = JsonCalls(("<|python_tag|>",), bare=("{",), separator="; ", key="parameters")
QWEN3_CODER = XmlCalls(
    ("<tool_call>", "</tool_call>"),
    ("<function=", ">", "</function>"),
    ("<parameter=", "</parameter>"),
    (">",),
    own_lines=True,
    one_each=True,
)
GLM45 = XmlCalls(
    ("", ""),
    ("<tool_call>", "", "</tool_call>"),
    ("<arg_key>", "</arg_value>"),
    ("</arg_key>",),
    value="<arg_value>",
)
DEEPSEEK_V31 = NamedCalls(
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    "<｜tool▁sep｜>",
)
DEEPSEEK_V4 = XmlCalls(
    ("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
    ('<｜DSML｜invoke name="', '">', "</｜DSML｜invoke>"),
    ('<｜DSML｜parameter name="', "</｜DSML｜parameter>"),
    ('" string="true">', '" string="false">', '">'),
)
TOOL_FORMATS: Mapping[str, CallGrammar | HarmonyCalls] = {
    "deepseek_v3": replace(DEEPSEEK_V31, separator="\n", fenced=True),
    "deepseek_v31": DEEPSEEK_V31,
    "deepseek_v32": replace(DEEPSEEK_V4, section=("<｜DSML｜function_calls>", "</｜DSML｜function_calls>")),
    "deepseek_v4": DEEPSEEK_V4,
    "glm45": GLM45,
    "glm47": replace(GLM45, line=""),
    "granite": JsonCalls(("<|tool_call|>", "<tool_call>"), wrap=("<|tool_call|>[", "]"), separator=", "),
    "granite4": HERMES,
    "granite-20b-fc": JsonCalls(("<function_call>",), around=("<function_call> ", "")),
    "hermes": HERMES,
    "internlm": JsonCalls(
        ("<|action_start|><|plugin|>",),
        "<|action_end|>",
        around=("<|action_start|><|plugin|>\n", "<|action_end|>"),
        key="parameters",
    ),
    "jamba": JsonCalls(
        ("<tool_calls>",), "</tool_calls>", wrap=("<tool_calls>[", "]</tool_calls>"), separator=", "
    ),
    "kimi_k2": NamedCalls(
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        ("<|tool_call_begin|>", "<|tool_call_end|>"),
        "<|tool_call_argument_begin|>",
        numbered=True,
    ),
    "llama3_json": LLAMA3_JSON,
    "llama4_json": LLAMA3_JSON,
    "llama4_pythonic": PythonicCalls(("<|python_start|>", "<|python_end|>")),
    "longcat": JsonCalls(
        ("<longcat_tool_call>",),
        "</longcat_tool_call>",
        around=("<longcat_tool_call>\n", "\n</longcat_tool_call>"),
    ),
    "mimo": replace(QWEN3_CODER, own_lines=False),
    "minimax_m2": XmlCalls(
        ("<minimax:tool_call>", "</minimax:tool_call>"),
        ('<invoke name="', '">', "</invoke>"),
        ('<parameter name="', "</parameter>"),
        ('">',),
    ),
    "mistral": MistralCalls(),
    "mistral_v11": MistralCalls(named=True),
    "olmo3": PythonicCalls(("<function_calls>", "</function_calls>"), listed=False),
    "openai": HarmonyCalls(),
    "phi4_mini_json": JsonCalls(("functools[",), wrap=("functools[", "]"), separator=", "),
    "pythonic": PythonicCalls(),
    "qwen3_coder": QWEN3_CODER,
    "qwen3_json": HERMES,
    "qwen3_xml": QWEN3_CODER,
    "seed_oss": replace(QWEN3_CODER, section=("<seed:tool_call>", "</seed:tool_call>"), own_lines=False),
    "step3p5": QWEN3_CODER,
    "step5": QWEN3_CODER,
}
THINK = Thinking("<think>", "</think>")
IMPLIED_THINK = replace(THINK, implied=True)
REASONING_FORMATS: Mapping[str, Thinking] = {
    "deepseek_r1": IMPLIED_THINK,
    "deepseek_v3": THINK,
    "deepseek_v4": THINK,
    "glm45": THINK,
    "glm47": THINK,
    "granite_thinking_parser": THINK,
    "holo2": THINK,
    "kimi_k2": THINK,
    "mimo": THINK,
    "minimax_m2": IMPLIED_THINK,
    "mistral": Thinking("[THINK]", "[/THINK]"),
    "nemotron_v3": THINK,
    "olmo3": IMPLIED_THINK,
    "openai_gptoss": HARMONY_THINKING,
    "qwen3": THINK,
    "seed_oss": Thinking("<seed:think>", "</seed:think>"),
    "step3": IMPLIED_THINK,
    "step3p5": IMPLIED_THINK,
    "step5": IMPLIED_THINK,
}
