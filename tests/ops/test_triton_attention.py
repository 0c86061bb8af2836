"""The Triton attention kernels against the torch backend in float32; interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from attention_case import Case, check_in_pages, relative_error
from triton_interpreter import DEVICE

from microvllm.ops.attention import AttentionShape, triton_decode, triton_prefill
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.attention.pages import CachePages, LayerPages
from microvllm.ops.attention.triton_backend import TritonAttention
from microvllm.ops.attention.triton_decode import MANY_SEQS, DecodeTiling
from microvllm.ops.attention.triton_prefill import PrefillTiling
from microvllm.ops.gpu.levers import Levers
from microvllm.ops.gpu.operators import GpuOperators

# What relative error is allowed on inputs that are exact in the dtype. (The interpreter has no bfloat16.)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
TILES_OF_16 = DecodeTiling(16, 2, 4, 2)


E4M3 = torch.float8_e4m3fn
SCALES = (KVScales(), KVScales(0.03, 0.5))


def make_backend(case: Case, tiling: DecodeTiling | None = None) -> TritonAttention:
    backend = TritonAttention(
        case.config(DEVICE),
        decode_tiling=tiling,
        prefill_tiling=PrefillTiling(16, 16, 2, 4) if tiling else None,
    )
    backend.cache.copy_(case.cache)
    return backend


def check(case: Case, tiling: DecodeTiling | None = None, layer: int = 0) -> None:
    """The output, and the cache after it: nothing but this step's slots of this layer may change."""
    backend = make_backend(case, tiling)
    out = backend.begin_step(case.batch(DEVICE, int32=True))(layer, case.qkv.to(DEVICE))
    expected, cache = case.expected(layer)
    assert relative_error(out, expected) < TOLERANCE[case.dtype]
    assert not out[[not s.context for s in case.decodes] + [False] * (len(out) - len(case.decodes))].any()
    assert relative_error(backend.cache, cache) < TOLERANCE[case.dtype]
    assert (backend.cache.cpu() != case.cache).sum() <= 2 * case.num_tokens * case.cache[
        0, 0, 0, :, 0
    ].numel()
    assert not backend.workspace.arrivals.any()


SHAPES = {
    "plain": AttentionShape(2, 4, 2, 16),
    "odd group, window": AttentionShape(2, 7, 1, 32, 24),
    "odd head size": AttentionShape(2, 3, 3, 24),
    "window of one": AttentionShape(2, 6, 2, 16, 1),
    "rotation scaled": AttentionShape(2, 4, 2, 16, None, 1.4),
}


@pytest.mark.parametrize(
    ("shape", "with_norms", "dtype"),
    [
        ("plain", False, torch.float32),
        ("odd group, window", True, torch.float32),
        ("odd head size", True, torch.float16),
        ("window of one", False, torch.float32),
        ("rotation scaled", False, torch.float32),
        *((shape, True, torch.bfloat16) for shape in SHAPES if DEVICE.type == "cuda"),
    ],
)
def test_a_mixed_step(shape: str, with_norms: bool, dtype: torch.dtype) -> None:
    """Short and long sequences, padding, empty and continued segments, several tiles and blocks each."""
    decodes, segments = [50, 1, 0, 17, 2], [(3, 40), (0, 20), (0, 0), (7, 21), (2, 2)]
    check(Case(SHAPES[shape], 16, decodes, segments, dtype, with_norms=with_norms), TILES_OF_16, layer=1)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("plain", torch.float32),
        ("odd group, window", torch.float32),
        ("odd head size", torch.float16),
        ("window of one", torch.float32),
        *((shape, torch.bfloat16) for shape in SHAPES if DEVICE.type == "cuda"),
    ],
)
@pytest.mark.parametrize("way", ["", "fixed order", "boxes", "e4m3"])
def test_sinks(shape: str, dtype: torch.dtype, way: str) -> None:
    """In every kernel, in sequences of one program and of several, which count a sink once."""
    decodes, segments = [50, 1, 0, 17, 2, 16 * 13 + 1], [(3, 40), (0, 20), (0, 0), (7, 21), (2, 2)]
    options = {"scales": SCALES, "cache_dtype": E4M3} if way == "e4m3" else {}
    case = Case(SHAPES[shape], 16, decodes, segments, dtype, with_sinks=True, **options)
    without = replace(case.config(DEVICE), sinks=())
    tilings = {
        "decode_tiling": replace(TILES_OF_16, boxes=way == "boxes" and shape != "odd head size"),
        "prefill_tiling": PrefillTiling(16, 16, 2, 4),
    }
    found = []
    for config in (case.config(DEVICE), without):
        backend = TritonAttention(config, **tilings, fixed_order=way == "fixed order")
        backend.cache.copy_(case.cache)
        found.append(backend.begin_step(case.batch(DEVICE, int32=True))(1, case.qkv.to(DEVICE)))
        assert not backend.workspace.arrivals.any()
    real = [bool(s.context) for s in case.decodes] + [True] * sum(s.new for s in case.segments)
    expected = case.expected(1)[0]
    assert relative_error(found[0][real], expected[real]) < TOLERANCE[dtype]
    assert relative_error(found[1][real], expected[real]) > 0.1


@pytest.mark.parametrize("way", ["", "fixed order", "e4m3"])
@pytest.mark.parametrize("shape", ["odd group, window", "odd head size"])
def test_pages_that_layers_of_other_heads_share(shape: str, way: str) -> None:
    options = {"scales": SCALES, "cache_dtype": E4M3} if way == "e4m3" else {}
    case = Case(SHAPES[shape], 16, [50, 1, 17], [(3, 40), (7, 21)], torch.float32, **options)
    tilings = {"decode_tiling": TILES_OF_16, "prefill_tiling": PrefillTiling(16, 16, 2, 4)}
    check_in_pages(
        case,
        lambda config: TritonAttention(config, **tilings, fixed_order=way == "fixed order"),
        case.batch(DEVICE, int32=True),
    )


def test_blocks_that_are_one_matrix_alone_come_by_tma() -> None:
    """Without TMA its tiling, of more programs, would spill registers."""
    case = Case(AttentionShape(1, 2, 1, 128), 64, [5], [], torch.float16)
    config = case.config(DEVICE)
    pages = CachePages(config.num_blocks, 64, 512, is_uniform=False, dtype=torch.float16, device=DEVICE)
    shared = replace(config, pages=LayerPages(pages, 256, (1,)))
    own, mixed = (TritonAttention(each, levers=Levers(boxes=True)) for each in (config, shared))
    assert own.decode_tiling(MANY_SEQS).boxes
    assert mixed.decode_tiling(MANY_SEQS) == mixed.decode_tiling(1) == own.decode_tiling(1)


def test_flash_attention_is_refused_for_sinks() -> None:
    case = Case(AttentionShape(1, 4, 2, 16), 256, [5], [], torch.float16, with_sinks=True)
    with pytest.raises(ValueError, match="flash_attn does not compute attention sinks"):
        GpuOperators(torch.float16, DEVICE, "flash_attn").attention(case.config(DEVICE))


@pytest.mark.parametrize(("tile", "block_size"), [(16, 64), (32, 16)])
def test_tiles_and_blocks_of_any_ratio(tile: int, block_size: int) -> None:
    case = Case(AttentionShape(1, 2, 1, 16), block_size, [130, 65], [(2, 70)], torch.float32)
    check(case, DecodeTiling(tile, 2, 4, 2))


@pytest.mark.parametrize(("tile", "block_size"), [(16, 16), (16, 64)])
def test_tiles_by_the_copy_engine(tile: int, block_size: int) -> None:
    """Whole tiles and parts of one; what another request left behind the last token is not looked at."""
    case = Case(
        AttentionShape(2, 6, 2, 16), block_size, [1, 40, 17, 0, 16, 130, 33], [(2, 20)], torch.float32
    )
    backend = make_backend(case, DecodeTiling(tile, 2, 4, 2, boxes=True))
    for sequence in case.decodes:
        if begun := sequence.context % block_size:
            backend.cache[:, :, sequence.blocks[-1], :, begun:] = torch.nan
    out = backend.begin_step(case.batch(DEVICE, int32=True))(1, case.qkv.to(DEVICE))
    assert relative_error(out, case.expected(1)[0]) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(("tile", "block_size", "window"), [(16, 16, 1), (16, 64, 24), (64, 16, 24)])
@pytest.mark.parametrize("fixed_order", [False, True])
def test_what_lies_behind_a_window_is_not_looked_at(
    tile: int, block_size: int, fixed_order: bool, window: int
) -> None:
    """Its blocks may be another request's, which may have no finite numbers."""
    decodes, segments = [100, 41, 0, 17], [(3, 110), (20, 150), (2, 2)]
    case = Case(AttentionShape(1, 6, 2, 16, window), block_size, decodes, segments, torch.float32)
    backend = TritonAttention(
        case.config(DEVICE),
        decode_tiling=DecodeTiling(tile, 2, 4, 2),
        prefill_tiling=PrefillTiling(16, tile, 2, 4),
        fixed_order=fixed_order,
    )
    backend.cache.copy_(case.cache)
    behind = case.behind_windows()
    assert len(behind) > 2
    backend.cache[:, :, behind] = torch.nan
    expected = case.expected(0)[0]
    real = [bool(s.context) for s in case.decodes] + [True] * sum(s.new for s in case.segments)
    out = backend.begin_step(case.batch(DEVICE, int32=True))(0, case.qkv.to(DEVICE))
    assert relative_error(out[real], expected[real]) < TOLERANCE[case.dtype]


def test_one_long_sequence_is_split_among_all_programs() -> None:
    case = Case(AttentionShape(1, 2, 1, 16), 16, [16 * 13 + 1], [], torch.float32)
    check(case, TILES_OF_16)


def test_more_sequences_than_a_program_looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "SEARCH", 4)
    case = Case(AttentionShape(1, 1, 1, 16), 16, [0, 3, 20, 1, 40, 0, 0, 2, 18, 5], [], torch.float32)
    check(case, TILES_OF_16)


def test_more_segments_than_a_program_looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no, one and several tiles, and, as a captured step has them, with padding tokens behind the last."""
    monkeypatch.setattr(triton_prefill, "SEGMENTS_AT_ONCE", 4)
    segments = [(0, 0), (9, 9), (2, 30), (0, 5), (0, 0), (17, 21), (1, 4), (8, 8), (33, 40), (0, 0), (3, 3)]
    case = Case(AttentionShape(1, 2, 1, 16), 16, [3], segments, torch.float32)
    check(case, TILES_OF_16)
    backend, batch = make_backend(case, TILES_OF_16), case.batch(DEVICE, int32=True)
    padded = torch.cat((case.qkv, torch.full((50, case.qkv.shape[1]), torch.nan))).to(DEVICE)
    batch = replace(
        batch,
        positions=torch.cat((batch.positions, batch.positions[-1:].repeat(50))),
        slots=torch.cat((batch.slots, torch.full_like(batch.slots[:1], -1).repeat(50))),
    )
    out = backend.begin_step(batch)(0, padded)[: case.num_tokens]
    assert relative_error(out, case.expected(0)[0]) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("seed", range(12 if DEVICE.type == "cuda" else 3))
def test_random_shapes(seed: int) -> None:
    random = Random(seed)
    kv_heads, group = random.randint(1, 3), random.randint(1, 5)
    window = random.choice([None, random.randint(1, 40)])
    shape = AttentionShape(1, kv_heads * group, kv_heads, 8 * random.randint(2, 6), window)
    decodes = [random.choice([0, random.randint(1, 60)]) for _ in range(random.randint(0, 4))]
    contexts = [random.randint(0, 50) for _ in range(random.randint(0 if decodes else 1, 3))]
    segments = [(random.randint(0, min(6, context)), context) for context in contexts]
    block_size = random.choice([16, 32])
    case = Case(shape, block_size, decodes, segments, torch.float32, with_norms=bool(seed % 2), seed=seed)
    check(case, TILES_OF_16)


def test_a_slot_of_minus_one_is_not_written() -> None:
    case = Case(AttentionShape(2, 2, 1, 16), 16, [5], [(2, 3)], torch.float32)
    backend, batch = make_backend(case), case.batch(DEVICE, int32=True)
    batch.slots.fill_(-1)
    assert backend.begin_step(batch)(1, case.qkv.to(DEVICE)).isfinite().all()
    assert (backend.cache.cpu() == case.cache).all()


# ---- a cache of e4m3 --------------------------------------------------------------------------------


def e4m3_case(shape: AttentionShape, block_size: int, dtype: torch.dtype, **options: Any) -> Case:
    decodes, segments = [50, 1, 0, 17, 2, 70], [(3, 40), (0, 20), (0, 0), (7, 21), (2, 2)]
    return Case(
        shape,
        block_size,
        decodes,
        segments,
        dtype,
        scales=SCALES,
        cache_dtype=E4M3,
        with_norms=True,
        **options,
    )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("plain", torch.float32),
        ("odd group, window", torch.float32),
        ("odd head size", torch.float16),
        ("rotation scaled", torch.float16),
        *((shape, torch.bfloat16) for shape in SHAPES if DEVICE.type == "cuda"),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cache_of_e4m3(shape: str, dtype: torch.dtype, layer: int) -> None:
    """Against torch in float32: with a scale of one, and where the range of the scaled numbers ends."""
    check(e4m3_case(SHAPES[shape], 16, dtype), TILES_OF_16, layer)


@pytest.mark.parametrize("boxes", [False, True])
def test_e4m3_of_other_requests_is_not_looked_at(boxes: bool) -> None:
    """Among it NaN, which these bytes may be before a block is first written."""
    case = e4m3_case(AttentionShape(2, 6, 2, 32), 64, torch.float16)
    backend = make_backend(case, DecodeTiling(16, 2, 4, 2, boxes=boxes))
    for sequence in case.decodes:
        if begun := sequence.context % 64:
            backend.cache.view(torch.uint8)[:, :, sequence.blocks[-1], :, begun:] = 0x7F
    out = backend.begin_step(case.batch(DEVICE, int32=True))(1, case.qkv.to(DEVICE))
    assert relative_error(out, case.expected(1)[0]) < TOLERANCE[case.dtype]


def test_what_e4m3_cannot_hold_ends_at_its_largest_number() -> None:
    case = e4m3_case(AttentionShape(2, 4, 2, 16), 16, torch.float32)
    case.qkv *= 1000
    case.norms = None
    backend = make_backend(case, TILES_OF_16)
    backend.begin_step(case.batch(DEVICE, int32=True))(1, case.qkv.to(DEVICE))
    written = backend.cache[1].cpu().float()
    assert written.isfinite().all() and written.abs().max() == 448
    assert relative_error(backend.cache, case.expected(1)[1]) < 1e-5
