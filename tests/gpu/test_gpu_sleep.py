"""An engine core on a GPU that sleeps: its memory is free, and graphs and tokens are as before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from model_tools import make_request, variant_folder

from microvllm.adapters.decoder import DecoderModel
from microvllm.runtime.config import EngineArgs, EngineConfig
from microvllm.runtime.worker.model_runner import ModelGraphRunner

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

from microvllm.runtime.worker.sleep import SleepingCore, tensors_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PROMPT = list(range(5, 45))


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.collect()


def start(config: EngineConfig, model: DecoderModel | None) -> ModelGraphRunner:
    return ModelGraphRunner(config, model=model)


def generated(engine: SleepingCore, request_id: int) -> list[int]:
    core = engine.core
    assert core is not None and core.add(make_request(request_id, PROMPT, 16)) is None
    outputs = []
    while core.has_work():
        outputs += core.step()
    outputs += core.drain()
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("level", [1, 2])
def test_a_gpu_has_its_memory_back_until_the_engine_wakes(level: int, eager: bool) -> None:
    options = {"num_gpu_blocks_override": 4096, "block_size": 16, "max_num_seqs": 16, "enforce_eager": eager}
    args = EngineArgs(model=str(variant_folder("llama-tied")), device="cuda", dtype="bfloat16", **options)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    engine = SleepingCore(args.resolve(), start)
    expected = generated(engine, 0)
    cache = 4096 * 16 * engine._config.spec.cache_plan.page_size * 2
    awake = torch.cuda.memory_reserved()
    assert awake - before > cache
    for round_ in range(1, 3):
        engine.sleep(level)
        # What compiled kernels and cuBLAS keep is left.
        assert torch.cuda.memory_reserved() - before < 0.1 * (awake - before)
        if level == 1:
            assert engine._model is not None
            assert not any(tensor.is_cuda for tensor in tensors_of(engine._model)), "a weight has stayed"
        engine.wake_up(["weights"])
        assert engine.core is None
        engine.wake_up(["kv_cache"])
        assert generated(engine, round_) == expected
        assert engine.core is not None and (engine.core.stats().graph_replays > 0) != eager
    assert torch.cuda.memory_reserved() < 1.1 * awake
