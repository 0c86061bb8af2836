"""Renders the conversation of a chat through the model's template and tokenises it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from microvllm.openai_compat.api.prompts import Truncation, tokenize_text
from microvllm.openai_compat.api.requests import ChatCompletionRequest, TokenizeRequest
from microvllm.openai_compat.api.tools import shown_tools
from microvllm.openai_compat.parsers.registry import ends_in_reasoning
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.text.chat_template import content_text, normalize_messages


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation: its text and token ids, and how the response begins.

    `opened` says whether the text ends within reasoning (True) or behind it (False), None for neither.
    """

    text: str
    token_ids: list[int]
    role: str
    echo: str
    opened: bool | None = None


def render(state: ServerState, body: ChatCompletionRequest | TokenizeRequest) -> Conversation:
    """Render a conversation through the chat template and tokenise it; runs in a worker thread.

    Raises `InvalidRequestError` naming `messages` for malformed ones, or the template's own complaint.
    """
    client = state.client
    continued = body.continue_final_message
    if continued and body.add_generation_prompt:
        raise InvalidRequestError(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            "continue_final_message",
        )
    opens_turn = not continued if body.add_generation_prompt is None else body.add_generation_prompt
    messages = normalize_messages(body.messages)
    text = client.processor.render_text(
        messages,
        add_generation_prompt=opens_turn,
        continue_final_message=continued,
        chat_template_content_format=state.args.chat_template_content_format,
        **_template_variables(body, state),
    )
    truncation = Truncation.of(body, client.config.max_model_len)
    ids = tokenize_text(client, text, bool(body.add_special_tokens), truncation)
    last = messages[-1]
    # Without a generation prompt, or when the last message is continued, its author is the response's.
    speaks_on = continued or body.add_generation_prompt is False
    role = last["role"] if speaks_on else state.args.response_role
    echoed = body.echo and last["role"] == role
    echo = content_text(last["content"]) if echoed else ""
    opened = ends_in_reasoning(state.formats.reasoning, text)
    if continued and opened is None:  # what is continued is the answer, unless it has begun to reason
        thinking, content = state.formats.thinking, content_text(last["content"])
        opened = thinking is not None and content.rfind(thinking.start) > content.rfind(thinking.end)
    return Conversation(text, ids, role, echo, opened)


def _template_variables(body: ChatCompletionRequest | TokenizeRequest, state: ServerState) -> dict[str, Any]:
    """Return the server's variables, overridden by the request's.

    A reasoning effort turns thinking on or off, unless the request has `enable_thinking`.
    """
    kwargs = body.chat_template_kwargs
    variables: dict[str, Any] = {**state.args.default_chat_template_kwargs}
    variables.update(kwargs.items())
    effort: str | None = body.reasoning_effort
    if effort is not None:
        effort = state.args.reasoning_effort_map.get(effort, effort)
        variables["reasoning_effort"] = effort
        if "enable_thinking" not in kwargs:
            variables["enable_thinking"] = effort != "none"
    if (tools := shown_tools(body, state.args)) is not None:
        variables["tools"] = tools
    return variables
