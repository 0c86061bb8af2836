"""How many threads compute: by cores, by hyperthreads, by the cgroup's limit, and as --cpu-threads says."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from model_tools import make_engine, variant_folder
from process_tools import wait_until
from torch import Tensor

from microvllm.ops.attention import AttentionBatch, StepAttention
from microvllm.ops.cpu.build import FLAGS, FOLDER, find_compiler, load_kernels
from microvllm.ops.cpu.operators import MAX_KERNEL_ROWS_BF16, CpuAttention, CpuOperators
from microvllm.runtime import machine as cpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """64 logical cores, of which i and i + 32 are one physical core, without a limit."""
    for core in range(64):
        folder = tmp_path / "cores" / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 32},{core % 32 + 32}\n")
    monkeypatch.setattr(cpu, "_CORES", str(tmp_path / "cores"))
    monkeypatch.setattr(cpu, "_CGROUP", str(tmp_path))
    monkeypatch.setattr(cpu, "_affinity", lambda: set(range(64)))
    return tmp_path


def test_one_thread_a_physical_core_that_we_may_use(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (cpu.usable_cores(), cpu.default_threads()) == (64, 32)
    monkeypatch.setattr(cpu, "_affinity", lambda: {0, 1, 32, 40})
    assert (cpu.usable_cores(), cpu.default_threads()) == (4, 3)


@pytest.mark.parametrize(
    ("limit", "threads"),
    [("max 100000", 32), ("800000 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("rubbish", 32)],
)
def test_the_limit_of_a_cgroup_bounds_the_threads(machine: Path, limit: str, threads: int) -> None:
    (machine / "cpu.max").write_text(limit + "\n")
    assert cpu.default_threads() == threads


@pytest.mark.parametrize(("quota", "threads"), [("-1", 32), ("400000", 4)])
def test_the_limit_of_an_old_cgroup(machine: Path, quota: str, threads: int) -> None:
    (machine / "cpu").mkdir()
    (machine / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (machine / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cpu.default_threads() == threads


def test_where_the_system_says_nothing_every_core_counts(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_CORES", str(machine / "nothing"))
    assert cpu.default_threads() == 64


def tasks() -> set[str]:
    return set(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_the_kernels_have_the_threads_they_are_told_and_none_runs_when_idle() -> None:
    library, before = load_kernels(), tasks()
    operators = CpuOperators(library, 5)
    started = tasks() - before
    assert len(started) == 4
    product = operators.linear(torch.randn(640, 64))
    for _ in range(20):
        product(torch.randn(3, 64))

    def states() -> list[list[str]]:
        stats = (Path(f"/proc/self/task/{task}/stat").read_text() for task in sorted(started))
        fields = [stat.rpartition(")")[2].split() for stat in stats]
        return [[each[0], *each[11:13]] for each in fields]  # and the processor time of each thread

    wait_until(lambda: all(state == "S" for state, *_ in states()), "all have stopped spinning")
    asleep = states()
    time.sleep(0.3)
    assert states() == asleep
    del operators, product
    wait_until(lambda: not started & tasks(), "they are gone, which is a moment after they are joined")


POOL = """
#include "pool.c"
void run(Pool *pool, Piece piece, long pieces) { parallel(pool, piece, 0, pieces); }
int thread(void) { return pool_self(); }
"""


def test_a_thread_without_a_core_is_done_without_and_the_others_go_on(tmp_path: Path) -> None:
    """What one of four threads takes lasts 150 ms instead of 5: another process has its core."""
    source, path = tmp_path / "source.c", tmp_path / "pool.so"
    source.write_text(POOL)
    command = [*(find_compiler() or "cc").split(), *FLAGS, "-I", str(FOLDER), "-shared", str(source)]
    subprocess.run([*command, "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.pool_new.restype = ctypes.c_void_p
    library.pool_free.argtypes = [ctypes.c_void_p]
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long)
    library.run.argtypes = [ctypes.c_void_p, callback, ctypes.c_long]
    taken: list[tuple[int, int]] = []

    @callback
    def piece(_: int, index: int) -> None:
        thread = library.thread()
        taken.append((index, thread))
        time.sleep(0.15 if thread == 2 else 0.005)

    pool = library.pool_new(4)
    operators = []
    for _ in range(60):
        taken.clear()
        library.run(pool, piece, 8)
        assert sorted(index for index, _ in taken) == list(range(8))
        operators.append(Counter(thread for _, thread in taken))
    library.pool_free(pool)
    without = [threads for threads in operators if not threads[2]]
    assert 20 < len(without) < len(operators)
    assert all(sum(threads[other] for threads in without) > 20 for other in (0, 1, 3))


@pytest.mark.skipif(cpu.usable_cores() < 2, reason="needs two cores")
def test_torch_has_the_threads_for_its_products_alone() -> None:
    seen = []
    real = CpuAttention.begin_step

    def begin_step(attention: CpuAttention, batch: AttentionBatch) -> StepAttention:
        seen.append(torch.get_num_threads())
        return real(attention, batch)

    engine = make_engine(variant_folder("llama-tied"), cpu_threads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuAttention, "begin_step", begin_step)
        engine.generate("one two three", max_tokens=3)
    assert set(seen) == {1}
    product = CpuOperators(load_kernels(), 2).linear(torch.randn(4, 8))

    def by_library(x: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        if len(x) > 100:
            raise MemoryError
        return torch.zeros(len(x), 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "_library", by_library)
        product(torch.randn(MAX_KERNEL_ROWS_BF16 + 1, 8))
        assert seen[-1] == 2 and torch.get_num_threads() == 1
        with pytest.raises(MemoryError):
            product(torch.randn(101, 8))
    assert seen[-1] == 2 and torch.get_num_threads() == 1


def test_freed_memory_goes_back_to_the_system() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("not the GNU C library")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    rows = [torch.ones(15_000) for _ in range(2000)]  # 120 MB in pieces that are no mappings of their own
    last = rows[-1]  # what lies before it cannot be given back by lowering the end of the heap
    rows.clear()
    before = resident()
    cpu.return_freed_memory()
    assert before - resident() > 60e6
    assert float(last.sum()) == 15_000
