"""Matrices in ggml's block formats, of random bytes, and what a product with them has to be."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor

from microvllm.ops.cpu.operators import CpuOperators
from microvllm.ops.quantized import QuantizedRows, QuantizedTensor

Bytes = npt.NDArray[np.uint8]
GROUP = 32

# Where the float16 factors of a block lie: of the scales, and of the offsets.
FACTORS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
formats = st.sampled_from(sorted(FACTORS))
seeds = st.integers(0, 2**32 - 1)


def random_blocks(
    name: str, rows: int, blocks: int, seed: int, *, any_factor: bool = False, largest: float = 2.0
) -> Bytes:
    """[rows, bytes of a row]: random bytes; factors up to 2, or any there are, infinities and NaNs too."""
    kind = gguf.GGMLQuantizationType[name]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * blocks, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    if not any_factor:
        for at in FACTORS[name]:
            raw[:, at : at + 2] = (
                rng.uniform(-largest, largest, len(raw)).astype("<f2")[:, None].view(np.uint8)
            )
    if name == "MXFP4":  # powers of two; sums of products with the largest would be no numbers
        least, most = (0, 200) if any_factor else (119, int(np.log2(largest)) + 126)
        raw[:, 0] = rng.integers(least, most, len(raw))
    return raw.reshape(rows, -1)


def dequantized(name: str, raw: Bytes) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]))


def quantized(*parts: tuple[str, Bytes]) -> QuantizedTensor:
    kinds = [gguf.GGMLQuantizationType[name] for name, _ in parts]
    rows = tuple(QuantizedRows(int(kind), *raw.shape) for kind, (_, raw) in zip(kinds, parts, strict=True))
    raw = parts[0][1]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[0]]
    data = torch.from_numpy(np.concatenate([raw.reshape(-1) for _, raw in parts]))
    return QuantizedTensor.of(data, raw.shape[1] // block_bytes * block, rows)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor) -> Tensor:
    """What int8 activations make of x: multiples of a 127th of the largest of 32 values."""
    groups = x.reshape(len(x), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(127.0) / largest  # 127.0 / largest is 127 * (1 / largest) to torch
    quants = (groups * torch.where(largest > 0, inverse, 0.0)).round()
    assert quants.abs().max() <= 127
    return (quants.double() * (largest / 127.0).double()).reshape(x.shape)


def seen(operators: CpuOperators, x: Tensor) -> Tensor:
    """What quantised weights are multiplied with."""
    return rounded(x) if operators.int8_activations else x


def assert_products(actual: Tensor, x: Tensor, weight: Tensor, added: Tensor | float = 0.0) -> None:
    """Equal up to the order of float32 sums, whose error is a share of the terms that are added up."""
    expected = x.double() @ weight.double().t() + added
    terms = x.double().abs() @ weight.double().abs().t() + torch.as_tensor(added).abs()
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert ((actual - expected).abs() / terms.clamp(min=1e-30) < 3e-6).all()  # there may be no row
