"""What the ranks exchange, through torch.distributed: NCCL between GPUs, gloo between processes of a CPU.

A group belongs to the engine that made it: torch's process-wide default group is left alone.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from microvllm.runtime.errors import EngineError

CONNECT_TIMEOUT = timedelta(seconds=60)
# For a rank to load its part of a model from a slow disk; one that is gone or hangs is noticed otherwise.
WAIT_TIMEOUT = timedelta(hours=1)
# Addresses of this machine alone; and no NVLink multicast, which not every machine with NVLink allows.
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


class TorchRanks:
    """`ops.sharding.Ranks` of one process. `folder`: an empty one, where the ranks find each other.

    Waits for all of them. Raises `EngineError` if they cannot be connected.
    """

    def __init__(self, rank: int, size: int, device: str, folder: str) -> None:
        self.rank, self.size = rank, size
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            store = dist.FileStore(os.path.join(folder, "ranks"), size)
            store.set_timeout(CONNECT_TIMEOUT)
            self._group = self._connect(device, store)
            self.smallest(rank)  # NCCL connects with the first call
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "")
            raise EngineError(f"rank {rank} could not be connected with the others: {reason}") from error

    def _connect(self, device: str, store: dist.Store) -> dist.ProcessGroupGloo | dist.ProcessGroupNCCL:
        self._device = torch.device(device)
        if device == "cpu":
            return dist.ProcessGroupGloo(store, self.rank, self.size, WAIT_TIMEOUT)
        torch.cuda.set_device(self.rank)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = WAIT_TIMEOUT
        return dist.ProcessGroupNCCL(store, self.rank, self.size, options)

    def sum(self, part: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `ops.sharding.Ranks`."""
        part = part.contiguous()
        options = dist.AllreduceOptions()
        options.asyncOp = False
        self._group.allreduce([part], options).wait()
        return part if residual is None else residual.add_(part)

    def join(self, part: Tensor) -> Tensor:
        """See `ops.sharding.Ranks`."""
        m, width = part.shape
        parts = part.new_empty(self.size * m, width)
        options = AllgatherOptions()
        options.asyncOp = False
        self._group._allgather_base(parts, part.contiguous(), options).wait()
        return parts.view(self.size, m, width).transpose(0, 1).reshape(m, self.size * width)

    def agree(self, tokens: Tensor) -> None:
        """See `ops.sharding.Ranks`."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, False
        self._group.broadcast([tokens], options).wait()

    def smallest(self, number: int) -> int:
        """See `ops.sharding.Ranks`."""
        options = dist.AllreduceOptions()
        options.reduceOp, options.asyncOp = dist.ReduceOp.MIN, False
        value = torch.tensor([number], dtype=torch.int64, device=self._device)
        self._group.allreduce([value], options).wait()
        return int(value)

    def abort(self) -> None:
        """End what waits for another rank, from any thread; the group is unusable then."""
        self._group.abort()
