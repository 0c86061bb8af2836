"""Turns a plan into tensors, runs the model, samples.

Every running request owns one row, from admission to its last step in flight, of every array here:
last token, block table, sampling parameters. Rows are zeroed at release and must be clean at acquire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import Tensor

from microvllm.adapters.decoder import DecoderModel
from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.rotary import inverse_frequencies
from microvllm.adapters.weights import load_weights
from microvllm.ops.attention import AttentionConfig, AttentionShape
from microvllm.ops.operators import make_operators
from microvllm.ops.quantized import QuantizedTensor
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.plan import Request, ScheduledRequest, StepPlan, StepResult
from microvllm.runtime.errors import MODEL_FILE_REMEDY, ConfigError, EngineError
from microvllm.runtime.progress import OnProgress, Stage
from microvllm.runtime.request import TokenLogprobs
from microvllm.runtime.worker.gpu_memory import measure_kv_blocks
from microvllm.runtime.worker.logits import (
    LogprobRequest,
    LogprobTensors,
    Output,
    log_probabilities,
    on_device,
)
from microvllm.runtime.worker.sampler import Sampled, Sampler
from microvllm.runtime.worker.step_inputs import DeviceInputs, HostInputs, Readback, StepArrays, StepInputs
from microvllm.runtime.worker.step_times import DeviceClock, StepClock, time_forward

if TYPE_CHECKING:
    from microvllm.runtime.worker.graphs import DecodeGraphs, PromptGraphs
    from microvllm.runtime.worker.sampler import GPUSampler

WARM_UP_TOKENS = (2, 5, 20, 64, 250, 1000, 4000)
PROMPT_SLICE = 128  # prompt positions whose logits exist at a time


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """`read_tokens` waits for the device; `order` has the index in plan.scheduled of each sampled token."""

    plan: StepPlan
    order: Sequence[int] = ()
    read_tokens: Callable[[], list[int]] = list
    sampled: Sampled | None = None
    prompt_logprobs: dict[int, list[LogprobTensors]] | None = None  # by index in plan.scheduled


class ModelGraphRunner:
    """Owns the model, the KV cache and the rows; the only user of the device.

    `config` is the given one with the size of the KV cache, which on a GPU is measured.
    """

    def __init__(self, config: EngineConfig, on_progress: OnProgress | None = None) -> None:
        """Load the model. Raises `ConfigError` that names the file or the tensor at fault."""
        torch.set_num_threads(config.cpu_threads)
        spec, dtype, device = config.spec, getattr(torch, config.dtype), torch.device(config.device)
        try:
            loaded = None if on_progress is None else partial(on_progress, "Loading weights")
            weights = load_weights(
                Path(config.model_path),
                spec,
                config.load_format,
                dtype,
                loaded,
                config.device,
                keep_quantized=config.packed_weights,
            )
        except ModelFileError as error:
            raise ConfigError(str(error), remedy=MODEL_FILE_REMEDY) from error
        if config.int8_activations and not any(isinstance(w, QuantizedTensor) for w in weights.values()):
            raise ConfigError(f"--cpu-activations int8: {config.model} has no quantised matrices")
        try:
            operators = make_operators(
                config.attention_backend, dtype, config.cpu_threads, config.int8_activations
            )
        except ValueError as error:  # MICROVLLM_GPU_OFF
            raise ConfigError(str(error)) from error
        self._model = DecoderModel(spec, weights, operators)
        if config.num_blocks == 0:
            measuring = Stage("Measuring memory", 1, on_progress)
            config = msgspec.structs.replace(config, num_blocks=measure_kv_blocks(config, self._model))
            measuring.finish(f"KV cache: room for {config.num_blocks * config.block_size:,} tokens")
        self.config = config
        shape = AttentionShape(
            spec.num_layers,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.sliding_window,
            spec.rope.attention_factor,
        )
        self._attention = operators.attention(
            AttentionConfig(
                shape,
                config.num_blocks,
                config.block_size,
                inverse_frequencies(spec.rope, spec.head_dim).to(device),
                config.max_model_len,
                dtype,
                self._model.qk_norms,
            )
        )
        self._block_tables = np.zeros((config.max_num_seqs, config.max_blocks), dtype=np.int64)
        self._occupied = np.zeros(config.max_num_seqs, dtype=bool)
        self._graphs: DecodeGraphs | None = None
        self._prompt_graphs: PromptGraphs | None = None
        self._readback: Readback | None = None
        self._inputs: StepInputs
        # Not on the CPU: no weight asks for gradients, and to enter the mode takes 0.1 ms of a step there.
        self._mode = nullcontext if config.device == "cpu" else torch.inference_mode
        if config.device == "cpu":
            self._inputs = HostInputs(config.max_num_seqs, config.block_size)
            self._sampler = Sampler(config.max_num_seqs, spec.vocab_size, config.seed, config.logprobs_mode)
        else:
            self._use_gpu(device, on_progress)
        self.clock = StepClock()
        self.device_clock: DeviceClock | None = None
        if config.log_step_times and config.device == "cpu":
            self._attention = time_forward(self._model, self._attention, self.clock)
        elif config.log_step_times:
            self.device_clock = DeviceClock(self.clock)
        if config.attention_backend == "cpu":
            # What torch still does is too small to share, and its threads wait for each other
            # at every operator, however long one of them is kept from its core.
            torch.set_num_threads(1)

    def _use_gpu(self, device: torch.device, on_progress: OnProgress | None) -> None:
        # Here, because a machine without a GPU need not have Triton.
        from microvllm.runtime.worker.graphs import DecodeGraphs, PromptGraphs
        from microvllm.runtime.worker.sampler import GPUSampler

        config = self.config
        rows = config.max_num_seqs + 1  # the last is the padding row of captured batches
        inputs = DeviceInputs(rows, config.block_size, device)
        sampler = GPUSampler(rows, config.spec.vocab_size, config.seed, config.logprobs_mode, device)
        self._inputs, self._sampler = inputs, sampler
        self._readback = readback = Readback(config.max_num_seqs)
        if not config.enforce_eager:
            pool = torch.cuda.graph_pool_handle()
            self._graphs = DecodeGraphs(config, self._model, self._attention, inputs, sampler, readback, pool)
            self._prompt_graphs = PromptGraphs(
                config, self._model, self._attention, inputs, self._graphs.tables, pool
            )
            number = len(self._prompt_graphs.sizes) + len(self._graphs.sizes)
            free, _ = torch.cuda.mem_get_info()
            capturing = Stage("Capturing CUDA graphs", number, on_progress)
            self._prompt_graphs.capture(capturing)
            self._graphs.capture(capturing)
            taken = free - torch.cuda.mem_get_info()[0]
            capturing.finish(f"Captured {number} graphs in {capturing.seconds:.1f} s, {taken / 1e9:.1f} GB")
        self._warm_up(sampler, on_progress)

    @torch.inference_mode()
    def _warm_up(self, sampler: GPUSampler, on_progress: OnProgress | None) -> None:
        """Steps of padding tokens, with and without single ones in front: the first of a kind compiles.

        They write no keys and values: their slots are -1.
        """
        warming = Stage("Warming up", len(WARM_UP_TOKENS), on_progress)
        for longest in WARM_UP_TOKENS:
            for decodes in (0, 1, 16):
                lengths = np.array([1] * decodes + [min(longest, self.config.max_model_len)] * 2)
                total = int(lengths.sum())
                # The sampler has room for one row more than there are requests.
                if total > self.config.max_num_batched_tokens or len(lengths) > self.config.max_num_seqs + 1:
                    continue
                positions = np.concatenate([np.arange(length) for length in lengths])
                nothing = np.zeros(total, dtype=np.int64)
                rows = np.zeros(len(lengths), dtype=np.int64)
                arrays = StepArrays(nothing, nothing, positions, nothing - 1, rows, lengths, lengths, decodes)
                ids, batch = self._inputs.make(arrays, self._block_tables)
                hidden = self._model.forward(ids, self._attention.begin_step(batch))
                sampler.warm_up(self._model.logits(hidden[: decodes + 2]))
            warming.advance()
        torch.cuda.synchronize()
        warming.finish(f"Warmed up in {warming.seconds:.1f} s")

    @property
    def graph_replays(self) -> int:
        return sum(graphs.replays for graphs in (self._graphs, self._prompt_graphs) if graphs is not None)

    @property
    def padded_tokens(self) -> int:
        graphs = (self._graphs, self._prompt_graphs)
        return sum(each.padded_tokens for each in graphs if each is not None)

    # ---- a step --------------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Change the rows as the plan says, run the model once over all its tokens, and sample.

        Raises `EngineError` for a fault of the GPU, after which it answers nothing any more.
        """
        try:
            with self._mode():
                step = self._launch(plan)
            if self.device_clock is not None:
                self.device_clock.end()
            return step
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.config.device == "cpu":
                raise
            raise EngineError(f"the GPU failed: {next(iter(str(error).splitlines()), '')}") from error

    def _launch(self, plan: StepPlan) -> LaunchedStep:
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
        if self._graphs is not None:
            if self._graphs.covers(items):
                return self._replay(self._graphs, plan, items)
            self._graphs.note_blocks(items)
        ids, hidden = self._forward(items)
        prompt_logprobs = self._prompt_logprobs(hidden, items, order)
        sampling = [j for j, item in enumerate(items) if item.samples]
        if not sampling:
            return LaunchedStep(plan, prompt_logprobs=prompt_logprobs)
        if len(sampling) < ids.shape[0]:
            ends = np.cumsum([item.num_new for item in items])[sampling] - 1
            last = on_device(ends, torch.int64, hidden.device)
            ids, hidden = ids[last], hidden[last]
        sampled = self._sample(self._model.logits(hidden), [items[j] for j in sampling], ids)
        return self._launched(plan, [order[j] for j in sampling], sampled, prompt_logprobs)

    def collect(self, step: LaunchedStep) -> StepResult:
        """Waits for the device. There is no token of requests that did not sample."""
        tokens: list[Sequence[int]] = [()] * len(step.plan.scheduled)
        for index, token in zip(step.order, step.read_tokens(), strict=True):
            tokens[index] = (token,)
        logprobs, prompt_logprobs = {}, {}
        if step.sampled is not None and step.sampled.logprobs is not None:
            entries = step.sampled.logprobs.read()
            logprobs = {step.order[i]: (one,) for i, one in zip(step.sampled.asked, entries, strict=True)}
        if step.prompt_logprobs:
            prompt_logprobs = {index: _read(parts) for index, parts in step.prompt_logprobs.items()}
        if self.device_clock is not None:
            self.device_clock.collect()
        return StepResult(tokens, logprobs, prompt_logprobs)

    # ---- its parts -----------------------------------------------------------------------------

    def _forward(self, items: Sequence[ScheduledRequest]) -> tuple[Tensor, Tensor]:
        """The id and the hidden state of every token of the step: [n], [n, hidden]."""
        made = self._inputs.advance(items)
        if made is None:
            arrays = StepArrays.of(items, self._block_tables, self.config.block_size)
            graphs = self._prompt_graphs
            if graphs is not None and (size := graphs.size_for(arrays)) is not None:
                graphs.send(size, arrays)
                self._begin_forward()
                return graphs.forward(size, arrays)
            made = self._inputs.make(arrays, self._block_tables)
        ids, batch = made
        self._begin_forward()
        return ids, self._model.forward(ids, self._attention.begin_step(batch))

    def _begin_forward(self) -> None:
        self.clock.enter("forward")
        if self.device_clock is not None:
            self.device_clock.begin()

    def _replay(
        self, graphs: DecodeGraphs, plan: StepPlan, items: Sequence[ScheduledRequest]
    ) -> LaunchedStep:
        """A step of single tokens by its captured graph, which also chooses the tokens of plain requests."""
        size = graphs.send(items)
        self._begin_forward()
        ids, logits, tokens = graphs.replay(size, len(items))
        order = range(len(items))
        if graphs.chose_all(items) and self._readback is not None:
            return LaunchedStep(
                plan, order, self._readback.written(len(items)), Sampled(tokens, [], None), {}
            )
        return self._launched(plan, order, self._sample(logits.float(), items, ids), {})

    def _launched(
        self,
        plan: StepPlan,
        order: Sequence[int],
        sampled: Sampled,
        prompt_logprobs: dict[int, list[LogprobTensors]],
    ) -> LaunchedStep:
        read = sampled.tokens.tolist if self._readback is None else self._readback.begin(sampled.tokens)
        return LaunchedStep(plan, order, read, sampled, prompt_logprobs)

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
                tokens = on_device(request.token_ids[low + 1 : high + 1], torch.int64, hidden.device)
                logits = self._model.logits(hidden[at + low : at + high])
                requested = [LogprobRequest(count)] * (high - low)
                normalise = self.config.logprobs_mode.endswith("logprobs")
                found.setdefault(index, []).append(
                    log_probabilities(logits, tokens, requested, normalise=normalise)
                )
        return found

    def _sample(self, logits: Tensor, items: Sequence[ScheduledRequest], ids: Tensor) -> Sampled:
        """ids: [m], the token in front of the one to be chosen."""
        self.clock.enter("sample")
        rows = [item.request.row for item in items]
        positions = [item.start + item.num_new for item in items]
        masked = [
            (i, item.request.end_ids)
            for i, item in enumerate(items)
            if item.start + item.num_new - item.request.prompt_len < item.request.params.min_tokens
        ]

        def output(i: int) -> Output:
            request = items[i].request
            known = request.token_ids[request.prompt_len :]
            return known, len(request.token_ids) < positions[i]

        sampled = self._sampler.sample(logits, rows, positions, masked, output, ids)
        self._inputs.set_newest(rows, sampled.tokens)
        return sampled

    def _acquire_row(self, request: Request) -> None:
        row = request.row
        # A row that kept anything of its former owner would change this request's output without a
        # trace (CVE-2026-114049): better to stop.
        if self._occupied[row] or self._block_tables[row].any() or not self._inputs.is_clean(row):
            raise EngineError(f"row {row} was not clean when it was acquired")
        self._occupied[row] = True
        self._sampler.set_row(row, request.source, request.token_ids, request.prompt_len)

    def _release_row(self, row: int) -> None:
        self._occupied[row] = False
        self._block_tables[row] = 0
        self._inputs.clear_row(row)
        self._sampler.clear_row(row)


def _read(parts: Sequence[LogprobTensors]) -> list[TokenLogprobs]:
    return [entry for part in parts for entry in part.read()]
