"""Own operators for CPUs: this folder's C files behind the interface of `ops.operators`.

Activations are float32 whatever the weights are; a bfloat16 or quantised weight is widened in registers, or
activations are rounded to 8 bits for products with quantised weights.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from microvllm.ops.activation import CLAMPED
from microvllm.ops.attention import AttentionBackend, AttentionBatch, AttentionConfig, StepAttention
from microvllm.ops.attention.latent import LatentConfig
from microvllm.ops.attention.torch_backend import HeadMajorCache, TorchAttention
from microvllm.ops.cpu.cache import Cache, Step
from microvllm.ops.cpu.experts import CpuExperts
from microvllm.ops.cpu.isa import has_bf16
from microvllm.ops.cpu.latent import CpuLatentAttention
from microvllm.ops.cpu.memory import WeightMemory
from microvllm.ops.cpu.needed import Needed
from microvllm.ops.cpu.recurrences import RECURRENCES
from microvllm.ops.cpu.tuning import Tuning
from microvllm.ops.experts import ExpertWeights
from microvllm.ops.linear import Linear
from microvllm.ops.operators import (
    DecoderLayer,
    DecoderLayers,
    LinearOperator,
    Norm,
    Operator,
    Operators,
)
from microvllm.ops.quantized import QuantizedTensor
from microvllm.ops.routing import Routing
from microvllm.ops.row_states import Recurrence

# Up to so many rows the kernels multiply bfloat16 weights with activations in float32, or on the matrix unit
# in two numbers of bfloat16. More are rounded to bfloat16 for that unit (EXACT_ROWS of amx.h), or for oneDNN
# where only that has bfloat16 arithmetic.
MAX_KERNEL_ROWS_BF16 = 32

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class _Part(ctypes.Structure):
    """`Part` of linear.c."""

    _fields_ = [("panels", _POINTER), ("n", _LONG), ("format", _INT)]


class _Linear(ctypes.Structure):
    """`Linear` of linear.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("parts", "norm", "bias", "tuning")),
        ("eps", _FLOAT),
        *((name, _LONG) for name in ("n", "k")),
        *((name, _INT) for name in ("num_parts", "is_gated", "is_clamped", "rounds_x")),
    ]


class _Layer(ctypes.Structure):
    """`Layer` of layers.c."""

    _fields_ = [(name, _POINTER) for name in ("qkv", "o", "gate_up", "down", "experts")]

    @staticmethod
    def of(layer: DecoderLayer) -> _Layer | None:
        """The struct of a layer of these kernels' operators; None if it has others."""
        products: Sequence[object] = layer
        experts = None
        if isinstance(layer.down, CpuExperts):
            products, experts = layer[:2], layer.down.address
        if not all(isinstance(product, CpuLinear) for product in products):
            return None
        addresses = [product.address for product in cast("Sequence[CpuLinear]", products)]
        return _Layer(*addresses, *([None] * (4 - len(addresses))), experts)

    @staticmethod
    def scratch(layer: DecoderLayer) -> int:
        """Floats for each row of such a layer."""
        qkv, o, first, last = cast("tuple[CpuLinear, CpuLinear, CpuLinear, CpuLinear | CpuExperts]", layer)
        return max(qkv.n + o.k, last.scratch if isinstance(last, CpuExperts) else first.n)


# Arguments and result of each function.
_SIGNATURES: dict[str, tuple[Sequence[type], type | None]] = {
    "pool_new": ([_INT], _POINTER),
    "pool_free": ([_POINTER], None),
    "has_amx": ([], _INT),
    "has_bf16": ([], _INT),
    "packed_bytes": ([_INT, _LONG, _LONG], _LONG),
    "pack": ([_POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG], None),
    "gather": ([_POINTER, _INT, _POINTER, _POINTER, _POINTER, _LONG, _LONG], None),
    "gather_quantized": ([_POINTER, _INT, _POINTER, _POINTER, _POINTER, _LONG, _LONG], None),
    "linear": ([_POINTER] * 5 + [_LONG], _INT),
    "experts": ([_POINTER] * 5 + [_LONG, _POINTER], _INT),
    "rms_norm": ([_POINTER] * 4 + [_LONG] * 2 + [_FLOAT], None),
    "silu_and_mul": ([_POINTER] * 3 + [_LONG] * 2, None),
    "rotate_and_cache": ([_POINTER] * 4, None),
    "attention": ([_POINTER] * 5, _INT),
    "decoder_layers": ([_POINTER] * 5 + [_LONG, _POINTER, _LONG, _POINTER], _INT),
}


class Kernels:
    """The compiled functions, and their threads, which end with the object: every operator holds it."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
        self.library, self.threads = library, threads
        self.pool: int | None = library.pool_new(threads)
        if self.pool is None:
            raise MemoryError("no memory for the kernels' threads")
        weakref.finalize(self, library.pool_free, self.pool)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_FORMATS = {torch.float32: 0, torch.bfloat16: 30}  # ggml's numbers of those that are not quantised


class Packed(NamedTuple):
    """A weight in panels, as bytes, the number of its format, and its shape."""

    data: Tensor
    format: int
    rows: int
    columns: int


class CpuOperators(Operators):
    """The kernels, with the shapes and dtypes of `ops.operators.Operators`.

    With `int8_activations`, what is multiplied with quantised weights is rounded to 8 bits: see int8.c. If
    `is_invariant`, a row's results have the same bits whatever rows are computed together with it. If
    `is_exact`, quantised weights are not rounded to bfloat16 for products with many rows.
    """

    activation_dtype = torch.float32
    packed = (QuantizedTensor,)

    def __init__(
        self,
        library: ctypes.CDLL,
        threads: int,
        int8_activations: bool = False,
        tuning: Tuning = Tuning(),  # noqa: B008 (frozen)
        is_invariant: bool = False,
        is_exact: bool = False,
    ) -> None:
        self.int8_activations, self.is_invariant = int8_activations, is_invariant
        self.kernels = Kernels(library, threads)
        self.tuning = tuning.fields(is_exact, is_invariant)
        self.multiplies_bf16 = bool(library.has_amx() or (library.has_bf16() and tuning.multiplies_bf16))
        self.memory = WeightMemory()

    def embedding(self, weight: Tensor) -> Operator:
        return CpuEmbedding(self, weight)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOperator:
        return CpuLinear(self, weight, bias)

    def norm_linear(
        self, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> Operator:
        return CpuLinear(self, weight, bias, norm_weight, eps)

    def norm_gate_up(
        self, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> Operator:
        return CpuLinear(self, weight, bias, norm_weight, eps, gated=True)

    def pack(self, weight: Tensor) -> Packed:
        """Rows of one format as `linear` of linear.c takes them."""
        if isinstance(weight, QuantizedTensor):
            ((number, rows, _),), columns = weight.parts, weight.columns
            if weight.packed is not None:
                return Packed(weight.packed, number, rows, columns)
        else:
            number, (rows, columns) = _FORMATS[weight.dtype], weight.shape
        data = self.memory.empty(self.kernels.library.packed_bytes(number, rows, columns), torch.uint8)
        source = weight.contiguous()
        self.kernels.library.pack(
            self.kernels.pool, number, source.data_ptr(), data.data_ptr(), rows, columns
        )
        if isinstance(weight, QuantizedTensor):
            weight.packed = data
        return Packed(data, number, rows, columns)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        d = x.shape[-1]
        self.kernels.library.rms_norm(
            self.kernels.pool, x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // d, d, eps
        )
        return y

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        n, width = gate_up.shape[0], gate_up.shape[1] // 2
        y = torch.empty(n, width)
        self.kernels.library.silu_and_mul(self.kernels.pool, gate_up.data_ptr(), y.data_ptr(), n, width)
        return y

    def layers(self, layers: Sequence[DecoderLayer]) -> DecoderLayers:
        structs = [struct for layer in layers if (struct := _Layer.of(layer))]
        complete = len(structs) == len(layers)
        return CpuLayers(self.kernels, layers, structs) if complete else DecoderLayers(layers)

    def experts(
        self, norm: Norm | None, weights: ExpertWeights, routing: Routing, activation: str
    ) -> tuple[Operator, LinearOperator]:
        composes = weights.router_norm is not None or weights.scales is not None or not weights.gated
        if composes or activation not in ("silu", CLAMPED):
            weights = weights._replace(router=weights.router.float())  # as below
            return super().experts(norm, weights, routing, activation)
        kernel, pool = self.kernels.library.experts, self.kernels.pool
        # In float32, whose products are never rounded to bfloat16: the choice would depend on the batch.
        router = CpuLinear(self, weights.router.float(), weights.biases.router, by_kernels=True)
        inner = partial(CpuLinear, self, gated=True, clamped=activation == CLAMPED, by_kernels=True)
        products = [
            (
                inner(expert.gate_up, expert.gate_up_bias),
                CpuLinear(self, expert.down, expert.down_bias, by_kernels=True),
            )
            for expert in weights.split()
        ]
        shared = None
        if weights.shared is not None:
            gate_up, down, gate = weights.shared
            shared = (
                inner(gate_up),
                CpuLinear(self, down, by_kernels=True),
                None if gate is None else CpuLinear(self, gate, by_kernels=True),
            )
        experts = CpuExperts(kernel, pool, norm, router, products, shared, routing, weights.correction)
        return self.norm(None), experts

    def recurrence(self, config: Recurrence) -> AttentionBackend:
        return RECURRENCES[type(config)](config, self.kernels)

    def attention(self, config: AttentionConfig) -> AttentionBackend:
        if config.shape.softcap is not None:  # for which there is no kernel
            if self.is_invariant:
                raise ValueError("--batch-invariant: there is no kernel for attention with a soft cap")
            return TorchAttention(config, torch.float32)
        return CpuAttention(self, config)

    def latent_attention(self, config: LatentConfig) -> AttentionBackend:
        if self.is_invariant:
            raise ValueError("--batch-invariant: there is no kernel for latent keys and values")
        return CpuLatentAttention(config, self.kernels, self.tuning)


class CpuEmbedding:
    """[n] int64 row numbers -> those rows of a weight of any format, [n, d] float32."""

    def __init__(self, operators: CpuOperators, weight: Tensor) -> None:
        self._kernels, library = operators.kernels, operators.kernels.library
        if isinstance(weight, QuantizedTensor):
            self._data, self._kind, _, self._d = operators.pack(weight)
            self._gather = library.gather_quantized
        else:
            self._data, self._d = weight.contiguous(), weight.shape[1]
            self._gather, self._kind = library.gather, weight.dtype == torch.bfloat16

    def __call__(self, token_ids: Tensor) -> Tensor:
        n = token_ids.shape[0]  # `len` of a tensor is a function in Python
        token_ids, y = token_ids.contiguous(), torch.empty(n, self._d)
        addresses = self._data.data_ptr(), token_ids.data_ptr(), y.data_ptr()
        self._gather(self._kernels.pool, self._kind, *addresses, n, self._d)
        return y


def _has_fast_library() -> bool:
    """Whether oneDNN multiplies bfloat16 by instructions for it: what only has AVX-512 it would emulate."""
    return has_bf16() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class CpuLinear:
    """RMS norm, x @ weight.T + bias, then SwiGLU, maybe `clamped`, or + residual: all in one call.

    x: [n, in] float32; weight: [out, in] ([2 * out, in] if `gated`, gate before up) float32, bfloat16 or
    quantised (in two parts if `gated`), packed here; residual: [n, out], where the result may be put ->
    [n, out]. `by_kernels`: oneDNN, which would take a copy of the weight, multiplies nothing; so it has to be
    if `clamped`.
    """

    def __init__(
        self,
        operators: CpuOperators,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
        by_kernels: bool = False,
        clamped: bool = False,
    ) -> None:
        self._operators = operators
        rounds_x = operators.int8_activations and isinstance(weight, QuantizedTensor)
        parts = weight.split_parts() if isinstance(weight, QuantizedTensor) else weight.chunk(1 + gated)
        self._packed = packed = [operators.pack(part) for part in parts]
        rows = [part.rows for part in packed]
        if gated and rows != rows[:1] * 2:
            raise ValueError(f"gate and up have to be two parts of as many rows, not of {rows}")
        self.n, self.k = sum(rows) // (1 + gated), packed[0].columns
        self._bias = None if bias is None else bias.float()
        self._norm, self._eps, self._gated = norm, eps, gated
        self._parts = (_Part * len(packed))(
            *(_Part(part.data.data_ptr(), part.rows, part.format) for part in packed)
        )
        self._arguments = _Linear(
            ctypes.addressof(self._parts),
            _pointer(norm),
            _pointer(self._bias),
            ctypes.addressof(operators.tuning),
            eps,
            self.n,
            self.k,
            len(packed),
            gated,
            clamped,
            rounds_x,
        )
        self.address = ctypes.addressof(self._arguments)
        self._kernel, self._pool = operators.kernels.library.linear, operators.kernels.pool
        self._library = None
        # oneDNN adds up in an order that depends on the number of rows.
        may_round = weight.dtype == torch.bfloat16 and not operators.is_invariant and not by_kernels
        if may_round and not operators.multiplies_bf16 and _has_fast_library():
            self._library = Linear(weight)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        if self._library is not None and rows > MAX_KERNEL_ROWS_BF16:
            return self._by_library(x, self._library, residual)
        x = x.contiguous()
        y = torch.empty(rows, self.n) if residual is None else residual
        if self._kernel(self._pool, self.address, x.data_ptr(), _pointer(residual), y.data_ptr(), rows):
            raise MemoryError(f"no memory for {rows} rows of {self.k}")
        return y

    @property
    def max_rows(self) -> float:
        """More of them are multiplied by oneDNN."""
        return math.inf if self._library is None else MAX_KERNEL_ROWS_BF16

    def _by_library(self, x: Tensor, product: Linear, residual: Tensor | None) -> Tensor:
        """The only work that torch's threads are worth: idle ones spin, and take the kernels' cores."""
        if self._norm is not None:
            x = self._operators.rms_norm(x, self._norm, self._eps)
        before = torch.get_num_threads()
        torch.set_num_threads(self._operators.kernels.threads)
        try:
            y = product(x.bfloat16()).float()
        finally:  # the server goes on when there was no memory for one step
            torch.set_num_threads(before)
        if self._bias is not None:
            y += self._bias
        if self._gated:
            y = self._operators.silu_and_mul(y)
        return y if residual is None else residual.add_(y)


class CpuLayers(DecoderLayers):
    """All layers in one call, unless their attention is timed or there are rows enough for oneDNN."""

    def __init__(self, kernels: Kernels, layers: Sequence[DecoderLayer], structs: Sequence[_Layer]) -> None:
        super().__init__(layers)
        products = [[one for one in layer if isinstance(one, CpuLinear)] for layer in layers]
        self._kernel, self._pool = kernels.library.decoder_layers, kernels.pool
        self._width = max(map(_Layer.scratch, layers))
        self.max_rows = min(product.max_rows for some in products for product in some)
        self._arguments = (_Layer * len(layers))(*structs)

    def __call__(self, hidden: Tensor, attention: StepAttention, needed: Tensor | None = None) -> Tensor:
        rows, width = hidden.shape
        if not isinstance(attention, CpuStep) or rows > self.max_rows:
            return super().__call__(hidden, attention, needed)
        scratch = torch.empty(rows * self._width)
        of_needed = None if needed is None else attention.needed(needed)
        if self._kernel(
            self._pool,
            attention.address,
            None if of_needed is None else ctypes.byref(of_needed),
            attention.caches,
            self._arguments,
            len(self._arguments),
            hidden.data_ptr(),
            width,
            scratch.data_ptr(),
        ):
            raise MemoryError(f"no memory for a step of {rows} rows")
        return hidden if needed is None else hidden[: len(needed)]


class CpuAttention(HeadMajorCache):
    """Norms, rotation, cache write and attention by the kernels."""

    def __init__(self, operators: CpuOperators, config: AttentionConfig) -> None:
        super().__init__(config, torch.float32)
        self.kernels, self.tuning = operators.kernels, operators.tuning
        head, block = (stride // self.shape.head_dim for stride in self.cache.stride()[1:3])
        layers = (
            Cache(
                *(self.layer(index).data_ptr(), head, block, config.block_size),
                config.dtype == torch.bfloat16,
                *((None, None) if self.qk_norms is None else map(_pointer, self.qk_norms.weights[index])),
                _pointer(self.sinks[index]) if self.sinks else None,
            )
            for index in range(self.shape.num_layers)
        )
        self.layers = (Cache * self.shape.num_layers)(*layers)
        self._last: deque[CpuStep] = deque(maxlen=-(-len(self.places) // len(set(self.places))))

    def begin_step(self, batch: AttentionBatch) -> CpuStep:
        # Where the last batch of each group of layers lies is known, whatever its values are now.
        if (step := next((step for step in self._last if step.batch is batch), None)) is None:
            self._last.append(step := CpuStep(self, batch))
        return step


class CpuStep:
    """A `StepAttention` of the kernels."""

    def __init__(self, backend: CpuAttention, batch: AttentionBatch) -> None:
        shape, rotary, decodes = backend.shape, backend.rotary, batch.num_decodes
        table = batch.segment_table
        indices = [batch.positions, batch.slots, batch.decode_blocks, batch.decode_lens]
        if table is not None:
            indices += [table.starts, table.blocks, table.context_lens]
        indices = [tensor.long().contiguous() for tensor in indices]
        # The kernels get addresses. Not the backend, which holds this step: only a collection would end both.
        self._held = (
            *(backend.cache, backend.qk_norms, backend.sinks, rotary, indices),
            *(backend.kernels, backend.tuning),
        )
        self.batch = batch
        addresses = [tensor.data_ptr() for tensor in indices]
        self.caches = backend.layers
        self._width = shape.num_heads * shape.head_dim
        self._library, self._pool = backend.kernels.library, backend.kernels.pool
        self._step = Step(
            rotary.cos.data_ptr(),
            rotary.sin.data_ptr(),
            *(addresses if table is not None else (*addresses, None, None, None)),
            len(batch.positions),
            decodes,
            batch.decode_blocks.shape[1] if decodes else 0,
            *((0, 0) if table is None else table.blocks.shape),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.window or 0,
            shape.scale,
            0.0 if backend.qk_norms is None else backend.qk_norms.eps,
            ctypes.addressof(backend.tuning),
        )
        self.address = ctypes.addressof(self._step)

    def needed(self, rows: Tensor) -> Needed:
        """The last layer's step if only these of its tokens are needed."""
        return Needed.of(self._step, self.batch, rows)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        at, cache = qkv.data_ptr(), ctypes.addressof(self.caches[layer])
        self._library.rotate_and_cache(self._pool, self.address, cache, at)
        out = torch.empty(len(qkv), self._width)
        if self._library.attention(self._pool, self.address, cache, at, out.data_ptr()):
            raise MemoryError(f"no memory for the attention of {len(qkv)} tokens")
        return out
