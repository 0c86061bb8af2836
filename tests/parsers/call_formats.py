"""Writes calls as the chat templates of each format do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]
Render = Callable[[Sequence[Call]], str]
DEEPSEEK_CALLS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
DEEPSEEK_CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def plain(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)


def hermes(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n{dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in calls
    )


def qwen3_coder(calls: Sequence[Call]) -> str:
    written = []
    for name, arguments in calls:
        lines = [f"<parameter={key}>\n{plain(value)}\n</parameter>\n" for key, value in arguments.items()]
        written.append(f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>")
    return "\n".join(written)


def glm45(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>{name}\n"
        + "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{plain(value)}</arg_value>\n"
            for key, value in arguments.items()
        )
        + "</tool_call>"
        for name, arguments in calls
    )


def glm47(calls: Sequence[Call]) -> str:
    return "".join(
        f"<tool_call>{name}"
        + "".join(
            f"<arg_key>{key}</arg_key><arg_value>{plain(value)}</arg_value>"
            for key, value in arguments.items()
        )
        + "</tool_call>"
        for name, arguments in calls
    )


def dsml(calls: Sequence[Call], section: str = "function_calls") -> str:
    written = []
    for name, arguments in calls:
        lines = [
            f'<｜DSML｜parameter name="{key}" string="{dumps(isinstance(value, str))}">{plain(value)}'
            "</｜DSML｜parameter>\n"
            for key, value in arguments.items()
        ]
        written.append(f'<｜DSML｜invoke name="{name}">\n{"".join(lines)}</｜DSML｜invoke>\n')
    return f"<｜DSML｜{section}>\n{''.join(written)}</｜DSML｜{section}>"


def deepseek_v3(calls: Sequence[Call]) -> str:
    written = [
        f"{DEEPSEEK_CALL[0]}function<｜tool▁sep｜>{name}\n```json\n{dumps(arguments)}\n```{DEEPSEEK_CALL[1]}"
        for name, arguments in calls
    ]
    return DEEPSEEK_CALLS[0] + "\n".join(written) + DEEPSEEK_CALLS[1]


def deepseek_v31(calls: Sequence[Call]) -> str:
    written = [
        f"{DEEPSEEK_CALL[0]}{name}<｜tool▁sep｜>{dumps(arguments)}{DEEPSEEK_CALL[1]}"
        for name, arguments in calls
    ]
    return DEEPSEEK_CALLS[0] + "".join(written) + DEEPSEEK_CALLS[1]


def llama3_json(calls: Sequence[Call]) -> str:
    return "; ".join(dumps({"name": name, "parameters": arguments}) for name, arguments in calls)


def python_tag(calls: Sequence[Call]) -> str:
    return "<|python_tag|>" + llama3_json(calls)


def pythonic(calls: Sequence[Call]) -> str:
    written = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]
    return f"[{', '.join(written)}]"


def llama4_pythonic(calls: Sequence[Call]) -> str:
    return f"<|python_start|>{pythonic(calls)}<|python_end|>"


def mistral_v3(calls: Sequence[Call]) -> str:
    objects = [{"name": name, "arguments": arguments, "id": "abcdefghi"} for name, arguments in calls]
    return f"[TOOL_CALLS]{dumps(objects)}"


def mistral_v11(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}{dumps(arguments)}" for name, arguments in calls)


def mistral_v13(calls: Sequence[Call]) -> str:
    return "".join(
        f"[TOOL_CALLS]{name}[CALL_ID]abcdefgh{index}[ARGS]{dumps(arguments)}"
        for index, (name, arguments) in enumerate(calls)
    )


def harmony(calls: Sequence[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumps(arguments)}<|call|>"
        for name, arguments in calls
    )


def json_list(before: str, after: str) -> Render:
    return lambda calls: (
        before + dumps([{"name": name, "arguments": arguments} for name, arguments in calls]) + after
    )


def json_objects(before: str, after: str, key: str = "arguments") -> Render:
    return lambda calls: "\n".join(
        before + dumps({"name": name, key: arguments}) + after for name, arguments in calls
    )


def kimi_k2(calls: Sequence[Call]) -> str:
    written = [
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{dumps(arguments)}"
        "<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    ]
    return f"<|tool_calls_section_begin|>{''.join(written)}<|tool_calls_section_end|>"


def minimax_m2(calls: Sequence[Call]) -> str:
    written = [
        f'<invoke name="{name}">\n'
        + "".join(f'<parameter name="{key}">{plain(value)}</parameter>\n' for key, value in arguments.items())
        + "</invoke>\n"
        for name, arguments in calls
    ]
    return f"<minimax:tool_call>\n{''.join(written)}</minimax:tool_call>"


def seed_oss(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<seed:tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>{plain(value)}</parameter>\n" for key, value in arguments.items())
        + "</function>\n</seed:tool_call>"
        for name, arguments in calls
    )


def olmo3(calls: Sequence[Call]) -> str:
    return "<function_calls>\n" + pythonic(calls)[1:-1].replace("), ", ")\n") + "\n</function_calls>"


FORMATS: dict[str, tuple[str, Render]] = {
    "hermes": ("hermes", hermes),
    "qwen3_coder": ("qwen3_coder", qwen3_coder),
    "glm45": ("glm45", glm45),
    "glm47": ("glm47", glm47),
    "deepseek_v3": ("deepseek_v3", deepseek_v3),
    "deepseek_v31": ("deepseek_v31", deepseek_v31),
    "deepseek_v32": ("deepseek_v32", dsml),
    "deepseek_v4": ("deepseek_v4", lambda calls: dsml(calls, "tool_calls")),
    "llama3_json": ("llama3_json", llama3_json),
    "llama3_json_tag": ("llama3_json", python_tag),
    "pythonic": ("pythonic", pythonic),
    "llama4_pythonic": ("llama4_pythonic", llama4_pythonic),
    "mistral_v3": ("mistral", mistral_v3),
    "mistral_v11": ("mistral", mistral_v11),
    "mistral_v13": ("mistral_v11", mistral_v13),
}
# Other names for the same grammars with other tags.
MORE_FORMATS: dict[str, tuple[str, Render]] = {
    "granite": ("granite", json_list("<|tool_call|>", "")),
    "granite-20b-fc": ("granite-20b-fc", json_objects("<function_call> ", "")),
    "internlm": ("internlm", json_objects("<|action_start|><|plugin|>\n", "<|action_end|>", "parameters")),
    "jamba": ("jamba", json_list("<tool_calls>", "</tool_calls>")),
    "kimi_k2": ("kimi_k2", kimi_k2),
    "longcat": ("longcat", json_objects("<longcat_tool_call>\n", "\n</longcat_tool_call>")),
    "mimo": ("mimo", lambda calls: seed_oss(calls).replace("seed:", "")),
    "minimax_m2": ("minimax_m2", minimax_m2),
    "olmo3": ("olmo3", olmo3),
    "phi4_mini_json": ("phi4_mini_json", json_list("functools", "")),
    "seed_oss": ("seed_oss", seed_oss),
}
