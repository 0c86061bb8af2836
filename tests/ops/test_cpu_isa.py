"""Which instructions the CPU kernels are compiled for, and that none beyond them is ever run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_case import BY_VECTORS
from torch.nn.functional import silu

from microvllm.ops.cpu import build, isa
from microvllm.ops.cpu.isa import IsaError, Level
from microvllm.ops.cpu.operators import CpuOperators
from microvllm.ops.norm import rms_norm
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError

ON_X86_64 = len(isa.levels()) > 1
needs_x86_64 = pytest.mark.skipif(not ON_X86_64, reason="other architectures have one level")
REGISTERS = {
    **{"amx": "tmm", "avx512_bf16": "zmm", "avx512_vnni": "zmm", "avx512": "zmm"},
    **{"avx2_vnni": "ymm", "avx2": "ymm", "portable": "xmm"},
}


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
    widest = ["tmm", "zmm", "ymm", "xmm"]
    beyond = widest[: widest.index(REGISTERS[name])]
    assert re.search(rf"%{REGISTERS[name]}\d", code)
    assert not any(f"%{register}" in code for register in beyond)
    # What avx2 and avx512 have and the portable level must not: instructions with three operands.
    assert (re.search(r"\svfmadd", code) is None) == (name == "portable")
    assert (re.search(r"\svpdpbusd", code) is None) == (name in ("avx512", "avx2", "portable"))
    assert (re.search(r"\svdpbf16ps", code) is None) == (name != "avx512_bf16")


@pytest.mark.parametrize("level", isa.levels(), ids=lambda level: level.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_level_computes_the_same(
    level: Level, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(isa.VARIABLE, level.name)
    try:
        operators = CpuOperators(build.load_kernels(), 2, tuning=BY_VECTORS)
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


@pytest.fixture
def isa_alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Libraries of isa.c alone: all that a level is chosen by, compiled at once for every level."""
    monkeypatch.setattr(build, "SOURCES", [build.FOLDER / "isa.c"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "isa"))


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
@pytest.mark.usefixtures("isa_alone")
@pytest.mark.parametrize("level", isa.levels(), ids=lambda level: level.name)
def test_masked_features_give_a_lower_level(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of a level's features, the best that needs none but the others is taken."""
    if not level.features <= (isa.cpu_features() or frozenset()):
        pytest.skip("this processor has no such level")
    assert loaded_level(monkeypatch, level.features) == level.name
    for missing in level.features:
        left = level.features - {missing}
        best = next(lower.name for lower in isa.levels() if lower.features <= left)
        assert best != level.name
        assert loaded_level(monkeypatch, left) == best


@needs_x86_64
def test_no_level_is_chosen_without_all_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of levels that this processor does not have: nothing is compiled or loaded here."""
    for level in isa.levels():
        monkeypatch.setattr(isa, "cpu_features", lambda features=level.features: features)
        assert next(isa.usable_levels()) == level
        for missing in level.features:
            monkeypatch.setattr(isa, "cpu_features", lambda left=level.features - {missing}: left)
            assert level not in isa.usable_levels()


@needs_x86_64
@pytest.mark.usefixtures("isa_alone")
def test_a_compiler_that_is_older_than_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses an option that it does not know: the best level that it can compile is taken."""
    best = next(isa.usable_levels())
    if best.name == "portable":
        pytest.skip("there is no lower level")
    newest = next(flag for flag in best.flags if flag not in level_named("portable").flags)
    compiler = tmp_path / "cc"
    compiler.write_text(
        f'#!/bin/sh\ncase " $* " in *" {newest} "*) echo unknown option >&2; exit 1;; esac\nexec cc "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    features = isa.cpu_features()
    expected = next(level.name for level in isa.usable_levels() if newest not in level.flags)
    assert loaded_level(monkeypatch, features) == expected


@needs_x86_64
@pytest.mark.usefixtures("isa_alone")
def test_a_system_that_promises_too_much_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every library is there, compiled, and the list of features claims or hides everything."""
    real = isa.cpu_features()
    if real is None:
        pytest.skip("this system does not list the processor's features")
    best = next(level.name for level in isa.levels() if level.features <= real)
    everything = frozenset(feature for level in isa.levels() for feature in level.features)
    assert loaded_level(monkeypatch, everything) == best
    assert loaded_level(monkeypatch, None) == best


@needs_x86_64
@pytest.mark.usefixtures("isa_alone")
def test_the_variable_caps_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isa.VARIABLE, "portable")
    assert loaded_level(monkeypatch, level_named("avx512").features) == "portable"


@needs_x86_64
def test_a_level_that_is_not_there_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "cpu_features", lambda: level_named("avx2").features)
    monkeypatch.setenv(isa.VARIABLE, "sse9")
    levels = "amx, avx512_bf16, avx512_vnni, avx512, avx2_vnni, avx2, portable"
    with pytest.raises(ConfigError, match=rf"^MICROVLLM_CPU_ISA=sse9: must be one of {levels}$"):
        EngineArgs(model="smollm2-135m-instruct", device="cpu").resolve()
    monkeypatch.setenv(isa.VARIABLE, "avx512")
    with pytest.raises(IsaError, match=r"^MICROVLLM_CPU_ISA=avx512: this processor has no avx512bw, "):
        build.load_kernels()
