"""What the kernels of a step's attention are told: the structs of cache.h."""

from __future__ import annotations

import ctypes

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class Cache(ctypes.Structure):
    """`Cache` of cache.h."""

    _fields_ = [
        ("data", _POINTER),
        *((name, _LONG) for name in ("head_rows", "block_rows", "block_size")),
        ("is_bf16", _INT),
        *((name, _POINTER) for name in ("q_norm", "k_norm", "sinks")),
    ]


class Step(ctypes.Structure):
    """`Step` of cache.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("cos", "sin", "positions", "slots", "blocks", "lens")),
        *((name, _POINTER) for name in ("segment_starts", "segment_blocks", "segment_lens")),
        *((name, _LONG) for name in ("n", "decodes", "width", "segments", "segment_width")),
        *((name, _LONG) for name in ("heads", "kv_heads", "d", "window")),
        *((name, _FLOAT) for name in ("scale", "eps")),
        ("tuning", _POINTER),
    ]
