"""Reads the requests that are chats: how to sample, and the prompt that the conversation becomes.

An endpoint that takes a conversation makes a `ChatCompletionRequest` of its body, subclasses `Chat`, and
defines how the next message is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from microvllm.openai_compat.api.conversation import Conversation, render
from microvllm.openai_compat.api.generation import Generation
from microvllm.openai_compat.api.parsing import ParsedChoice, Parsing
from microvllm.openai_compat.api.requests import ChatCompletionRequest
from microvllm.openai_compat.api.sampling import sampling_params
from microvllm.openai_compat.api.streams import Outcome
from microvllm.openai_compat.api.tools import ToolUse, tool_use
from microvllm.openai_compat.parsers.events import ParsedMessage
from microvllm.openai_compat.state import ServerState
from microvllm.runtime.errors import InvalidRequestError
from microvllm.runtime.request import SamplingParams


class Chat(Generation[ChatCompletionRequest]):
    """A request with a conversation, and its choices.

    `role` is the author of the choices, `echo` the text that they begin with, `prompt_text` the rendered
    conversation if the response is to show it. `parsing` says how the choices are read, and `choices` makes
    the parser of each, as `chunks` needs them; for `answer` the `messages` are read already.
    """

    role: str
    echo: str
    prompt_text: str | None
    parsing: Parsing
    parsed: Sequence[ParsedChoice] = ()
    messages: Sequence[ParsedMessage] = ()

    def sampling_params(self) -> SamplingParams:
        body = self.body
        # The newer name wins where both are given, as in vLLM.
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        return sampling_params(
            body,
            self.state.client,
            max_tokens=getattr(body, name),
            max_tokens_field=name,
            logprobs=_alternatives(body, self.state),
            prompt_logprobs=body.prompt_logprobs,
        )

    async def read_prompts(self) -> list[list[int]]:
        client = self.state.client
        tools, conversation = await client.run_rendering(_read, self.state, self.body)
        client.processor.check_prompt(conversation.token_ids)
        self.role, self.echo = conversation.role, conversation.echo
        self.prompt_text = conversation.text if self.body.return_prompt_text else None
        self.parsing = Parsing(
            self.state.formats,
            tools,
            opened=conversation.opened,
            with_reasoning=self.body.include_reasoning,
            parallel=self.body.parallel_tool_calls,
        )
        budget = self.body.thinking_token_budget
        if tools is None:
            self.params = self.parsing.constrained(self.params, budget)
        else:  # a large schema takes a while
            self.params = await client.run_blocking(self.parsing.constrained, self.params, budget)
        if self.body.use_beam_search and self.params.structured_outputs is not None:
            field = self.params.structured_outputs.field
            raise InvalidRequestError(f"{field} is not supported with beam search.", field)
        return [conversation.token_ids]

    def choices(self) -> Sequence[ParsedChoice]:
        """Return a parser for each choice; they also count the tokens of the reasoning."""
        self.parsed = [self.parsing.choice() for _ in range(self.params.n)]
        return self.parsed

    def read_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        self.messages = [
            choice.read(outcome) for choice, outcome in zip(self.choices(), outcomes, strict=True)
        ]

    @property
    def reasoning_tokens(self) -> int | None:
        counts = [choice.reasoning_tokens for choice in self.parsed]
        return sum(count or 0 for count in counts) if counts and counts[0] is not None else None


def _read(state: ServerState, body: ChatCompletionRequest) -> tuple[ToolUse | None, Conversation]:
    """Check the tools and render the conversation; runs in a worker thread."""
    return tool_use(body, state.args, state.formats.calls), render(state, body)


def _alternatives(body: ChatCompletionRequest, state: ServerState) -> int | None:
    """Return how many log probabilities to report beside each token's own; None without `logprobs`."""
    count: int = body.top_logprobs
    if count < -1:
        raise InvalidRequestError(f"top_logprobs must be at least -1, got {count}.", "top_logprobs")
    if not body.logprobs:
        if count:
            raise InvalidRequestError(
                "when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs"
            )
        return None
    limit = state.client.config.max_logprobs
    if limit != -1 and (count if count >= 0 else state.client.config.spec.vocab_size) > limit:
        raise InvalidRequestError(
            f"Requested sample logprobs of {count}, which is greater than max allowed: {limit}",
            "top_logprobs",
        )
    return count
