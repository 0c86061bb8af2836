"""Compiles the kernels that sanitize.py launches for compute capability 9.0, as an H200 has it; no GPU.

    python scripts/gpu/compile_kernels.py [PART…]

A line for each compiled form: warps, registers of a thread, bytes of its stack, where it spills, and of the
program's shared memory. Exit status: 1 if one does not compile, or takes more than a program may have.
What the kernels are given holds no values: sizes and alignment decide what is compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from count_instructions import SHARED_MEMORY, Hopper, resources
from triton.runtime import driver
from triton.runtime.jit import JITFunction

PARTS = ("operators", "scaled", "coded", "sampling", "rules", "step_inputs", "attention", "models", "peers")
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 << 30
)


class Compiler:
    """Stands in for every launch: compiles instead, and prints what is new."""

    def __init__(self) -> None:
        self.failed = 0
        self._seen: set[str] = set()

    def launcher(self, kernel: Any, grid: Any) -> Any:
        def compile_it(*given: Any, **options: Any) -> None:
            try:
                compiled = JITFunction.run(kernel, *given, grid=grid, warmup=True, **options)
            except Exception as error:  # whatever the compiler's stages raise
                self._print(kernel, f"does not compile: {' '.join(str(error).split())[-300:]}")
                self.failed += 1
                return
            if compiled.hash in self._seen:
                return
            self._seen.add(compiled.hash)
            used, shared = resources(compiled), compiled.metadata.shared
            figures = f"{compiled.metadata.num_warps:5}{used['REG']:10}{used['STACK']:7}{shared:8}"
            self._print(kernel, figures + "  too much shared memory" * (shared > SHARED_MEMORY))
            self.failed += shared > SHARED_MEMORY

        return compile_it

    def _print(self, kernel: Any, text: str) -> None:
        print(f"{kernel.fn.__name__:26}{text}", flush=True)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("parts", nargs="*", metavar="PART", help="of sanitize.py (default: all)")
    args = parser.parse_args()
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(PARTS)}")
    driver.set_active(Hopper())  # type: ignore[arg-type]
    with contextlib.ExitStack() as patches:
        for name, value in (
            ("torch.cuda.synchronize", lambda *_: None),
            ("torch.cuda.get_device_capability", lambda *_: (H200.major, H200.minor)),
            ("torch.cuda.get_device_properties", lambda *_: H200),
        ):
            patches.enter_context(mock.patch(name, value))
        from microvllm.ops.gpu import launch
        from microvllm.ops.gpu.levers import Levers

        every = Levers(stream=True, early_reads=True, boxes=True)
        patches.enter_context(mock.patch.object(Levers, "of", staticmethod(lambda _: every)))
        patches.enter_context(mock.patch.object(launch, "can_launch_early", lambda _: True))
        zeros = torch.zeros
        unpinned = lambda *sizes, pin_memory=False, **options: zeros(*sizes, **options)  # noqa: E731
        patches.enter_context(mock.patch.object(torch, "zeros", unpinned))
        import sanitize

        compiler = Compiler()
        launcher = lambda kernel, grid: compiler.launcher(kernel, grid)  # noqa: E731
        patches.enter_context(mock.patch.object(JITFunction, "__getitem__", launcher))
        for name, value in (
            ("DEVICE", torch.device("cpu")),
            ("check", lambda *_: None),
            ("check_tokens", lambda *_: None),
        ):
            patches.enter_context(mock.patch.object(sanitize, name, value))
        print(f"{'kernel':26}warps registers  stack  shared")
        with torch.inference_mode():
            for part in args.parts or PARTS:
                print(f"-- {part}", flush=True)
                getattr(sanitize, part)()
    return int(compiler.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
