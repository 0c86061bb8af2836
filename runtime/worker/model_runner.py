"""Turns a plan into tensors, runs the model, samples.

Every running request owns one row, from admission to its last step in flight, of every array here:
last token, block table, sampling parameters. Rows are zeroed at release and must be clean at acquire.

Every step of every request passes through this file, so it stays small and holds what all of them need: the
rows, the order of a step, which logits are sampled. Keep everything else out; rare features belong in the
modules below: what depends on the device in `device.py`, what changes a request's logits in `logits.py`, what
differs between models in the spec and the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from microvllm.adapters.decoder import DecoderModel
from microvllm.ops.sharding import Ranks
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.plan import Request, ScheduledRequest, StepPlan, StepResult
from microvllm.runtime.errors import EngineError
from microvllm.runtime.grammar.masks import GrammarMasks
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.worker.bitmask import ChooseMasked, known_output
from microvllm.runtime.worker.device import make_device
from microvllm.runtime.worker.gpu_memory import load_beside_cache, memory_for
from microvllm.runtime.worker.loading import make_attention
from microvllm.runtime.worker.logprobs import PromptLogprobs, log_prompts, read_prompts
from microvllm.runtime.worker.parallel.masked_rows import MaskedRows
from microvllm.runtime.worker.sampler import Sampled
from microvllm.runtime.worker.states import copy_states
from microvllm.runtime.worker.step_times import DeviceClock
from microvllm.runtime.worker.transfers import on_device

Items = Sequence[ScheduledRequest]
Sample = Callable[["LaunchedStep"], "LaunchedStep"]


@dataclass(slots=True)
class LaunchedStep:
    """`read_tokens` waits for the device; `order` has the index in plan.scheduled of each sampled token.

    `sample`: there while the sampling waits for masks, which follow the tokens of the step before.
    """

    plan: StepPlan
    order: Sequence[int] = ()
    read_tokens: Callable[[], list[int]] = list
    sampled: Sampled | None = None
    prompt_logprobs: PromptLogprobs = field(default_factory=dict)
    sample: Sample | None = None


class ModelGraphRunner:
    """Owns the model, the KV cache and the rows; the only user of the device.

    `config` is the given one with the size of the KV cache, which on a GPU is measured. `ranks`: the others
    with which it shares the model; they all get the same plans, and rank 0 chooses the tokens.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_progress: OnProgress | None = None,
        ranks: Ranks | None = None,
        model: DecoderModel | None = None,
    ) -> None:
        """Load the model, unless it is given. Raises `ConfigError` as `load_model` does."""
        torch.set_num_threads(config.cpu_threads)
        self._ranks = ranks
        if model is None:
            model, config = load_beside_cache(config, on_progress, ranks)
        self.model, self.config = model, config
        with memory_for("the KV cache and the CUDA graphs"):
            self._attention = make_attention(config, self.model)
            self._device = device = make_device(config, self.model, self._attention, on_progress)
        self._inputs, self._sampler = device.inputs, device.sampler
        self.masks = GrammarMasks(config, device.begin_sampling)
        self._sampler.use_mask(self.masks if ranks is None or ranks.rank == 0 else MaskedRows())
        self.clock = device.clock
        self._normalise = config.logprobs_mode.endswith("logprobs")
        tables = config.num_groups, config.max_num_seqs, config.max_blocks
        self._block_tables = np.zeros(tables, dtype=np.int64)
        self._occupied = np.zeros(config.max_num_seqs, dtype=bool)

    @property
    def device_clock(self) -> DeviceClock | None:
        return self._device.device_clock

    @property
    def graph_replays(self) -> int:
        return self._device.graph_replays

    @property
    def padded_tokens(self) -> int:
        return self._device.padded_tokens

    # ---- a step --------------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Change the rows as the plan says, run the model once over all its tokens, and sample.

        The step before has to be finished. Raises `EngineError` for a fault of the GPU, after which the
        device is unusable.
        """
        return self._device.run(self._launch, plan)

    def finish(self, step: LaunchedStep) -> LaunchedStep:
        """Sample, if that was put off: masks follow the step before, which must be collected."""
        return step if step.sample is None else self._device.run(step.sample, step)

    def _launch(self, plan: StepPlan) -> LaunchedStep:
        # The rows first, and without anything that may fail: a step that fails below leaves them whole.
        for row in plan.released_rows:
            self._release_row(row)
        for request in plan.admitted:
            self._acquire_row(request)
        for item in plan.scheduled:
            if item.new_blocks:
                blocks = np.reshape(item.new_blocks, (len(self._block_tables), -1))
                end = item.first_block + blocks.shape[1]
                self._block_tables[:, item.request.row, item.first_block : end] = blocks
        copy_states(self._attention, plan.restored)
        step = self._compute(plan)
        copy_states(self._attention, plan.kept)
        return step

    def _compute(self, plan: StepPlan) -> LaunchedStep:
        # Single tokens first: the attention backend takes all of them at once.
        order = sorted(range(len(plan.scheduled)), key=lambda i: plan.scheduled[i].num_new > 1)
        items = [plan.scheduled[i] for i in order]
        replay = self._device.replay(items)
        if replay is not None:  # of single tokens, so that `order` changes nothing
            if replay.read_tokens is not None:
                return LaunchedStep(plan, order, replay.read_tokens)
            step = LaunchedStep(plan, order)
            if replay.choose is not None and self._ranks is None:
                return self._sample_or_wait(step, items, partial(self._sample_masked, replay.choose, items))
            return self._sample_or_wait(step, items, partial(self._sample, replay.logits, items, replay.ids))
        return self._choose(plan, order, *self._device.forward(items, self._block_tables))

    def collect(self, step: LaunchedStep) -> StepResult:
        """Waits for the device. There is no token of requests that did not sample."""
        self.finish(step)
        tokens: list[Sequence[int]] = [()] * len(step.plan.scheduled)
        for index, token in zip(step.order, step.read_tokens(), strict=True):
            tokens[index] = (token,)
        logprobs = {}
        if step.sampled is not None and step.sampled.logprobs is not None:
            entries = step.sampled.logprobs.read()
            logprobs = {step.order[i]: (one,) for i, one in zip(step.sampled.asked, entries, strict=True)}
        if self.device_clock is not None:
            self.device_clock.collect()
        return StepResult(tokens, logprobs, read_prompts(step.prompt_logprobs))

    # ---- its parts -----------------------------------------------------------------------------

    def _choose(self, plan: StepPlan, order: Sequence[int], ids: Tensor, hidden: Tensor) -> LaunchedStep:
        """Sample; `ids` and `hidden` are those of all tokens that the device gave, in this order."""
        items = [plan.scheduled[i] for i in order]
        prompt_logprobs = log_prompts(self.model.logits, hidden, items, order, normalise=self._normalise)
        sampling = [j for j, item in enumerate(items) if item.samples]
        if not sampling:
            return LaunchedStep(plan, prompt_logprobs=prompt_logprobs)
        if len(sampling) < ids.shape[0]:
            at = on_device(np.cumsum([item.num_new for item in items])[sampling] - 1, torch.int64, ids.device)
            ids, hidden = ids[at], hidden[at]
        step = LaunchedStep(plan, [order[j] for j in sampling], prompt_logprobs=prompt_logprobs)
        items = [items[j] for j in sampling]
        return self._sample_or_wait(step, items, partial(self._sample, self.model.logits(hidden), items, ids))

    def _sample_or_wait(self, step: LaunchedStep, items: Items, sample: Sample) -> LaunchedStep:
        """Sample now, unless a row's mask follows a token in flight: then `finish` does."""
        if self.config.async_scheduling and self.masks.concerns([item.request.row for item in items]):
            step.sample = sample
        return sample(step) if step.sample is None else step

    def _sample(self, logits: Tensor, items: Items, ids: Tensor, step: LaunchedStep) -> LaunchedStep:
        """logits: [m, vocab]; ids: [m], the token in front of the one to be chosen."""
        self.clock.enter("sample")
        rows = [item.request.row for item in items]
        positions = [item.start + item.num_new for item in items]
        masked = [(i, item.request.end_ids) for i, item in enumerate(items) if item.may_not_end]
        output = partial(known_output, items)
        sampled = self._sampler.sample(logits.float(), rows, positions, masked, output, ids)
        if self._ranks is not None:
            self._ranks.agree(sampled.tokens)
        self._inputs.set_newest(rows, sampled.tokens)
        step.sampled, step.sample = sampled, None
        step.read_tokens = self._device.read_later(sampled.tokens)
        return step

    def _sample_masked(self, choose: ChooseMasked, items: Items, step: LaunchedStep) -> LaunchedStep:
        self.clock.enter("sample")
        step.read_tokens, step.sample = choose(*self.masks.bits_of(items)), None
        return step

    def _acquire_row(self, request: Request) -> None:
        row = request.row
        # A row that kept anything of its former owner would change this request's output without a
        # trace (CVE-2026-114049): better to stop.
        if self._occupied[row] or self._block_tables[:, row].any() or not self._inputs.is_clean(row):
            raise EngineError(f"row {row} was not clean when it was acquired")
        self._occupied[row] = True
        self._sampler.set_row(row, request.source, request.token_ids, request.prompt_len)

    def _release_row(self, row: int) -> None:
        self._occupied[row] = False
        self._block_tables[:, row] = 0
        self._inputs.clear_row(row)
        self._sampler.clear_row(row)
