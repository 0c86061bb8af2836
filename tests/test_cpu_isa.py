"""Which instructions the CPU kernels are compiled for, and that none beyond them is ever run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from microvllm.ops.cpu import build, isa
from microvllm.ops.cpu.isa import IsaError, Level
from microvllm.ops.cpu.operators import CpuOperators
from microvllm.ops.norm import rms_norm
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError

ON_X86_64 = len(isa.levels()) > 1
needs_x86_64 = pytest.mark.skipif(not ON_X86_64, reason="other architectures have one level")
REGISTERS = {"avx512": "zmm", "avx2": "ymm", "portable": "xmm"}


def level_named(name: str) -> Level:
    return next(level for level in isa.levels() if level.name == name)


@needs_x86_64
@pytest.mark.parametrize("name", REGISTERS)
def test_a_level_uses_its_registers_and_no_wider_ones(name: str) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump")
    library = build.build_kernels(level_named(name))
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    widest = list(REGISTERS.values())
    beyond = widest[: widest.index(REGISTERS[name])]
    assert re.search(rf"%{REGISTERS[name]}\d", code)
    assert not any(f"%{register}" in code for register in beyond)
    # What avx2 and avx512 have and the portable level must not: instructions with three operands.
    assert (re.search(r"\svfmadd", code) is None) == (name == "portable")


@pytest.mark.parametrize("level", isa.levels(), ids=lambda level: level.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_level_computes_the_same(
    level: Level, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(isa.VARIABLE, level.name)
    try:
        operators = CpuOperators(build.load_kernels(), 2)
    except IsaError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 70, 130), (2, 33, 5), (5, 16, 64), (7, 100, 77), (13, 40, 200)):
        x, weight = (
            torch.randn(m, k, generator=generator),
            torch.randn(2 * n, k, generator=generator).to(dtype),
        )
        norm = torch.randn(k, generator=generator)
        normed = rms_norm(x.double(), norm.double(), 1e-5)
        product = normed @ weight.double().t()
        error = operators.norm_linear(norm, 1e-5, weight)(x) - product
        assert error.abs().max() < 2e-6 * (normed.abs() @ weight.double().abs().t()).max()
        gate, up = product.chunk(2, -1)
        swiglu = silu(gate) * up
        error = operators.norm_gate_up(norm, 1e-5, weight)(x) - swiglu
        assert error.abs().max() < 1e-5 * swiglu.abs().max()


def loaded_level(monkeypatch: pytest.MonkeyPatch, features: frozenset[str] | None) -> str:
    """The level of the library that is loaded where the system lists these features."""
    loaded: list[str] = []
    real = build.ctypes.CDLL

    def load(path: str) -> object:
        loaded.append(path)
        return real(path)

    monkeypatch.setattr(isa, "cpu_features", lambda: features)
    monkeypatch.setattr(build, "ctypes", SimpleNamespace(CDLL=load))
    build.load_kernels()
    return Path(loaded[-1]).name.split("-")[1]


@needs_x86_64
def test_masked_features_give_a_lower_level(monkeypatch: pytest.MonkeyPatch) -> None:
    best = level_named("avx2").features
    assert loaded_level(monkeypatch, frozenset()) == "portable"
    for missing in best:
        assert loaded_level(monkeypatch, best - {missing}) == "portable"


@needs_x86_64
def test_a_system_that_promises_too_much_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every library is there, compiled, and the list of features claims or hides everything."""
    real = isa.cpu_features()
    if real is None:
        pytest.skip("this system does not list the processor's features")
    best = next(level.name for level in isa.levels() if level.features <= real)
    assert loaded_level(monkeypatch, level_named("avx512").features) == best
    assert loaded_level(monkeypatch, None) == best


@needs_x86_64
def test_the_variable_caps_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isa.VARIABLE, "portable")
    assert loaded_level(monkeypatch, level_named("avx512").features) == "portable"


@needs_x86_64
def test_a_level_that_is_not_there_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "cpu_features", lambda: level_named("avx2").features)
    monkeypatch.setenv(isa.VARIABLE, "sse9")
    with pytest.raises(ConfigError, match=r"^MICROVLLM_CPU_ISA=sse9: must be one of avx512, avx2, portable$"):
        EngineArgs(model="smollm2-135m-instruct", device="cpu").resolve()
    monkeypatch.setenv(isa.VARIABLE, "avx512")
    with pytest.raises(IsaError, match=r"^MICROVLLM_CPU_ISA=avx512: this processor has no avx512bw, "):
        build.load_kernels()
