"""How a GPU's memory is divided, with sizes that a test sets. That they are the GPU's own: tests/gpu."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch

from microvllm.runtime.config import EngineConfig
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.kv_memory import CacheLayout
from microvllm.runtime.worker import gpu_memory
from microvllm.runtime.worker.gpu_memory import CONTEXT_BYTES, RESERVE_BYTES, load_beside_cache, memory_for

GIB = 1 << 30
BLOCK_BYTES = 1 << 20
WEIGHTS, ACTIVATIONS, GRAPHS = 14 * GIB, 2 * GIB, 1 * GIB


class Config(msgspec.Struct, frozen=True):
    device: str = "cuda"
    kv_dtype: str = "bfloat16"
    block_size: int = 16
    num_blocks: int = 0
    windows: tuple[int | None, ...] = (None,)
    max_model_len: int = 32_768
    may_shorten: bool = False
    enforce_eager: bool = False
    gpu_memory_utilization: float = 0.75

    states_bytes: int = 0


class Gpu:
    """80 GiB, of which CUDA's context takes a half."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: int) -> None:
        self.free = 80 * GIB - others - GIB // 2
        self.notes: list[str] = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (self.free, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: WEIGHTS)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: WEIGHTS)
        monkeypatch.setattr(gpu_memory, "_states_bytes", lambda config: config.states_bytes)
        monkeypatch.setattr(gpu_memory, "_activation_bytes", lambda *_: ACTIVATIONS)
        monkeypatch.setattr(gpu_memory, "_graph_bytes", lambda *_: GRAPHS)

    def load(self, **options: Any) -> EngineConfig:
        def load_model(*_: Any) -> Any:
            self.free -= WEIGHTS

        def note(what: str, done: int, total: int, note: str = "", /) -> None:
            self.notes.append(note)

        config: Any = Config(**options)
        layout = CacheLayout(config.windows, BLOCK_BYTES, config.block_size, 8192)
        with (
            mock.patch.object(gpu_memory, "rank_layout", lambda _: layout),
            mock.patch.object(gpu_memory, "load_model", load_model),
        ):
            return load_beside_cache(config, note)[1]


@pytest.mark.parametrize("others", [0, 15 * GIB])
def test_the_cache_gets_what_is_left_of_the_share(monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    """What other processes hold is not a part of this one's share."""
    gpu = Gpu(monkeypatch, others)
    config = gpu.load()
    expected = 60 * GIB - WEIGHTS - ACTIVATIONS - GRAPHS - CONTEXT_BYTES - RESERVE_BYTES
    assert config.num_blocks == expected // BLOCK_BYTES and config.max_model_len == 32_768
    parts = re.findall(r"([\d.]+)(?: \+| = )", gpu.notes[-1])
    assert sum(map(float, parts)) == pytest.approx(60, abs=0.03) and "= 60.00 GiB of 80.00" in gpu.notes[-1]
    assert gpu.notes[-1].startswith("weights 14.00 + activations 2.00 + graphs 1.00 + KV cache ")
    assert f"room for {config.num_blocks * 16:,} tokens" in gpu.notes[-1]


def test_states_are_a_part_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 0)
    less = gpu.load(states_bytes=5 * GIB).num_blocks
    assert " + states 5.00 + KV cache " in gpu.notes[-1] and "= 60.00 GiB of 80.00" in gpu.notes[-1]
    assert Gpu(monkeypatch, 0).load().num_blocks - less == 5 * GIB // BLOCK_BYTES
    with pytest.raises(ConfigError, match=r"no room for the KV cache: .* \+ states 70\.00 \+ ") as raised:
        Gpu(monkeypatch, 0).load(states_bytes=70 * GIB)
    assert raised.value.remedy is not None and "--max-num-seqs" in raised.value.remedy


def test_never_more_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 50 * GIB)
    config = gpu.load()
    assert config.num_blocks * BLOCK_BYTES == gpu.free - ACTIVATIONS - GRAPHS - RESERVE_BYTES


def test_without_graphs_there_is_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, 0)
    more = gpu.load(enforce_eager=True).num_blocks
    assert more - Gpu(monkeypatch, 0).load().num_blocks == GRAPHS // BLOCK_BYTES


def test_a_context_that_was_not_set_is_lowered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"gpu_memory_utilization": 0.25, "max_model_len": 131_072}
    config = Gpu(monkeypatch, 0).load(**options, may_shorten=True)
    assert config.max_model_len == config.num_blocks * 16 < 131_072
    assert f"The context is {config.max_model_len} tokens instead of the model's 131072" in caplog.text
    assert "--gpu-memory-utilization makes it larger" in caplog.text
    with pytest.raises(ConfigError, match="one request of 131072 tokens needs 8192 blocks") as raised:
        Gpu(monkeypatch, 0).load(**options)
    assert raised.value.remedy == "lower --max-model-len or raise --gpu-memory-utilization"


@pytest.mark.parametrize("options", [{"gpu_memory_utilization": 0.2}, {"num_blocks": 70_000}])
def test_no_room_at_all(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no room for the KV cache: weights 14\.00 \+ ") as raised:
        Gpu(monkeypatch, 0).load(**options, may_shorten=True)
    assert raised.value.remedy is not None and "raise --gpu-memory-utilization" in raised.value.remedy
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a capacity of 79.10 GiB\nmore"
            ),
            "the GPU has too little memory for the weights: 2.50 GiB more were wanted, and 1.00 of its 80.00 "
            "GiB are free",
        ),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
            "the GPU has too little memory for the weights: 1.00 of its 80.00 GiB are free",
        ),
    ],
)
def test_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, raised: RuntimeError, line: str) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (GIB, 80 * GIB))
    with pytest.raises(ConfigError) as found, memory_for("the weights"):
        raise raised
    assert str(found.value) == line and found.value.remedy == gpu_memory.NO_ROOM_REMEDY


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), memory_for("the weights"):
        raise RuntimeError("size mismatch")
