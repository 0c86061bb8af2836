"""Turns a plan into tensors, runs the model, samples.

Every running request owns one row, from admission to its last step in flight, of every array here:
last token, block table, sampling parameters. Rows are zeroed at release and must be clean at acquire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from microvllm.adapters.decoder import DecoderModel, inverse_frequencies
from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.weights import load_weights
from microvllm.ops.attention import AttentionBatch, AttentionShape, PrefillSegment
from microvllm.ops.operators import make_operators
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import ConfigError, EngineError
from microvllm.runtime.logits import Output
from microvllm.runtime.logprobs import LogprobTensors, LogprobWish, log_probabilities
from microvllm.runtime.request import TokenLogprobs
from microvllm.runtime.sampler import Sampled, Sampler
from microvllm.runtime.scheduler import NO_TOKEN, Request, ScheduledRequest, StepPlan, StepResult

UNKNOWN = -1  # stands for an input token that only the row knows yet
PROMPT_SLICE = 128  # prompt positions whose logits exist at a time


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    plan: StepPlan
    sampled: Sampled | None  # of the requests that sample, in the order of `order`
    order: tuple[int, ...]  # index in plan.scheduled of each sampled token
    prompt_logprobs: dict[int, list[LogprobTensors]]  # by index in plan.scheduled


class ModelGraphRunner:
    """Owns the model, the KV cache and the rows; the only user of the device."""

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        """Load the model. Raises `ConfigError` that names the file or the tensor at fault."""
        self._config = config
        torch.set_num_threads(config.cpu_threads)
        spec, dtype = config.spec, getattr(torch, config.dtype)
        try:
            weights = load_weights(Path(config.model_path), spec, config.load_format, dtype, progress)
        except ModelFileError as error:
            raise ConfigError(str(error)) from error
        operators = make_operators(config.attention_backend, dtype, config.cpu_threads)
        self._model = DecoderModel(spec, weights, operators)
        shape = AttentionShape(
            spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.sliding_window
        )
        self._attention = operators.attention(
            shape,
            config.num_blocks,
            config.block_size,
            inverse_frequencies(spec.rope, spec.head_dim),
            config.max_model_len,
            dtype,
            self._model.qk_norms,
        )
        self._block_size = config.block_size
        rows = config.max_num_seqs
        self._sampler = Sampler(rows, spec.vocab_size, config.seed, config.logprobs_mode)
        self._block_tables = np.zeros((rows, -(-config.max_model_len // config.block_size)), dtype=np.int64)
        self._last_token = torch.zeros(rows, dtype=torch.int64)
        self._occupied = np.zeros(rows, dtype=bool)

    # ---- a step --------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Change the rows as the plan says, run the model once over all its tokens, and sample."""
        # The rows first, and without anything that may fail: a step that fails below leaves them whole.
        for row in plan.released_rows:
            self._release_row(row)
        for request in plan.admitted:
            self._acquire_row(request)
        for item in plan.scheduled:
            if item.new_blocks:
                end = item.first_block + len(item.new_blocks)
                self._block_tables[item.request.row, item.first_block : end] = item.new_blocks
        # Single tokens first: the attention backend takes all of them at once.
        order = sorted(range(len(plan.scheduled)), key=lambda i: plan.scheduled[i].num_new > 1)
        items = [plan.scheduled[i] for i in order]
        batch = self._attention_batch(items)
        if self._config.attention_backend == "cpu":
            # What torch still does in a decode is too small to share, and its threads wait for each other
            # at every operator, however long one of them is kept from its core.
            torch.set_num_threads(self._config.cpu_threads if batch.segments else 1)
        hidden = self._model.forward(self._input_ids(items), self._attention.begin_step(batch))
        prompt_logprobs = self._prompt_logprobs(hidden, items, order)
        sampling = [j for j, item in enumerate(items) if item.samples]
        if not sampling:
            return LaunchedStep(plan, None, (), prompt_logprobs)
        if len(sampling) < len(hidden):
            last = np.cumsum([item.num_new for item in items])[sampling] - 1
            hidden = hidden[torch.from_numpy(last)]
        sampled = self._sample(self._model.logits(hidden), [items[j] for j in sampling])
        return LaunchedStep(plan, sampled, tuple(order[j] for j in sampling), prompt_logprobs)

    def collect(self, step: LaunchedStep) -> StepResult:
        """Waits for the device. The token is NO_TOKEN for requests that did not sample."""
        tokens = [NO_TOKEN] * len(step.plan.scheduled)
        if step.sampled is None:
            return StepResult(tokens, {}, _read(step.prompt_logprobs))
        for index, token in zip(step.order, step.sampled.tokens.tolist(), strict=True):
            tokens[index] = token
        if step.sampled.logprobs is None and not step.prompt_logprobs:
            return StepResult(tokens)
        found = step.sampled.logprobs.read() if step.sampled.logprobs is not None else []
        logprobs = {step.order[i]: entry for i, entry in zip(step.sampled.asked, found, strict=True)}
        return StepResult(tokens, logprobs, _read(step.prompt_logprobs))

    # ---- its parts -----------------------------------------------------------------------------

    def _input_ids(self, items: Sequence[ScheduledRequest]) -> Tensor:
        """[n] int64: known tokens from the request, the one in flight (always a lone one) from its row."""
        ids: list[int] = []
        rows: list[int] = []
        unknown = False
        for item in items:
            known = item.request.token_ids
            if item.start + item.num_new <= len(known):
                ids += known[item.start : item.start + item.num_new]
            else:
                ids.append(UNKNOWN)
                unknown = True
            rows += [item.request.row] * item.num_new
        tokens = torch.tensor(ids)
        if unknown:
            tokens = torch.where(tokens == UNKNOWN, self._last_token[torch.tensor(rows)], tokens)
        return tokens

    def _attention_batch(self, items: Sequence[ScheduledRequest]) -> AttentionBatch:
        rows = np.array([item.request.row for item in items])
        starts = np.array([item.start for item in items])
        lengths = np.array([item.num_new for item in items])
        total = int(lengths.sum())
        firsts = np.cumsum(lengths) - lengths
        token_rows = np.repeat(rows, lengths)
        positions = np.repeat(starts - firsts, lengths) + np.arange(total)
        blocks = self._block_tables[token_rows, positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        num_decodes = int((lengths == 1).sum())
        context = starts + lengths
        widths = -(-context // self._block_size)
        widest = int(widths[:num_decodes].max()) if num_decodes else 0
        segments = tuple(
            PrefillSegment(
                int(firsts[j]),
                int(lengths[j]),
                int(context[j]),
                torch.from_numpy(self._block_tables[rows[j], : widths[j]]),
            )
            for j in range(num_decodes, len(items))
        )
        return AttentionBatch(
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            num_decodes=num_decodes,
            decode_blocks=torch.from_numpy(self._block_tables[rows[:num_decodes], :widest]),
            decode_lens=torch.from_numpy(context[:num_decodes]),
            segments=segments,
        )

    def _prompt_logprobs(
        self, hidden: Tensor, items: Sequence[ScheduledRequest], order: Sequence[int]
    ) -> dict[int, list[LogprobTensors]]:
        """For prompts that ask: hidden state i of a prompt gives the log probabilities of its token i + 1."""
        found: dict[int, list[LogprobTensors]] = {}
        first = 0
        for item, index in zip(items, order, strict=True):
            request, count = item.request, item.request.params.prompt_logprobs
            at, first = first - item.start, first + item.num_new
            if count is None:
                continue
            start = max(item.start, request.num_prompt_logprobs)
            end = min(item.start + item.num_new, request.prompt_len - 1)
            # In slices: logits are far larger than hidden states.
            for low in range(start, end, PROMPT_SLICE):
                high = min(low + PROMPT_SLICE, end)
                tokens = torch.tensor(request.token_ids[low + 1 : high + 1])
                logits = self._model.logits(hidden[at + low : at + high])
                wishes = [LogprobWish(count)] * (high - low)
                normalise = self._config.logprobs_mode.endswith("logprobs")
                found.setdefault(index, []).append(
                    log_probabilities(logits, tokens, wishes, normalise=normalise)
                )
        return found

    def _sample(self, logits: Tensor, items: Sequence[ScheduledRequest]) -> Sampled:
        rows = np.array([item.request.row for item in items])
        positions = np.array([item.start + item.num_new for item in items])
        masked = [
            (i, item.request.end_ids)
            for i, item in enumerate(items)
            if item.start + item.num_new - item.request.prompt_len < item.request.params.min_tokens
        ]

        def output(i: int) -> Output:
            request = items[i].request
            known = request.token_ids[request.prompt_len :]
            return known, len(request.token_ids) < positions[i]

        sampled = self._sampler.sample(logits, rows, positions, masked, output, self._last_token)
        # A request without finite logits ends at commit, but its next step may be launched before.
        self._last_token[torch.from_numpy(rows)] = sampled.tokens.clamp(min=0)
        return sampled

    def _acquire_row(self, request: Request) -> None:
        row = request.row
        # A row that kept anything of its former owner would change this request's output without a
        # trace (CVE-2026-114049): better to stop.
        if self._occupied[row] or self._block_tables[row].any() or self._last_token[row] != 0:
            raise EngineError(f"row {row} was not clean when it was acquired")
        self._occupied[row] = True
        self._sampler.set_row(row, request.source, request.token_ids, request.prompt_len)

    def _release_row(self, row: int) -> None:
        self._occupied[row] = False
        self._block_tables[row] = 0
        self._last_token[row] = 0
        self._sampler.clear_row(row)


def _read(found: dict[int, list[LogprobTensors]]) -> dict[int, list[TokenLogprobs]]:
    return {index: [entry for part in parts for entry in part.read()] for index, parts in found.items()}
