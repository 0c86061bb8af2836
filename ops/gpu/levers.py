"""Selects the optional GPU kernel optimizations; each can be switched off.

`MICROVLLM_GPU_OFF=stream,early_reads` disables those that it names. `docs/benchmarks.md` says what each
of them gained. Those of `OPT_IN` are in use only where `MICROVLLM_GPU_ON` names them.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, fields, replace

import torch
import triton

VARIABLE = "MICROVLLM_GPU_OFF"
OPT_IN_VARIABLE = "MICROVLLM_GPU_ON"
OPT_IN = {"peers", "early_zeros", "more_streams"}  # not in use unless that variable names them
# Multiplications that an H200 computes while the host launches a step's kernels one by one: 2,000 tokens of
# Qwen3-0.6B, 0.6 billion each, take it 5.2 to 6.2 ms, and the host 11.2 ms.
LAUNCHED_PRODUCTS = 2_100_000_000_000
GLUON_VERSION = "3.6."  # of Triton: the language of `ops.gpu.stream` is not stable


class LeverError(ValueError):
    """One of the two variables names an unknown optimization."""


def _named(variable: str, known: Collection[str]) -> set[str]:
    """The optimizations that a variable names. Raises `LeverError` for an unknown one."""
    names = {name.strip() for name in os.environ.get(variable, "").split(",")} - {""}
    if unknown := sorted(names.difference(known)):
        raise LeverError(f"{variable}: there is no {unknown[0]}; there are {', '.join(known)}")
    return names


@dataclass(frozen=True, slots=True)
class Levers:
    """Holds which of them are in use.

    stream: products of few rows by `ops.gpu.stream`; early_reads: attention reads what no kernel of the
    step writes before it waits for the one ahead; boxes: decode attention loads whole tiles of cached keys
    and values by TMA; packed: matrices that a checkpoint quantises stay packed; few_mxfp4: experts in
    MXFP4 of a few tokens are multiplied without sorting; w8a8: of those, products of
    many rows round activations to e4m3 where the checkpoint wants it; peers: sums over several GPUs of few
    rows by `ops.gpu.peers`; rules: penalties, biases and masks of a decode step by graphs of their own;
    long_prompts: graphs of steps with more than 1,024 tokens of prompts, for small models; early_codes:
    products of one or two rows with codes of 4 bits by `ops.gpu.coded_gemv`; block_w8a8: `w8a8` of many rows,
    too, with weights in blocks of 128 x 128, and of fewer with scales loaded a step ahead; early_zeros:
    zero points of codes, for 17 rows or more, requested two steps ahead; more_streams: `stream` of products
    without tilings that were timed, by some that resemble them.
    """

    stream: bool = False
    early_reads: bool = False
    boxes: bool = False
    packed: bool = True
    few_mxfp4: bool = True
    w8a8: bool = False
    peers: bool = False
    rules: bool = False
    long_prompts: bool = False
    early_codes: bool = False
    block_w8a8: bool = False
    early_zeros: bool = False
    more_streams: bool = False

    def prompt_tokens(self, num_products: int) -> int:
        """Tokens up to which a step's kernels take the host longer to launch than the GPU to compute.

        num_products: multiplications with weights that one token takes. 0 without `long_prompts`.
        """
        return LAUNCHED_PRODUCTS // num_products if self.long_prompts else 0

    @staticmethod
    def of(device: torch.device) -> Levers:
        """What the device and the installed Triton offer, without what is switched off.

        Raises `LeverError` for an unknown name.
        """
        known = [field.name for field in fields(Levers)]
        off = _named(VARIABLE, known)
        off |= OPT_IN - _named(OPT_IN_VARIABLE, known)
        levers = Levers(*(name not in off for name in known))
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            return Levers(packed=levers.packed, few_mxfp4=levers.few_mxfp4)
        return levers if triton.__version__.startswith(GLUON_VERSION) else replace(levers, stream=False)
