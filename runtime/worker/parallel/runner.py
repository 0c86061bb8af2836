"""The runner of a model that several ranks hold: this process is rank 0, which sends the others each plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from microvllm.adapters.decoder import DecoderModel
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.plan import StepPlan, StepResult
from microvllm.runtime.errors import EngineError, MicroVLLMError
from microvllm.runtime.progress import OnProgress
from microvllm.runtime.worker.model_runner import LaunchedStep, ModelGraphRunner
from microvllm.runtime.worker.parallel.groups import TorchRanks
from microvllm.runtime.worker.parallel.messages import PlanWriter, stamp_of
from microvllm.runtime.worker.parallel.processes import OnFailure, RankProcesses
from microvllm.runtime.worker.pooling import make_runner


def start_runner(
    config: EngineConfig,
    on_progress: OnProgress | None = None,
    on_failure: OnFailure | None = None,
    model: DecoderModel | None = None,
) -> ModelGraphRunner | ParallelRunner:
    """The runner that the model and the number of its ranks need; one rank may be given its model.

    Raises as these do.
    """
    if config.tensor_parallel_size == 1:
        return make_runner(config, on_progress, model=model)
    return ParallelRunner(config, on_progress, on_failure)


class ParallelRunner:
    """A `ModelGraphRunner` of one rank's part, and the processes of the others.

    on_failure: called by a thread when another rank has failed. Without it a step that waits for that rank is
    ended, and is an error. Raises `ConfigError` or `EngineError`, which names the rank, if one of them cannot
    start. A step that fails on one rank leaves the others waiting, so that any failure is an `EngineError`.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_progress: OnProgress | None = None,
        on_failure: OnFailure | None = None,
    ) -> None:
        self._writer = PlanWriter()
        self._processes = processes = RankProcesses(config, on_failure)
        try:
            processes.start(config, stamp_of(config))
            self._ranks = ranks = TorchRanks(0, config.tensor_parallel_size, config.device, processes.folder)
            processes.abort_with(ranks.abort)
            self._own = own = make_runner(config, on_progress, ranks)
            self.config, self.masks = own.config, own.masks
            self.clock, self.device_clock = own.clock, own.device_clock
            processes.wait_ready()
        except MicroVLLMError:
            processes.end()
            raise
        except BaseException as error:
            failed = processes.error(str(error))
            processes.end()
            raise failed from error

    @property
    def graph_replays(self) -> int:
        return self._own.graph_replays

    @property
    def padded_tokens(self) -> int:
        return self._own.padded_tokens

    def close(self) -> None:
        """End the other ranks; no step can be launched then."""
        self._processes.end()

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """See `ModelGraphRunner`."""
        self._processes.send(self._writer.message(plan))
        with self._failing_for_all():
            return self._own.launch(plan)

    def finish(self, step: LaunchedStep) -> LaunchedStep:
        """See `ModelGraphRunner`."""
        with self._failing_for_all():
            return self._own.finish(step)

    def collect(self, step: LaunchedStep) -> StepResult:
        """See `ModelGraphRunner`."""
        with self._failing_for_all():
            result = self._own.collect(step)
        if self._processes.failure is not None:  # the step was ended, not computed
            raise EngineError(self._processes.failure.message)
        return result

    @contextmanager
    def _failing_for_all(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._processes.error(f"rank 0 failed: {type(error).__name__}: {error}") from error
