"""The types that the scheduler and the worker share: a request, one step's plan, and the step's result.

Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from microvllm.runtime.core.prefix_keys import PrefixKeys
from microvllm.runtime.request import EngineRequest, FinishReason, SamplingParams, TokenLogprobs

NO_TOKEN = -1  # what a step reports for a request whose logits were not finite


@dataclass(slots=True, eq=False)
class Request:
    """One sequence inside the engine.

    `prompt_len` counts the user's prompt only; a preempted request computes its generated tokens
    again too, so what has to be prefilled is `num_tokens`, not `prompt_len`. Until its first token is known
    a request shares `token_ids` and `keys` with the other samples of its prompt.
    """

    source: EngineRequest
    order: tuple[int, int]  # smaller is served first, larger is preempted first
    keys: PrefixKeys
    stop_ids: frozenset[int]
    id: int = field(init=False)
    params: SamplingParams = field(init=False)
    seq_id: int = field(init=False)  # in the KV pool; an `id` may come again while its last step is in flight
    token_ids: list[int] = field(init=False)  # all known tokens
    prompt_len: int = field(init=False)
    max_tokens: int = field(init=False)
    arrived_at: float = field(default_factory=time.monotonic)
    num_computed: int = 0  # tokens whose keys and values are in the cache, or will be by this step
    num_in_flight: int = 0  # tokens sampled by a step whose result is not known yet
    steps_in_flight: int = 0
    drafts: Sequence[int] = ()  # proposed to follow `token_ids`, until its next step is committed
    num_cached: int | None = None  # prompt tokens taken from the prefix cache at first admission
    num_preemptions: int = 0
    scheduled_at: float | None = None  # when it first left the queue; None again once that was reported
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_prompt_logprobs: int = 0  # computed so far: a preempted request does not compute them again
    row: int = -1
    queue: list[Request] = field(default_factory=list)  # the one that it is in: see `Scheduler`
    leads: bytes | None = None  # the prefix key of its last full block, while others wait for its blocks
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.id, self.params, self.seq_id = self.source.request_id, self.source.params, self.order[1]
        self.token_ids = self.keys.token_ids
        self.prompt_len, self.max_tokens = len(self.token_ids), self.params.max_tokens or 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_missing(self) -> int:
        """How many tokens a step could compute now; 1 is a decode, or the end of a prompt.

        Zero or negative while drafts are in flight: how many are accepted decides where the next step starts.
        """
        if self.finish_reason is not None:
            return 0  # ended; it only waits for its last step in flight
        in_flight, known = self.num_in_flight, len(self.token_ids)
        if in_flight and known - self.prompt_len + in_flight >= self.max_tokens:
            return 0  # its last token is being sampled: another step would be wasted
        return known + in_flight - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def end_ids(self) -> frozenset[int]:
        """Every token that would stop the request; masked until `min_tokens` are out."""
        eos = self.source.eos_token_id
        return self.stop_ids if eos is None else self.stop_ids | {eos}

    def __lt__(self, other: Request) -> bool:
        return self.order < other.order


class ScheduledRequest(msgspec.Struct, frozen=True):  # one a request a step: a dataclass is made slower
    """`[start, start + num_new)` of one request's tokens is computed by this step.

    The last `num_draft_tokens` of them are the first of `request.drafts`. The logits at the token before them
    and at each of them give a token, which counts as long as all drafts before it are what was chosen.
    """

    request: Request
    start: int
    num_new: int
    samples: bool  # the last of them, but for drafts, is the last of the request: the next token is chosen
    first_block: int  # column in the block tables of the first block that is new to the model runner
    new_blocks: tuple[int, ...]  # as many of each group of layers; see `KVCacheManager.blocks_from`
    num_draft_tokens: int = 0

    @property
    def may_not_end(self) -> bool:
        """Whether its next token comes before `min_tokens` are out."""
        return self.start + self.num_new - self.request.prompt_len < self.request.params.min_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what to compute, in this order of row changes: release, admit, restore, compute, keep.

    restored, kept: which row of layers' states is copied to which, see `checkpoints`.
    """

    released_rows: tuple[int, ...]
    admitted: tuple[Request, ...]
    scheduled: tuple[ScheduledRequest, ...]
    restored: tuple[tuple[int, int], ...] = ()
    kept: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave: `tokens[i]` belongs to `plan.scheduled[i]`.

    An entry that samples has 1 to `1 + num_draft_tokens` tokens: the drafts that hold, then the token chosen
    after them, or NO_TOKEN where there was nothing to choose from. Other entries are ignored. The mappings,
    by i, have the entries that were requested, with log probabilities for each of the tokens. `pooled` has
    vectors, by i, in place of tokens: see `StepOutput`.
    """

    tokens: Sequence[Sequence[int]]
    logprobs: Mapping[int, Sequence[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, Sequence[TokenLogprobs]] = field(default_factory=dict)
    pooled: Mapping[int, bytes] = field(default_factory=dict)
