"""From the engine's token ids to the text of one sequence; the same for the server and offline."""

from __future__ import annotations

from dataclasses import dataclass

from microvllm.runtime.errors import EngineError, InvalidRequestError, QueueTimeoutError, RequestDeadlineError
from microvllm.runtime.request import EngineRequest, FinishReason, StepOutput, TokenLogprobs
from microvllm.runtime.text.detokenizer import Detokenizer
from microvllm.runtime.text.tokenizer import Tokenizer

REPEATED = "repetition_detected"  # the stop reason that vLLM gives with "repetition"


@dataclass(slots=True)
class TextDelta:
    """What became known since the last one.

    `text` may be "" while bytes of a character or a possible stop string are held back.
    `finish_reason` is "stop", "length", "repetition" or "abort" in the last delta; `stop_reason` is then the
    stop string or stop token id, `REPEATED` for a repetition, None for the end-of-sequence token.
    """

    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None  # one a token, if the request asks for them
    # In the first delta, if asked for: one a prompt token from the second on.
    prompt_logprobs: list[TokenLogprobs] | None = None

    def merge(self, later: TextDelta) -> None:
        """Append the delta that follows this one."""
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs
        self.text += later.text
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


class OutputProcessor:
    """Turns the step outputs of one request into deltas."""

    def __init__(self, tokenizer: Tokenizer, request: EngineRequest) -> None:
        params = request.params
        self._detokenizer = Detokenizer(
            tokenizer,
            request.prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop,
            include_stop_str=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def take(self, output: StepOutput) -> TextDelta:
        """The delta of one step.

        Raises `EngineError` when the request failed in the engine, `InvalidRequestError` if by its own fault,
        `QueueTimeoutError` or `RequestDeadlineError` when it was ended for its time.

        When a stop string was found, `finish_reason` is "stop" although the engine goes on: the caller
        must abort the request there.
        """
        if output.finish_reason is FinishReason.ERROR:
            if output.param is not None:
                raise InvalidRequestError(output.error or "the request is wrong", output.param)
            raise EngineError(output.error or "the request failed")
        if output.finish_reason is FinishReason.QUEUE_TIMEOUT:
            raise QueueTimeoutError
        if output.finish_reason is FinishReason.REQUEST_TIMEOUT:
            raise RequestDeadlineError
        ended_by_token = output.finish_reason is FinishReason.STOP
        before = self._detokenizer.num_tokens
        text, stop = self._detokenizer.push(output.token_ids, last_is_stop=ended_by_token)
        if stop is not None:
            counted = output.token_ids[: self._detokenizer.num_tokens - before]
            logprobs = None if output.logprobs is None else output.logprobs[: len(counted)]
            return TextDelta(counted, text, str(FinishReason.STOP), stop, logprobs, output.prompt_logprobs)
        reason = None
        if output.finish_reason is not None:
            text += self._detokenizer.finish()
            reason = str(output.finish_reason)
        stop_reason = REPEATED if output.finish_reason is FinishReason.REPETITION else output.stop_reason
        return TextDelta(output.token_ids, text, reason, stop_reason, output.logprobs, output.prompt_logprobs)
