"""The start of an engine within a GPU's memory. That it keeps to its share: scripts/gpu/check_memory.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from model_tools import make_engine, variant_folder

from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.worker import gpu_memory

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

from microvllm.runtime.worker.graphs import borrowed, capture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def engine(**options: object) -> InferenceEngine:
    return make_engine(variant_folder("llama-tied"), device="cuda", max_num_seqs=16, **options)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let torch allocate no more than 4 MiB beyond what it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_too_little_memory_ends_the_start_with_a_line(little_memory: None) -> None:
    with pytest.raises(ConfigError, match=r"^the GPU has too little memory for .*GiB are free") as raised:
        engine(num_gpu_blocks_override=512, block_size=16)
    assert raised.value.remedy == gpu_memory.NO_ROOM_REMEDY


def test_a_context_that_does_not_fit_is_lowered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the engine and by what counts tokens in front of it."""
    monkeypatch.setattr(gpu_memory, "RESERVE_BYTES", torch.cuda.mem_get_info()[1])  # then nothing is left
    with pytest.raises(ConfigError, match="no room for the KV cache"):
        engine(gpu_memory_utilization=1.0)
    monkeypatch.undo()
    made = engine(num_gpu_blocks_override=5, block_size=16)
    assert made.config.max_model_len == 80 and "The context is 80 tokens" in caplog.text
    assert made.processor._config.max_model_len == 80
    assert made.generate(["fox"], max_tokens=8)["fox"]


def test_graphs_share_the_memory_of_what_they_give() -> None:
    """Without this each size would keep its own logits."""
    size = 16 << 20  # int64: 128 MiB
    pool, stream, kept = torch.cuda.graph_pool_handle(), torch.cuda.Stream(), []
    values = torch.zeros(4, dtype=torch.int64, device="cuda")
    before = torch.cuda.memory_reserved()
    for i in range(4):
        graph, made = capture(
            lambda i=i: torch.zeros(size, dtype=torch.int64, device="cuda") + values[i], pool, stream
        )
        kept.append((graph, borrowed(made)))
        del made
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 3 * 8 * size, "two at a time, not five"
    values.copy_(torch.arange(4) + 5)
    for i, (graph, given) in enumerate(kept):
        graph.replay()
        assert int(given[0]) == int(given[-1]) == i + 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.float32])
def test_borrowed_memory_has_the_same_values(dtype: torch.dtype) -> None:
    owner = torch.arange(24, device="cuda").to(dtype).view(4, 6)
    lent = borrowed(owner)
    assert lent.data_ptr() == owner.data_ptr() and lent.dtype == dtype and torch.equal(lent, owner)
    owner[2, 3] = 7
    assert lent[2, 3] == 7
