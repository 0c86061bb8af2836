"""The types that travel: sampling parameters, requests to the engine, outputs of a step.

All are msgspec structs, so the process channel encodes them directly (no pickle). Nothing here imports torch.
"""

from __future__ import annotations

import copy
import enum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

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
MAX_AFTER = 64
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


Int64 = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]
Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
TokenId = Annotated[int, Meta(ge=0, le=INT64_MAX)]  # that the model has it, `InputProcessor` checks
# The parameters' ranges, shared with the request bodies of the server.
NumSamples = Annotated[int, Meta(ge=1, le=MAX_N)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=INT64_MAX)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=FLOAT32_MAX)]
StopTokenIds = Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)]
LogprobTokenIds = Annotated[list[TokenId], Meta(max_length=MAX_LOGPROB_TOKEN_IDS)]
NumLogprobs = Annotated[int, Meta(ge=-1, le=INT64_MAX)]


class RepetitionDetection(msgspec.Struct, frozen=True, kw_only=True):
    """Stop when the output ends in `min_count` copies of one pattern of `min_` to `max_pattern_size` tokens.

    A `max_pattern_size` of 0 is off.
    """

    max_pattern_size: Annotated[int, Meta(ge=0, le=MAX_PATTERN)] = 0
    min_pattern_size: Count = 0
    min_count: Count = 0


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form that the output must have.

    `spec` is the JSON text of a schema ("json"), of a list of strings ("choice") or of vLLM's structural tags
    ("structural_tag"), a pattern ("regex"), a grammar ("grammar"), or empty ("json_object": any object).
    `whitespace` is the pattern of what may stand between JSON's tokens, None for one that bounds it; with
    `additional_properties=False` a schema's objects have the properties that it names only, unless it says
    otherwise. `after` is a sequence of token ids, the end of the reasoning: the form begins behind the first
    one that is generated, and until then tokens are free. Empty: it begins at the first token. With `opens`,
    the ids that begin the reasoning, tokens are free only in an output that begins with these; any other
    begins with the ids of `head`, and has the form from there on. `field` is the field that errors name.
    """

    kind: Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]
    spec: str = ""
    whitespace: str | None = None
    additional_properties: bool = True
    after: Annotated[list[TokenId], Meta(max_length=MAX_AFTER)] = []
    opens: Annotated[list[TokenId], Meta(max_length=MAX_AFTER)] = []
    head: Annotated[list[TokenId], Meta(max_length=MAX_AFTER)] = []
    field: str = "structured_outputs"


class ThinkingBudget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How many tokens the reasoning may take: after `max_tokens` of them the tokens `end` are forced.

    With `begun`, or without a `start`, an output begins within the reasoning; else that begins behind a
    `start` with which the output begins, but for tokens of white space (`blank`). Where it begins again
    directly behind its end, the budget goes on.
    """

    max_tokens: Count
    start: Annotated[list[TokenId], Meta(max_length=MAX_AFTER)] = []
    end: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_AFTER)]
    blank: list[TokenId] = []
    begun: bool = False


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens and when to stop; names and defaults as in vLLM's `SamplingParams`.

    `max_tokens=None` means "until the context is full". A temperature below 1e-5 is greedy. `logprobs=k` asks
    for the k most likely tokens beside each sampled one, `prompt_logprobs=k` beside each prompt token, -1 for
    the whole vocabulary; `logprob_token_ids` names the tokens in place of the k. The values are not checked
    here but by `sampling_checks`, once, where they enter: the engine process need not do it again.
    """

    n: NumSamples = 1
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    logit_bias: Annotated[
        dict[Int64, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)
    ] = {}
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    bad_words: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]],
        Meta(max_length=MAX_BAD_WORDS),
    ] = []
    seed: Int64 | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=INT64_MAX)] | None = 16
    min_tokens: Count = 0
    stop: list[Annotated[str, Meta(min_length=1, max_length=MAX_STOP_STRING_CHARS)]] = []
    stop_token_ids: StopTokenIds = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: NumLogprobs | None = None
    prompt_logprobs: NumLogprobs | None = None
    logprob_token_ids: LogprobTokenIds | None = None
    repetition_detection: RepetitionDetection | None = None
    structured_outputs: StructuredOutput | None = None
    thinking: ThinkingBudget | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPS

    @property
    def penalised(self) -> bool:
        """Whether what was generated changes the logits, so that tokens have to be counted."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def with_max_tokens(self, max_tokens: int) -> SamplingParams:
        """A shallow copy with another `max_tokens`; lists are shared."""
        if max_tokens == self.max_tokens:
            return self
        changed = copy.copy(self)
        msgspec.structs.force_setattr(changed, "max_tokens", max_tokens)
        return changed


class EngineRequest(msgspec.Struct, frozen=True, array_like=True):
    """One sequence to generate, as the engine sees it: token ids only, every default resolved.

    `params.max_tokens` is set. `eos_token_id` is None when the end-of-sequence token must not stop the
    request; `stop_token_ids` already holds the model's further end tokens. `cache_salt` separates
    prefix-cache entries between tenants. `bad_word_ids` are `params.bad_words` as token sequences, `grammar`
    is `params.structured_outputs` in llguidance's dialect, empty without. The `params.n` samples of a prompt
    are one request each, numbered by `sample`; they share every list.
    """

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_id: int | None = None
    stop_token_ids: list[int] = []
    priority: int = 0
    cache_salt: str = ""
    bad_word_ids: list[list[int]] = []
    sample: int = 0
    grammar: str = ""

    @property
    def seed(self) -> int | None:
        """`params.seed` plus the number of the sample, wrapped to 64 bits."""
        if self.params.seed is None:
            return None
        seed = self.params.seed + self.sample
        return seed if seed <= INT64_MAX else seed - (1 << 64)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position of a sequence, natural logarithm, possibly -inf.

    First of `token_ids` is the token that stands there, then come the requested ones (the most likely in
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
    all processes of a machine share). `pooled`, in the only output of a request to a model with
    `spec.pooling`, is its vector: [hidden] float32 in the machine's byte order.
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
    pooled: bytes | None = None
