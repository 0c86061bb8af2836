"""What the ranks exchange, through torch.distributed: NCCL between GPUs, gloo between processes of a CPU.

A group belongs to the engine that made it: torch's process-wide default group is left alone.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, FileStore, Store

from microvllm.runtime.errors import EngineError

if TYPE_CHECKING:
    from microvllm.ops.gpu.peers import PeerExchange

logger = logging.getLogger("microvllm.engine")

CONNECT_TIMEOUT = timedelta(seconds=60)
# For a rank to load its part of a model from a slow disk; one that is gone or hangs is noticed otherwise.
WAIT_TIMEOUT = timedelta(hours=1)
PEER_WORDS = 1 << 19  # of 32 bits: what the own kernels exchange at most, 2 MB from each rank
# Addresses of this machine alone; and no NVLink multicast, which not every machine with NVLink allows.
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",
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
            store = FileStore(os.path.join(folder, "ranks"), size)
            store.set_timeout(CONNECT_TIMEOUT)
            self._group = self._connect(device, store)
            self.smallest(rank)  # NCCL connects with the first call
            self._peers = None if device == "cpu" else self._connect_memory(store)
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "")
            raise EngineError(f"rank {rank} could not be connected with the others: {reason}") from error

    def _connect(self, device: str, store: Store) -> Any:
        self._device = torch.device(device)
        if device == "cpu":
            return dist.ProcessGroupGloo(store, self.rank, self.size, WAIT_TIMEOUT)
        torch.cuda.set_device(self.rank)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = WAIT_TIMEOUT
        return dist.ProcessGroupNCCL(store, self.rank, self.size, options)

    def _connect_memory(self, store: Store) -> PeerExchange | None:
        """What exchanges few rows without NCCL; None where it is off, or the GPUs do not reach each other."""
        # Here, because a machine without a GPU need not have Triton.
        from microvllm.ops.gpu.launch import can_launch_early
        from microvllm.ops.gpu.levers import Levers
        from microvllm.ops.gpu.peers import PeerExchange, box_bytes
        from microvllm.runtime.worker.parallel.peer_memory import PeerMemory

        device = torch.device("cuda", self.rank)
        if not self.smallest(Levers.of(device).peers):
            return None
        memory = None
        try:
            memory = PeerMemory(self.rank, self.size, box_bytes(self.size, PEER_WORDS), store)
        except RuntimeError as error:
            logger.warning("The GPUs do not reach each other's memory, all goes through NCCL: %s", error)
        if not self.smallest(memory is not None) or memory is None:
            return None
        self._memory = memory
        return PeerExchange(self.rank, memory.addresses, PEER_WORDS, device, pdl=can_launch_early(device))

    def sum(self, part: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `ops.sharding.Ranks`."""
        part = part.contiguous()
        if self._peers is not None and self._peers.fits(part):
            return self._peers.sum(part, residual)
        options = dist.AllreduceOptions()
        options.asyncOp = False
        _finish(self._group.allreduce([part], options))
        return part if residual is None else residual.add_(part)

    def join(self, part: Tensor) -> Tensor:
        """See `ops.sharding.Ranks`."""
        part = part.contiguous()
        if self._peers is not None and self._peers.fits(part):
            return self._peers.join(part)
        m, width = part.shape
        parts = part.new_empty(self.size * m, width)
        options = AllgatherOptions()
        options.asyncOp = False
        _finish(self._group._allgather_base(parts, part, options))
        return parts.view(self.size, m, width).transpose(0, 1).reshape(m, self.size * width)

    def agree(self, tokens: Tensor) -> None:
        """See `ops.sharding.Ranks`."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, False
        _finish(self._group.broadcast([tokens], options))

    def smallest(self, number: int) -> int:
        """See `ops.sharding.Ranks`."""
        options = dist.AllreduceOptions()
        options.reduceOp, options.asyncOp = dist.ReduceOp(dist.ReduceOp.MIN), False
        value = torch.tensor([number], dtype=torch.int64, device=self._device)
        _finish(self._group.allreduce([value], options))
        return int(value)

    def abort(self) -> None:
        """End what waits for another rank, from any thread; the group is unusable then."""
        if self._peers is not None:
            self._peers.end()
        self._group.abort()


def _finish(work: Any) -> None:
    """Wait for what has not been put on the current stream, where torch gives no work to wait for."""
    if work is not None:
        work.wait()
