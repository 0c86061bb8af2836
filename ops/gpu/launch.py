"""How kernels follow each other on the device: programmatic dependent launch.

With it a kernel's programs may start before the one ahead of it ends: they load what no kernel writes, the
weights, then wait for its results (CUDA C++ Programming Guide, "Programmatic Dependent Launch"). It needs
compute capability 9.0.

Every kernel of `ops.gpu` that is given `PDL` calls `follow` before it reads or writes anything that another
kernel writes or reads, on every path, also where it has nothing to do: what a later kernel knows is only
that the one right ahead of it has ended, and that is enough because each of them waited likewise.

What was complete before a kernel that waits first and lets others start second may be read earlier by all
that come behind that one: decode attention does (`ops.attention.triton_decode`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def follow(PDL: tl.constexpr):
    """Let the next kernel's programs start, then wait for the end of the kernel ahead."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def can_launch_early(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(pdl: bool) -> dict[str, Any]:
    """The keyword arguments of a kernel's launch that go with its `PDL`."""
    # Triton's interpreter and older cards know no `launch_pdl`.
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def shared_memory(device: torch.device) -> int:
    """Bytes of it that one program may have; in Triton's interpreter as on compute capability 9.0."""
    if device.type != "cuda":
        return 227 << 10
    index = torch.cuda.current_device() if device.index is None else device.index
    size: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return size
