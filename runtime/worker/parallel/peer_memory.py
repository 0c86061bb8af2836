"""Memory of each GPU that the kernels of the others write to, by the interprocess calls of CUDA's driver."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

from torch._C._distributed_c10d import Store

ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    """`CUipcMemHandle`."""

    _fields_ = [("reserved", ctypes.c_char * 64)]


# Arguments of each function; each returns 0 or the number of an error.
_ADDRESS, _AT = ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64)
_SIGNATURES: dict[str, Sequence[type]] = {
    "cuMemAlloc_v2": (_AT, ctypes.c_size_t),
    "cuMemsetD8_v2": (_ADDRESS, ctypes.c_ubyte, ctypes.c_size_t),
    "cuCtxSynchronize": (),
    "cuIpcGetMemHandle": (ctypes.POINTER(_Handle), _ADDRESS),
    "cuIpcOpenMemHandle_v2": (_AT, _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuMemFree_v2": (_ADDRESS,),
}


class PeerMemory:
    """`num_bytes` of zeros on every rank's GPU, and where this rank's GPU reaches each of them.

    `addresses` are in the order of the ranks. `store`: through which the ranks tell each other. The GPU of
    this rank is the one that torch uses in this thread. Raises `RuntimeError` where a GPU does not reach
    another one; the other ranks get one, too.
    """

    def __init__(self, rank: int, size: int, num_bytes: int, store: Store) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            getattr(self._driver, name).argtypes = arguments
        own = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(own), num_bytes)
        opened: list[int] = []
        weakref.finalize(self, _release, self._driver, own.value, opened)
        handle = _Handle()
        try:
            self._call("cuMemsetD8_v2", own, 0, num_bytes)
            self._call("cuCtxSynchronize")
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), own)
        except RuntimeError:
            store.set(f"memory of {rank}", "none")
            raise
        store.set(f"memory of {rank}", bytes(handle).hex())
        self.addresses: list[int] = []
        for other in range(size):
            if other == rank:
                self.addresses.append(own.value)
                continue
            found = store.get(f"memory of {other}").decode()
            if found == "none":
                raise RuntimeError(f"rank {other} has no memory for the others")
            address = ctypes.c_uint64()
            shared = _Handle.from_buffer_copy(bytes.fromhex(found))
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), shared, ENABLE_PEER_ACCESS)
            opened.append(address.value)
            self.addresses.append(address.value)

    def _call(self, name: str, *arguments: object) -> None:
        if error := getattr(self._driver, name)(*arguments):
            raise RuntimeError(f"{name} failed with CUDA's error {error}")


def _release(driver: ctypes.CDLL, own: int, opened: Sequence[int]) -> None:
    for address in opened:
        driver.cuIpcCloseMemHandle(address)
    driver.cuMemFree_v2(own)
