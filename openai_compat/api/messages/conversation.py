"""Turns a request of Anthropic's Messages API into a chat request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microvllm.openai_compat.api.messages.requests import (
    Block,
    ConversationBody,
    Message,
    MessagesRequest,
    RedactedThinking,
    Text,
    Thinking,
    ToolAddition,
    ToolReference,
    ToolRemoval,
    ToolResult,
    ToolUse,
    fault,
    read_part,
)
from microvllm.openai_compat.api.messages.tools import tool_fields
from microvllm.openai_compat.api.requests import ChatCompletionRequest, JsonSchema, ResponseFormat
from microvllm.openai_compat.errors import clip
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.text.chat_template import MAX_MESSAGES

# Claude Code begins its system prompt with a line for Anthropic's accounting, which differs from request to
# request: in the prompt it would keep the prefix cache from ever being hit.
BILLING = "x-anthropic-billing-header:"
CLEAR_THINKING = "clear_thinking_20251015"
# What an error of the chat names, and where that is here; the longer ones first.
RENAMED = (
    (".function.parameters", ".input_schema"),
    (".function.name", ".name"),
    ("thinking_token_budget", "thinking.budget_tokens"),
    ("reasoning_effort", "output_config.effort"),
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
    ("stop strings", "stop_sequences"),
    ("stop must", "stop_sequences must"),
)


def chat_request(body: ConversationBody, state: ServerState) -> ChatCompletionRequest:
    """Return the chat that a request means; runs in a worker thread.

    Raises `InvalidRequestError` naming the member at fault.
    """
    turns = _turns(body)
    messages = _messages(body, turns)
    thinking = body.thinking
    kwargs = dict(body.chat_template_kwargs)
    if thinking is not None:
        kwargs["enable_thinking"] = kwargs["thinking"] = thinking.type != "disabled"
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "chat_template_kwargs": kwargs,
        "continue_final_message": messages[-1]["role"] == "assistant",
        "reasoning_effort": _effort(body, turns),
        **tool_fields(body, turns),
        **_format(body),
    }
    if thinking is not None:
        fields["include_reasoning"] = thinking.display != "omitted"
        if thinking.type == "enabled":
            fields["thinking_token_budget"] = thinking.budget_tokens
    if isinstance(body, MessagesRequest):
        fields |= _sampling(body, state)
    return ChatCompletionRequest(**fields)


def _sampling(body: MessagesRequest, state: ServerState) -> dict[str, Any]:
    limit = state.args.max_stop_strings
    if len(body.stop_sequences) > limit:
        raise fault("stop_sequences", f"should have at most {limit} items (see --max-stop-strings)")
    return {
        # An upper bound, as everywhere in this API: clients send their own model's, whatever is served.
        "max_tokens": min(body.max_tokens, state.client.config.max_model_len),
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "stream": body.stream,
        "cache_salt": body.cache_salt,
    }


def renamed(error: InvalidRequestError) -> InvalidRequestError:
    """Return the error of a chat with this API's names of the fields."""
    for name, here in RENAMED:
        error.message = error.message.replace(name, here)
    error.args = (error.message,)
    return error


# ---- the conversation -----------------------------------------------------------------------------------


def _turns(body: ConversationBody) -> list[Message]:
    """Read the messages, without the reasoning that `context_management` drops."""
    if not body.messages:
        raise fault("messages", "must not be empty")
    if len(body.messages) > MAX_MESSAGES:
        raise fault("messages", f"cannot hold more than {MAX_MESSAGES} messages, got {len(body.messages)}")
    turns = [read_part(Message, turn, f"messages[{i}]") for i, turn in enumerate(body.messages)]
    _clear_thinking(body, turns)
    return turns


def _messages(body: ConversationBody, turns: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages of the chat: the system prompt, then the turns, none after one of its own role."""
    system = _system(body.system)
    chat: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the tools, by the ids of their calls
    last_user = max(
        (i for i, turn in enumerate(turns) if turn.role not in ("system", "assistant")), default=-1
    )
    for index, turn in enumerate(turns):
        blocks = [Text(turn.content)] if isinstance(turn.content, str) else turn.content
        if turn.role == "system":
            texts = _system_texts(blocks, f"messages[{index}]")
            if turn.clear_at == "next_user_message" and index < last_user:
                continue
            if not chat:
                system += texts
            else:
                # Many templates want the system prompt first, or one only. Where the text stands it keeps the
                # prefix before it cached.
                _add_user(chat, [f"<system-reminder>\n{text}\n</system-reminder>" for text in texts])
        elif turn.role == "assistant":
            _add_assistant(chat, blocks, f"messages[{index}]", names)
        else:
            _add_turn(chat, blocks, f"messages[{index}]", names)
    if not chat:
        raise fault("messages", "must hold a message of the user")
    if chat[-1]["role"] == "assistant" and chat[-1].get("tool_calls"):
        raise fault(f"messages[{len(turns) - 1}]", "ends in tool_use, which needs a tool_result after it")
    if chat[-1]["role"] == "assistant" and not chat[-1]["content"]:
        raise fault(f"messages[{len(turns) - 1}]", "has no text to continue")
    if system:
        chat.insert(0, {"role": "system", "content": "\n".join(system)})
    return chat


def _effort(body: ConversationBody, turns: Sequence[Message]) -> str | None:
    """Return the effort that the last message to set one sets, or the request's."""
    for turn in reversed(turns):
        if turn.output_config is not None and turn.output_config.effort is not None:
            return turn.output_config.effort
    return None if body.output_config is None else body.output_config.effort


def _system(value: Any) -> list[str]:
    system: Any = read_part(str | list[Text], value or "", "system")  # type: ignore[arg-type]
    texts = [system] if isinstance(system, str) else [block.text for block in system]
    shown = (text.partition("\n")[2] if text.startswith(BILLING) else text for text in texts)
    return [text for text in shown if text]


def _system_texts(blocks: Sequence[Block], place: str) -> list[str]:
    """Return the texts of a system message, whose other blocks change the tools."""
    texts = []
    for index, block in enumerate(blocks):
        if isinstance(block, Text):
            texts.append(block.text)
        elif not isinstance(block, (ToolAddition, ToolRemoval)):
            raise _misplaced(block, f"{place}.content[{index}]", "system")
    return [text for text in texts if text]


def _add_turn(chat: list[dict[str, Any]], blocks: Sequence[Block], place: str, names: dict[str, str]) -> None:
    """Add a turn of the user: results of tools become messages of their own, in the order of the blocks."""
    for index, block in enumerate(blocks):
        if isinstance(block, ToolResult):
            message = {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)}
            if (name := names.get(block.tool_use_id)) is not None:
                message["name"] = name  # some templates show the tool's name with its result
            chat.append(message)
        elif isinstance(block, Text):
            _add_user(chat, [block.text])
        else:
            raise _misplaced(block, f"{place}.content[{index}]", "user")
    if not blocks:
        _add_user(chat, [""])


def _add_user(chat: list[dict[str, Any]], texts: Sequence[str]) -> None:
    """Add texts of the user to the user's message that is last, or to a new one."""
    parts = [{"type": "text", "text": text} for text in texts]
    if chat and chat[-1]["role"] == "user":
        chat[-1]["content"] += parts
    elif parts:
        chat.append({"role": "user", "content": parts})


def _result(block: ToolResult) -> str:
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(map(_shown, content))
    return f"Error: {text}" if block.is_error and not text.lower().startswith("error") else text


def _shown(part: Text | ToolReference) -> str:
    return part.text if isinstance(part, Text) else f"The tool {part.tool_name} can be called now."


def _add_assistant(
    chat: list[dict[str, Any]], blocks: Sequence[Block], place: str, names: dict[str, str]
) -> None:
    """Add a turn of the assistant to its message that is last, or to a new one."""
    if not chat or chat[-1]["role"] != "assistant":
        chat.append({"role": "assistant", "content": ""})
    message = chat[-1]
    for index, block in enumerate(blocks):
        if isinstance(block, Text):
            message["content"] += block.text
        elif isinstance(block, Thinking):
            message["reasoning"] = message.get("reasoning", "") + block.thinking
        elif isinstance(block, ToolUse):
            names[block.id] = block.name
            function = {"name": block.name, "arguments": block.input}
            call = {"id": block.id, "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif not isinstance(block, RedactedThinking):
            raise _misplaced(block, f"{place}.content[{index}]", "assistant")


def _clear_thinking(body: ConversationBody, turns: Sequence[Message]) -> None:
    """Drop the reasoning of all but the newest assistant turns, as far as `context_management` says so."""
    for index, edit in enumerate(body.context_management.edits if body.context_management else ()):
        kind = edit.get("type") if isinstance(edit, dict) else None
        if kind != CLEAR_THINKING:
            place = f"context_management.edits[{index}].type"
            raise fault(place, f"{clip(repr(kind))} is not supported by this server: {CLEAR_THINKING} is")
        keep = edit.get("keep", {"type": "thinking_turns", "value": 1})
        if keep == "all" or (isinstance(keep, dict) and keep.get("type") == "all"):
            continue
        kept = keep.get("value") if isinstance(keep, dict) else None
        if type(kept) is not int or kept < 1:
            problem = 'must be "all" or {"type": "thinking_turns", "value": N}, N at least 1'
            raise fault(f"context_management.edits[{index}].keep", problem)
        for turn in reversed(turns):
            if turn.role == "assistant" and isinstance(turn.content, list):
                if kept <= 0:
                    turn.content = [block for block in turn.content if not isinstance(block, Thinking)]
                kept -= any(isinstance(block, Thinking) for block in turn.content)


def _format(body: ConversationBody) -> dict[str, Any]:
    """Return the field of the JSON schema that the text follows; `output_format` is its older place."""
    newer = None if body.output_config is None else body.output_config.format
    wanted = newer or body.output_format
    if wanted is None:
        return {}
    schema = JsonSchema(name="output", schema=wanted.schema, strict=True)
    return {"response_format": ResponseFormat(type="json_schema", json_schema=schema)}


def _misplaced(block: Block, place: str, role: str) -> InvalidRequestError:
    return fault(place, f"{type(block).__struct_config__.tag} blocks cannot be in a message of role {role}")
