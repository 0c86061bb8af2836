"""Small transfers between the host and a GPU, without waiting for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Device = str | torch.device


def on_device(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: Device) -> Tensor:
    """Copy host values to a tensor on the device, without waiting for the transfer."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if str(device) == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Stager:
    """Packs small host arrays as int32 into pinned memory and sends them as one.

    Buffers are used in turns: while a transfer waits for the device to get to it, the host must not write
    into its source.
    """

    BUFFERS = 4

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(0, dtype=torch.int32)] * self.BUFFERS
        self._sent = [torch.cuda.Event() for _ in range(self.BUFFERS)]  # type: ignore[no-untyped-call]
        self._next = 0

    def send(self, *arrays: np.ndarray) -> list[Tensor]:
        """The arrays on the device, as int32."""
        # Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not.
        starts = np.cumsum([0, *(-(-array.size // 4) * 4 for array in arrays)]).tolist()
        index, packed = self._take(starts[-1])
        view = packed.numpy()
        for start, array in zip(starts, arrays, strict=False):
            view[start : start + array.size] = array.reshape(-1)
        there = packed.to(self._device, non_blocking=True)
        self._sent[index].record()
        return [
            there[start : start + array.size].view(array.shape)
            for start, array in zip(starts, arrays, strict=False)
        ]

    def send_into(self, target: Tensor, array: np.ndarray) -> None:
        """Overwrite a tensor on the device; target and array have one shape."""
        index, packed = self._take(array.size)
        packed.numpy()[:] = array.reshape(-1)
        target.view(-1).copy_(packed, non_blocking=True)
        self._sent[index].record()

    def _take(self, size: int) -> tuple[int, Tensor]:
        index, self._next = self._next, (self._next + 1) % self.BUFFERS
        self._sent[index].synchronize()  # long past, but for a device that has fallen far behind
        if self._buffers[index].numel() < size:
            self._buffers[index] = torch.empty(max(size, 1 << 14), dtype=torch.int32, pin_memory=True)
        return index, self._buffers[index][:size]


class Readback:
    """Brings the tokens of a step to the host. Two steps may be on their way at a time.

    `memory`: [BUFFERS * num_rows] int64, pinned, for kernels that write tokens there themselves.
    """

    BUFFERS = 3

    def __init__(self, num_rows: int) -> None:
        self.memory = torch.empty(self.BUFFERS * num_rows, dtype=torch.int64, pin_memory=True)
        self._num_rows = num_rows
        self._arrived = [torch.cuda.Event() for _ in range(self.BUFFERS)]  # type: ignore[no-untyped-call]
        self._next = 0

    @property
    def start(self) -> int:
        """Where in `memory` the tokens of the next step go."""
        return self._next * self._num_rows

    def begin(self, tokens: Tensor) -> Callable[[], list[int]]:
        """tokens: [m] int64 on the device -> what waits for them and returns them."""
        start = self.start
        self.memory[start : start + len(tokens)].copy_(tokens, non_blocking=True)
        return self.written(len(tokens))

    def written(self, count: int) -> Callable[[], list[int]]:
        """What waits for the `count` tokens that launched kernels write from `start` on, and returns them."""
        buffer, arrived = self.memory[self.start : self.start + count], self._arrived[self._next]
        self._next = (self._next + 1) % self.BUFFERS
        arrived.record()

        def read() -> list[int]:
            arrived.synchronize()
            found: list[int] = buffer.tolist()
            return found

        return read
