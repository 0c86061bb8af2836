"""Gives an engine's memory back and takes it again: vLLM's sleep levels 1 and 2, with its tags.

Asleep, there is neither a KV cache nor a captured graph: both are made again, so no address outlives them.
At level 1 the weights wait in the host's memory, on a CPU where they are; at level 2 they are loaded again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

from microvllm.adapters.decoder import DecoderModel
from microvllm.runtime.config import EngineConfig
from microvllm.runtime.core.engine_core import EngineCore
from microvllm.runtime.kv_events.publishing_core import make_core
from microvllm.runtime.machine import freeze_objects, return_freed_memory
from microvllm.runtime.worker.gpu_memory import memory_for
from microvllm.runtime.worker.loading import load_model
from microvllm.runtime.worker.model_runner import LaunchedStep, ModelGraphRunner
from microvllm.runtime.worker.parallel.runner import ParallelRunner

WEIGHTS, KV_CACHE = "weights", "kv_cache"
TAGS = (WEIGHTS, KV_CACHE)
LEVELS = (1, 2)

Runner = ModelGraphRunner | ParallelRunner
StartRunner = Callable[[EngineConfig, DecoderModel | None], Runner]


class SleepingCore:
    """Holds the engine core of a process, which nothing else may keep: `core`, None while it sleeps.

    `start` makes a runner, of a model if it is given one, as `start_runner` does.
    """

    def __init__(self, config: EngineConfig, start: StartRunner) -> None:
        self._start = start
        self._runner: Runner | None = start(config, None)
        self._config = self._runner.config
        self._model: DecoderModel | None = None  # while there are weights but no runner
        self._offloaded: OffloadedWeights | None = None
        self.asleep: set[str] = set()  # tags
        self.core: EngineCore[LaunchedStep] | None = make_core(self._config, self._runner)

    def sleep(self, level: int) -> None:
        """Drop the core, which must be at rest, with the KV cache; level 2 drops the weights, too.

        Asleep, what some tags of a `wake_up` have taken is given back.
        """
        runner = self._runner
        if self.core is not None and self.core.report is not None:
            self.core.report.write_last()
        if isinstance(runner, ParallelRunner):
            runner.close()
        elif runner is not None:
            self._model = runner.model
        self.asleep.update(TAGS)
        self.core = self._runner = runner = None
        if level == LEVELS[-1]:
            self._model = self._offloaded = None
        gc.unfreeze()  # what is frozen is never collected
        _return_memory()
        if self._model is not None and self._offloaded is None and self._config.device != "cpu":
            self._offloaded = OffloadedWeights(self._model)
            _return_memory()

    def wake_up(self, tags: Collection[str]) -> None:
        """Take the memory of some tags again; with the last of them there is a core.

        The KV cache is empty. Raises what the start of an engine raises; what was taken before then stays.
        """
        if WEIGHTS in tags:
            self._wake_weights()
        self.asleep.difference_update(tags)
        if self.asleep or self.core is not None:
            return
        self.asleep.add(KV_CACHE)
        runner = self._start(self._config, self._model)
        self.core = make_core(runner.config, runner)
        self._runner, self._model = runner, None
        self.asleep.clear()
        freeze_objects()

    def _wake_weights(self) -> None:
        if self._offloaded is not None:
            with memory_for("the weights"):
                self._offloaded.restore()
            self._offloaded = None
        elif self._model is None and self.core is None and self._config.tensor_parallel_size == 1:
            with memory_for("the weights"):
                self._model = load_model(self._config, None)
            _return_memory()  # the weights as they were read


def _return_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        # One for each stream that graphs were captured on, in memory of the graphs.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    return_freed_memory()


class OffloadedWeights:
    """The memory of a model's tensors, moved to the host; the tensors stay, without memory, until `restore`.

    Each storage is moved once, however many tensors view it, so that all of them see the memory it gets back.
    `device`: the type of those that are moved.
    """

    def __init__(self, model: object, device: str = "cuda") -> None:
        self._parts: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors_of(model):
            if tensor.device.type == device:
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage
        for storage in storages.values():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=device == "cuda")
            host.copy_(_bytes_of(storage))
            self._parts.append((storage, host))
            storage.resize_(0)

    @property
    def num_bytes(self) -> int:
        return sum(host.nbytes for _, host in self._parts)

    def restore(self) -> None:
        """Give each storage its memory and its bytes back. May be called again after it has failed."""
        while self._parts:
            storage, host = self._parts[-1]
            storage.resize_(host.nbytes)
            _bytes_of(storage).copy_(host)
            self._parts.pop()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def tensors_of(root: object) -> Iterator[torch.Tensor]:
    """Yield each tensor with memory that an object holds, through whatever it refers to.

    Of functions what they enclose counts, not their modules: those belong to all models.
    """
    waiting: list[Any] = [root]
    seen = {id(root)}
    while waiting:
        found = waiting.pop()
        if isinstance(found, torch.Tensor):
            if found.layout == torch.strided and found.untyped_storage().nbytes():  # oneDNN's have no storage
                yield found
            continue
        if isinstance(found, FunctionType):
            inner: list[Any] = [*(found.__closure__ or ()), found.__defaults__, found.__kwdefaults__]
        elif isinstance(found, (type, ModuleType, CodeType, BuiltinFunctionType)):
            continue
        else:
            inner = gc.get_referents(found)
        for each in inner:
            if id(each) not in seen:
                seen.add(id(each))
                waiting.append(each)
