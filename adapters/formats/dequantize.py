"""Computes the values that quantised matrices of a Hugging Face folder stand for.

A layout lists the tensors of a module and gives any rectangle of its matrix [out, in] in float32, as its
authors define it:

* "scaled": `weight` [out, in] in e4m3 or int8, times `weight_scale` (or `weight_scale_inv`, by which DeepSeek
  and Qwen mean the same).
* "packed" (compressed-tensors): `weight_packed` [out, in / n], the first of n codes in the lowest bits of
  32, `weight_scale` [out, groups], `weight_zero_point` [out / n, groups], `weight_g_idx` [in].
* "gptq" (Frantar et al., 2022, arXiv:2210.17323): `qweight` [in / n, out], `qzeros` [groups, out / n],
  `scales` [groups, out], `g_idx` [in].
* "awq" (Lin et al., 2023, arXiv:2306.00978): `qweight` [in, out / 8], `qzeros` [groups, out / 8], `scales`
  [groups, out]; the eight codes of a word are those of columns 0, 2, 4, 6, 1, 3, 5, 7.

A value is (code - zero point) x scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from microvllm.adapters.files.quantization import Scheme

# Computed at a time: on a CPU what stays in its cache (3 times as fast as 2M), on a GPU 64 MiB of float32.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
FLOATS = ("F32", "F16", "BF16")
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of the columns 0 to 7


class Stored(NamedTuple):
    """A tensor that a layout reads: its dtypes and shapes in the file, any of which may be there."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    needed: bool = True


class Rectangle(NamedTuple):
    """Rows and columns of a matrix."""

    rows: range
    columns: range


class Codes(NamedTuple):
    """A rectangle of a matrix whose values are (code - zero) * scale.

    codes: [rows, columns] integers; zeros: [rows, groups] integers, or None where all are half the codes'
    range; scales: [rows, groups] float32; group: [columns] int64, that of each column.
    """

    codes: Tensor
    zeros: Tensor | None
    scales: Tensor
    group: Tensor

    def values(self, bits: int) -> Tensor:
        """[rows, columns] in float32."""
        zeros = 1 << bits - 1 if self.zeros is None else self.zeros[:, self.group]
        return (self.codes - zeros).float() * self.scales[:, self.group]


class Layout(Protocol):
    """A way of storing a matrix: see the top of this file."""

    def stored(self, scheme: Scheme, rows: int, columns: int) -> Mapping[str, Stored]:
        """The tensors of a module. ValueError for a matrix that has no such layout."""
        ...

    def values(self, scheme: Scheme, tensors: Mapping[str, Tensor], at: Rectangle, device: str) -> Tensor:
        """[rows, columns] in float32. ValueError, naming the tensor, for contents that make no sense."""
        ...


def groups(size: int, length: int) -> int:
    """How many runs of `size` a dimension has; 0 is all of it."""
    return -(-length // size) if size else 1


class Scaled:
    """One code for each weight, as it is."""

    def stored(self, scheme: Scheme, rows: int, columns: int) -> Mapping[str, Stored]:
        height, width = scheme.block
        shape = groups(height, rows), groups(width, columns)
        shapes: list[tuple[int, ...]] = [shape]
        if width == 0:
            shapes.append(shape[:1])
        if scheme.block == (0, 0):
            shapes.append(())
        scale = Stored(FLOATS, tuple(shapes))
        # The weights alone are quantised here: what activations would be scaled by is not used.
        activation = Stored(FLOATS, ((), (1,)), needed=False)
        code = "F8_E4M3" if scheme.is_float else "I8"
        return {
            "weight": Stored((code,), ((rows, columns),)),
            "weight_scale": scale,
            "input_scale": activation,
            "activation_scale": activation,
        }

    def values(self, scheme: Scheme, tensors: Mapping[str, Tensor], at: Rectangle, device: str) -> Tensor:
        codes = _cut(tensors["weight"], at.rows, at.columns).to(device).float()
        rows, columns = (
            torch.arange(run.start, run.stop) // size if size else torch.zeros(1, dtype=torch.int64)
            for run, size in zip(at, scheme.block, strict=True)
        )
        scale = tensors["weight_scale"]
        scale = scale.reshape(scale.shape[0] if scale.ndim else 1, -1).float()
        return codes * scale[rows][:, columns].to(device)


class PackedLayout(Layout, Protocol):
    """Several codes in 32 bits."""

    def codes(self, scheme: Scheme, tensors: Mapping[str, Tensor], at: Rectangle, device: str) -> Codes:
        """The codes and what belongs to them. ValueError as by `Layout.values`."""
        ...

    def values(self, scheme: Scheme, tensors: Mapping[str, Tensor], at: Rectangle, device: str) -> Tensor:
        return self.codes(scheme, tensors, at, device).values(scheme.bits)


class Packed(PackedLayout):
    """Of compressed-tensors: words along the columns."""

    def stored(self, scheme: Scheme, rows: int, columns: int) -> Mapping[str, Stored]:
        count = 32 // scheme.bits
        across = groups(scheme.block[1], columns)
        found = {
            "weight_packed": Stored(("I32",), ((rows, groups(count, columns)),)),
            "weight_scale": Stored(FLOATS, ((rows, across),)),
            "weight_shape": Stored(("I64", "I32"), ((2,),)),
        }
        if not scheme.symmetric:
            found["weight_zero_point"] = Stored(("I32",), ((groups(count, rows), across),))
        if scheme.ordered:
            found["weight_g_idx"] = Stored(("I32",), ((columns,),))
        return found

    def codes(self, scheme: Scheme, tensors: Mapping[str, Tensor], at: Rectangle, device: str) -> Codes:
        count = 32 // scheme.bits
        words, before = _words(at.columns, count)
        codes = unpack(_cut(tensors["weight_packed"], at.rows, words).to(device), scheme.bits)
        codes = codes[:, before : before + len(at.columns)]
        group = _group_of(tensors.get("weight_g_idx"), scheme, at.columns)
        zeros = None
        if not scheme.symmetric:
            words, before = _words(at.rows, count)
            packed = tensors["weight_zero_point"][words.start : words.stop].T
            zeros = unpack(packed, scheme.bits).T[before : before + len(at.rows)].to(device)
        scales = tensors["weight_scale"][at.rows.start : at.rows.stop].float()
        return Codes(codes, zeros, scales.to(device), group.to(device))


class GPTQ(PackedLayout):
    """Words along the columns, transposed."""

    def stored(self, scheme: Scheme, rows: int, columns: int) -> Mapping[str, Stored]:
        count = 32 // scheme.bits
        if rows % count or columns % count:
            raise ValueError(f"[{rows}, {columns}] is not in whole words of {count} weights")
        down = groups(scheme.block[1], columns)
        return {
            "qweight": Stored(("I32",), ((columns // count, rows),)),
            "qzeros": Stored(("I32",), ((down, rows // count),)),
            "scales": Stored(FLOATS, ((down, rows),)),
            "g_idx": Stored(("I32",), ((columns,),), needed=scheme.ordered),
        }

    def codes(self, scheme: Scheme, tensors: Mapping[str, Tensor], at: Rectangle, device: str) -> Codes:
        count = 32 // scheme.bits
        words, before = _words(at.columns, count)
        packed = _cut(tensors["qweight"], words, at.rows).to(device)
        codes = unpack(packed.T, scheme.bits)[:, before : before + len(at.columns)]
        words, before = _words(at.rows, count)
        stored = unpack(_cut(tensors["qzeros"], None, words), scheme.bits)[:, before : before + len(at.rows)]
        zeros = stored + scheme.zero_offset
        if (zeros == 1 << scheme.bits).any():
            # Readers take it as 0 or as 16 (256), and some writers overwrote its neighbours.
            raise ValueError(f"qzeros has the zero point {(1 << scheme.bits) - 1}, which has no one meaning")
        if scheme.symmetric and not (zeros == 1 << scheme.bits - 1).all():
            raise ValueError("qzeros has other zero points than a symmetric quantisation (sym) has")
        group = _group_of(tensors.get("g_idx"), scheme, at.columns)
        scales = _cut(tensors["scales"], None, at.rows).float()
        found = None if scheme.symmetric else zeros.T.to(device)
        return Codes(codes, found, scales.T.to(device), group.to(device))


class AWQ(PackedLayout):
    """Words along the rows, transposed, in an order of their own."""

    def stored(self, scheme: Scheme, rows: int, columns: int) -> Mapping[str, Stored]:
        if rows % 8:
            raise ValueError(f"[{rows}, {columns}] is not in whole words of 8 weights")
        down = groups(scheme.block[1], columns)
        return {
            "qweight": Stored(("I32",), ((columns, rows // 8),)),
            "qzeros": Stored(("I32",), ((down, rows // 8),)),
            "scales": Stored(FLOATS, ((down, rows),)),
        }

    def codes(self, scheme: Scheme, tensors: Mapping[str, Tensor], at: Rectangle, device: str) -> Codes:
        words, before = _words(at.rows, 8)
        run = slice(before, before + len(at.rows))
        codes = unpack(_cut(tensors["qweight"], at.columns, words).to(device), 4, AWQ_SHIFTS)[:, run]
        zeros = unpack(_cut(tensors["qzeros"], None, words), 4, AWQ_SHIFTS)[:, run].to(device)
        group = _group_of(None, scheme, at.columns)
        scales = _cut(tensors["scales"], None, at.rows).float().to(device)
        return Codes(codes.T, zeros.T, scales.T, group.to(device))


PACKED_LAYOUTS: Mapping[str, PackedLayout] = {"packed": Packed(), "gptq": GPTQ(), "awq": AWQ()}
LAYOUTS: Mapping[str, Layout] = {"scaled": Scaled(), **PACKED_LAYOUTS}


def unpack(words: Tensor, bits: int, shifts: tuple[int, ...] = ()) -> Tensor:
    """[m, k] int32 -> [m, k * 32 / bits]; without shifts a word's first code is in its lowest bits."""
    places = torch.tensor(shifts or range(0, 32, bits), dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> places & (1 << bits) - 1).flatten(-2)


def _words(run: range, count: int) -> tuple[range, int]:
    """The words of `count` codes that hold a run of codes, and how many codes are before it in the first."""
    first = run.start // count
    return range(first, groups(count, run.stop)), run.start - first * count


def _cut(tensor: Tensor, rows: range | None, columns: range) -> Tensor:
    if rows is not None:
        tensor = tensor[rows.start : rows.stop]
    return tensor[:, columns.start : columns.stop]


def _group_of(stored: Tensor | None, scheme: Scheme, columns: range) -> Tensor:
    """The group of each column; that of a file may be in any order."""
    size = scheme.block[1]
    run = torch.arange(columns.start, columns.stop)
    regular = run // size if size else torch.zeros_like(run)
    return stored[columns.start : columns.stop].long() if stored is not None and scheme.ordered else regular


def check(scheme: Scheme, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
    """Raise ValueError, beginning with the tensor, for scales and indices that cannot be right."""
    for suffix in ("weight_scale", "scales", "input_scale", "activation_scale"):
        if suffix in tensors and not tensors[suffix].float().isfinite().all():
            raise ValueError(f"{suffix} has values that are not finite")
    if "weight_shape" in tensors and tensors["weight_shape"].tolist() != [rows, columns]:
        raise ValueError(
            f"weight_shape is {tensors['weight_shape'].tolist()}, but the configuration asks for "
            f"{[rows, columns]}"
        )
    for suffix in ("g_idx", "weight_g_idx"):
        if (index := tensors.get(suffix)) is None:
            continue
        size = scheme.block[1]
        if scheme.ordered:
            if not ((index >= 0) & (index < groups(size, columns))).all():
                raise ValueError(f"{suffix} names groups beyond the {groups(size, columns)} that are stored")
        elif not index.long().equal(_group_of(None, scheme, range(columns))):
            raise ValueError(f"{suffix} is not in order, although the configuration says so (desc_act)")
