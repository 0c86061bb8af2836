"""Makes the operators of a device by their name."""

from __future__ import annotations

import torch

from microvllm.ops.operators import Operators, TorchOperators


def make_operators(
    name: str,
    dtype: torch.dtype,
    threads: int,
    int8_activations: bool = False,
    batch_invariant: bool = False,
) -> Operators:
    """The operators called `name`.

    "torch": on torch's own threads; "cpu": on `threads` threads, where `int8_activations` may round what is
    multiplied with quantised weights (see `CpuOperators`); "triton" and "flash_attn": on the current GPU,
    with the attention backend of that name. `batch_invariant` keeps a row's bits whatever is computed with
    it, by "cpu" and "triton". Raises `NoCompilerError` if "cpu" cannot be built.
    """
    if name == "torch":
        return TorchOperators(dtype)
    if name == "cpu":
        from microvllm.ops.cpu.build import load_kernels
        from microvllm.ops.cpu.calibration import calibrated
        from microvllm.ops.cpu.operators import CpuOperators

        library = load_kernels()
        tuning, is_exact = calibrated(library).tuning, dtype == torch.float32
        return CpuOperators(library, threads, int8_activations, tuning, batch_invariant, is_exact)
    if name in ("triton", "flash_attn"):
        from microvllm.ops.gpu.operators import GpuOperators

        device = torch.device("cuda", torch.cuda.current_device())
        return GpuOperators(dtype, device, name, batch_invariant)
    raise ValueError(f"no operators are called {name}")
