"""The types that travel: sampling parameters, requests to the engine, outputs of a step.

All are msgspec structs, so the process channel encodes them directly (no pickle). Nothing here imports torch.
"""

from __future__ import annotations

import copy
import enum
import math
from typing import Any, TypeVar

import msgspec

from microvllm.runtime.errors import InvalidRequestError

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
FLOAT32_MAX = 3.4e38
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_N = 128
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_LOGPROB_TOKEN_IDS = 128
MAX_PATTERN = 1024
ValuesT = TypeVar("ValuesT", bound="SamplingValues")
GREEDY_EPS = 1e-5  # temperatures below are greedy, as in vLLM
MIN_TEMPERATURE = 1e-2  # positive temperatures below are raised to it, as in vLLM


class FinishReason(enum.IntEnum):
    """Why a request ended; `str()` gives the word of the wire."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3
    REPETITION = 4
    QUEUE_TIMEOUT = 5
    REQUEST_TIMEOUT = 6

    def __str__(self) -> str:
        return self.name.lower()


class RepetitionDetection(msgspec.Struct, frozen=True, kw_only=True):
    """Stop when the output ends in `min_count` copies of one pattern of `min_` to `max_pattern_size` tokens.

    A `max_pattern_size` of 0 is off. Raises `InvalidRequestError` for values out of range.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        name = "repetition_detection"
        _integer(self.max_pattern_size, f"{name}.max_pattern_size", 0, MAX_PATTERN)
        _integer(self.min_pattern_size, f"{name}.min_pattern_size", 0, self.max_pattern_size)
        _integer(self.min_count, f"{name}.min_count", 2 if self.max_pattern_size else 0, INT64_MAX)


class SamplingValues(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fields of `SamplingParams`, unchecked: what the engine process decodes.

    The API process has checked them, and a list of allowed tokens may be as long as the vocabulary.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    repetition_detection: RepetitionDetection | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPS

    @property
    def penalised(self) -> bool:
        """Whether what was generated changes the logits, so that tokens have to be counted."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def with_max_tokens(self: ValuesT, max_tokens: int) -> ValuesT:
        """A shallow copy with another `max_tokens`, which is not checked again; lists are shared."""
        if max_tokens == self.max_tokens:
            return self
        changed = copy.copy(self)
        msgspec.structs.force_setattr(changed, "max_tokens", max_tokens)
        return changed


class SamplingParams(SamplingValues, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens and when to stop; names and defaults as in vLLM's `SamplingParams`.

    Raises `InvalidRequestError` naming the field for any value out of range. `max_tokens=None` means
    "until the context is full". A temperature below 1e-5 is greedy. One stop string may be given bare.
    `logprobs=k` asks for the k most likely tokens beside each sampled one, `prompt_logprobs=k` beside each
    prompt token, -1 for the whole vocabulary; `logprob_token_ids` names the tokens in place of the k.
    """

    def __post_init__(self) -> None:
        _integer(self.n, "n", 1, MAX_N)
        _number(self.temperature, "temperature", 0.0, 2.0)
        _number(self.top_p, "top_p", 0.0, 1.0, open_low=True)
        _integer(self.top_k, "top_k", -1, INT64_MAX)
        _number(self.min_p, "min_p", 0.0, 1.0)
        _number(self.presence_penalty, "presence_penalty", -2.0, 2.0)
        _number(self.frequency_penalty, "frequency_penalty", -2.0, 2.0)
        _number(self.repetition_penalty, "repetition_penalty", 0.0, FLOAT32_MAX, open_low=True)
        self._check_tokens()
        self._check_logprobs()
        if self.seed is not None:
            _integer(self.seed, "seed", INT64_MIN, INT64_MAX)
        if self.max_tokens is not None:
            _integer(self.max_tokens, "max_tokens", 1, INT64_MAX)
        _integer(self.min_tokens, "min_tokens", 0, INT64_MAX)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, "
                f"got {self.min_tokens}.",
                "min_tokens",
            )
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])
        for name in ("stop", "stop_token_ids"):
            if not isinstance(getattr(self, name), list):
                raise InvalidRequestError(f"{name} must be a list, got {getattr(self, name)!r}.", name)
        for text in self.stop:
            if type(text) is not str or not text or len(text) > MAX_STOP_STRING_CHARS:
                raise InvalidRequestError(
                    f"stop strings must have 1 to {MAX_STOP_STRING_CHARS} characters.", "stop"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                f"stop_token_ids cannot contain more than {MAX_STOP_TOKEN_IDS} ids.", "stop_token_ids"
            )
        _token_ids(self.stop_token_ids, "stop_token_ids")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if type(getattr(self, name)) is not bool:
                raise InvalidRequestError(f"{name} must be true or false, got {getattr(self, name)!r}.", name)
        if self.n > 1 and self.greedy:
            raise InvalidRequestError(f"n must be 1 when using greedy sampling, got {self.n}.", "n")

    def _check_tokens(self) -> None:
        """What concerns single tokens: bias, the allowed ones, bad words."""
        if not isinstance(self.logit_bias, dict) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"logit_bias must map at most {MAX_LOGIT_BIAS} token ids to numbers.", "logit_bias"
            )
        for token, bias in self.logit_bias.items():
            _integer(token, "logit_bias", INT64_MIN, INT64_MAX)  # `InputProcessor` knows the vocabulary
            _number(bias, "logit_bias", -100.0, 100.0)
        if self.allowed_token_ids is not None:
            if not isinstance(self.allowed_token_ids, list) or not self.allowed_token_ids:
                raise InvalidRequestError(
                    "allowed_token_ids must be a list of at least one token id.", "allowed_token_ids"
                )
            _token_ids(self.allowed_token_ids, "allowed_token_ids")
        if not isinstance(self.bad_words, list) or len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidRequestError(f"bad_words must be a list of at most {MAX_BAD_WORDS}.", "bad_words")
        for word in self.bad_words:
            if type(word) is not str or not word or len(word) > MAX_BAD_WORD_CHARS:
                raise InvalidRequestError(
                    f"bad_words must have 1 to {MAX_BAD_WORD_CHARS} characters each.", "bad_words"
                )

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None:
                _integer(count, name, -1, INT64_MAX)
        if self.logprob_token_ids is None:
            return
        if self.logprobs is None:
            raise InvalidRequestError("logprob_token_ids needs logprobs to be set.", "logprob_token_ids")
        if (
            not isinstance(self.logprob_token_ids, list)
            or len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS
        ):
            raise InvalidRequestError(
                f"logprob_token_ids must be a list of at most {MAX_LOGPROB_TOKEN_IDS} ids.",
                "logprob_token_ids",
            )
        _token_ids(self.logprob_token_ids, "logprob_token_ids")


def _token_ids(ids: list[Any], name: str) -> None:
    # At C speed: a whole vocabulary may be allowed, and it is checked between two tokens of others.
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) <= INT64_MAX)):
        return
    for token in ids:
        _integer(token, name, 0, INT64_MAX)


def _integer(value: Any, name: str, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        bound = f"at least {low}" if high == INT64_MAX else f"in [{low}, {high}]"
        raise InvalidRequestError(f"{name} must be an integer {bound}, got {value!r}.", name)


def _number(value: Any, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    fine = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    if not fine or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise InvalidRequestError(f"{name} must be in {bracket}{low:g}, {high:g}], got {value!r}.", name)


class EngineRequest(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to generate, as the engine sees it: token ids only, every default resolved.

    `params.max_tokens` is set. `eos_token_id` is None when the end-of-sequence token must not stop the
    request; `stop_token_ids` already holds the model's further end tokens. `cache_salt` separates
    prefix-cache entries between tenants. `bad_word_ids` are `params.bad_words` as token sequences. The
    `params.n` samples of a prompt are one request each, numbered by `sample`; they share every list.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingValues
    eos_token_id: int | None = None
    stop_token_ids: list[int] = []
    priority: int = 0
    cache_salt: str = ""
    bad_word_ids: list[list[int]] = []
    sample: int = 0

    @property
    def seed(self) -> int | None:
        """`params.seed` plus the number of the sample, wrapped to 64 bits."""
        seed = self.params.seed
        if seed is None:
            return None
        seed += self.sample
        return seed if seed <= INT64_MAX else seed - (1 << 64)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position of a sequence, natural logarithm, possibly -inf.

    First of `token_ids` is the token that stands there, then come the asked-for ones (the most likely in
    falling order, which may repeat the first; or `logprob_token_ids`). `logprobs` is of the same length.
    `rank` of the first one: 1 is the most likely.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class StepOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced for one request.

    `stop_reason` is the stop token id, or None for the primary end-of-sequence token and for length.
    `num_cached_tokens` (prompt tokens taken from the prefix cache) is meaningful in the first output.
    `error` is a one-line message when `finish_reason` is ERROR, and `param` the request's field at fault,
    None where the engine is. `logprobs` has one entry a token if the request asks for them.
    `prompt_logprobs`, in the first output only, has one entry a prompt token from the second on.
    `scheduled_at`, in the first output only, is when the request left the queue (`time.monotonic()`, which
    all processes of a machine share).
    """

    request_id: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    scheduled_at: float | None = None
    num_preemptions: int = 0
    param: str | None = None


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Counters (since start) and gauges (now) of one engine, sent with every step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    decode_steps: int = 0  # of them: those that computed one token of every request in them
    requests: int = 0  # that have arrived, also those that were refused
    kv_unused_slots: int = 0  # in the used blocks: internal fragmentation
    graph_replays: int = 0  # steps that ran as a captured graph; the others ran eagerly
    padded_tokens: int = 0  # computed for nobody, because a graph is larger than its step
    schedule_seconds: float = 0.0  # the parts of `StepClock`
    prepare_seconds: float = 0.0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    wait_seconds: float = 0.0
    commit_seconds: float = 0.0
    messages_seconds: float = 0.0
    idle_seconds: float = 0.0
    embedding_seconds: float = 0.0  # of the forward seconds, as far as they were told apart
    attention_seconds: float = 0.0
    head_seconds: float = 0.0
    gpu_busy_seconds: float = 0.0  # of `DeviceClock`, if there is one
    gpu_idle_seconds: float = 0.0

    @property
    def kv_usage(self) -> float:
        """The share of the KV blocks that is used, 0 to 1."""
        return self.kv_blocks_used / self.kv_blocks_total if self.kv_blocks_total else 0.0
