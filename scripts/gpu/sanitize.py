"""Launches every kernel of the engine once or more at tiny shapes, to be watched by compute-sanitizer.

    python scripts/gpu/sanitize.py                     # launches all of them, unwatched
    python scripts/gpu/sanitize.py --tool racecheck    # each part in a process of its own, under the tool
    python scripts/gpu/sanitize.py coded models --tool memcheck

A part that crashes, or the tool within it, hides no other one. Exit status 1 if a part failed, the tool found
anything, a kernel of ours was not launched by all parts, or one gave something that is not finite. What is
right is tests/'s business.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from microvllm.adapters.decoder import DecoderModel
from microvllm.adapters.registry import load_spec
from microvllm.adapters.weights import load_weights
from microvllm.ops.attention import AttentionBatch, AttentionConfig, AttentionShape, QKNorms, SegmentTable
from microvllm.ops.attention.e4m3 import KVScales
from microvllm.ops.attention.flash_backend import FlashAttention
from microvllm.ops.attention.triton_backend import TritonAttention
from microvllm.ops.attention.triton_decode import DecodeTiling
from microvllm.ops.coded import CodedTensor, pack
from microvllm.ops.gpu.bitmask import apply_bitmask
from microvllm.ops.gpu.coded_gemv import coded_gemv
from microvllm.ops.gpu.coded_skinny import coded_skinny
from microvllm.ops.gpu.fixed_order import fixed_order_linear
from microvllm.ops.gpu.launch import can_launch_early
from microvllm.ops.gpu.levers import Levers
from microvllm.ops.gpu.operators import GpuOperators
from microvllm.ops.gpu.peers import PeerExchange, box_bytes
from microvllm.ops.gpu.rules import RuleTables
from microvllm.ops.gpu.sampling import Delivery, TokenSampler
from microvllm.ops.gpu.scaled_skinny import scaled_skinny
from microvllm.ops.gpu.skinny import MAX_SPLIT_TILES, skinny_linear
from microvllm.ops.gpu.step_inputs import STAGED, prepare_decode
from microvllm.ops.gpu.tiling import (
    MAX_CODED_ROWS,
    MAX_SKINNY_ROWS,
    MAX_STREAMED_ROWS,
    Tiling,
    coded_gemv_tiling,
)
from microvllm.ops.scaled import ScaledTensor, quantize

DEVICE = torch.device("cuda")
MODULES = (
    *(
        "activation",
        "bitmask",
        "causal_conv",
        "coded_expert_gemv",
        "coded_gemv",
        "coded_grouped",
        "coded_skinny",
        "delta_decode",
        "delta_prefill",
        "e4m3",
        "embedding",
        "expert_gemv",
        "fixed_order",
        "gemv",
        "grouped",
        "mamba2",
        "mxfp4",
        "mxfp4_experts",
        "norm",
        "peers",
        "rope_cache",
        "routing",
        "rules",
        "sampling",
        "scaled_gemv",
        "scaled_skinny",
        "skinny",
    ),
    *("step_inputs", "triton_decode", "triton_latent", "triton_prefill"),
)
DTYPE = torch.bfloat16
# What every model has, and what makes the layers of one different.
SIZES = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
CODES = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}}
MODELS: dict[str, dict[str, Any]] = {
    "experts": {"model_type": "qwen3_moe", **EXPERTS},
    "experts in FP8": {"model_type": "qwen3_moe", **EXPERTS, **FP8},
    "experts in codes": {
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 64,
        **EXPERTS,
        **CODES,
    },
    "experts in MXFP4": {
        "model_type": "gpt_oss",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_bias": True,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    },
    "states": {
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    },
    "states of Mamba-2": {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M*-E",
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 24,
        "n_groups": 2,
        "ssm_state_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
    },
    "latents": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 3,
        "topk_group": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
}


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def check(name: str, *results: Tensor) -> None:
    """Raises `SystemExit` that names the kernel, for NaN and infinity, and for faults that came late."""
    torch.cuda.synchronize()
    if not all(bool(result.isfinite().all()) for result in results):
        raise SystemExit(f"{name}: a result is not finite")


def operators() -> None:
    """Whatever a decoder calls, for row counts that each way takes; sizes are no multiples of a tile's."""
    ops, hidden, width = GpuOperators(DTYPE, DEVICE, "triton"), 88, 40
    norm, up, down = normal(hidden), normal(2 * width, hidden), normal(hidden, width)
    bias = normal(2 * width)
    for rows in (1, 2, 3, 7, MAX_SKINNY_ROWS + 1):
        x = normal(rows, hidden)
        act = ops.norm_gate_up(norm, 1e-5, up)(x)
        check(
            f"norms of {rows} rows",
            ops.norm_parts(normal(rows, hidden), ((norm[:40], 1e-5), (norm[40:], 1e-5))),
            ops.norm_heads(normal(rows, 3, hidden), normal(3, hidden), 1e-5),
        )
        check(
            f"products of {rows} rows",
            act,
            ops.norm_linear(norm, 1e-5, up, bias)(x),
            ops.linear(down)(act, x),
        )
    logits = normal(3, 70, dtype=torch.float32)
    apply_bitmask(logits, ints(1, 2, 3, 4, 5, 6).view(2, 3), torch.tensor([2, 0], device=DEVICE))
    check("bitmask", logits[1])
    check("gather", ops.embedding(normal(11, hidden))(ints(10, 0, 3)))
    arrivals = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)
    for pdl in {False, can_launch_early(DEVICE)}:  # sums that several programs share
        split = Tiling(16, 32, 4, 2, splits=3)
        y = skinny_linear(normal(5, 200), normal(37, 200), arrivals, tiling=split, pdl=pdl)
        check("split product", y, arrivals)
        for rows in (5, 130):  # runs of a sum by programs of their own, and by one
            y = fixed_order_linear(
                normal(rows, 1100), normal(70, 1100), arrivals, normal(70), normal(rows, 70), pdl=pdl
            )
            check("fixed-order product", y, arrivals)
    if not ops.levers.stream:
        return
    from microvllm.ops.gpu.stream import StreamedWeight

    for gated, pdl in ((False, False), (True, True)):
        weight, outputs = normal(144, 200), 72 if gated else 144
        streamed = StreamedWeight(weight, arrivals, {}, gated=gated, pdl=pdl)
        for tiling in (Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3, splits=3)):
            x, residual = normal(5, 200), normal(5, outputs)
            check("streamed product", streamed(x, tiling, normal(144), residual), arrivals)


def scaled() -> None:
    """Products with 8-bit codes, for row counts that each way takes, with scales of rows and of blocks."""
    hidden, width = 96, 48
    ops = GpuOperators(DTYPE, DEVICE, "triton")
    arrivals = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)
    for block in ((1, 0), (32, 64)):
        up, down = (
            ScaledTensor.of(*quantize(normal(*shape), block), (block[0], block[1] or shape[1]), "token")
            for shape in ((2 * width, hidden), (hidden, width))
        )
        for rows in (1, 2, 7, 20, MAX_STREAMED_ROWS + 1):
            x = normal(rows, hidden)
            act = ops.norm_gate_up(normal(hidden), 1e-5, up)(x)
            check(f"scaled products of {rows} rows", act, ops.linear(down, normal(hidden))(act, x))
        tiling = Tiling(64, 32, 4, 2, splits=2)
        check(
            "scaled product", scaled_skinny(normal(7, hidden), up, arrivals, None, None, tiling, gated=True)
        )


def coded() -> None:
    """Products with codes of 4 and 8 bits, for row counts that each way takes, and sums that are shared."""
    hidden, width = 1120, 48
    ops = GpuOperators(DTYPE, DEVICE, "triton")
    arrivals = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=DEVICE)
    for bits, group, points in ((4, 32, False), (8, hidden, True)):
        codes = torch.randint(0, 1 << bits, (2 * width, hidden), dtype=torch.uint8, device=DEVICE)
        scales = normal(-(-hidden // group), 2 * width)
        zeros = torch.ones_like(scales).byte() if points else None
        weight = CodedTensor.of(pack(codes, bits), bits, hidden, group, scales, zeros)
        for rows in (1, 13, 70, MAX_CODED_ROWS + 1):
            check(
                f"coded products of {rows} rows",
                ops.norm_gate_up(normal(hidden), 1e-5, weight)(normal(rows, hidden)),
                ops.linear(weight, normal(2 * width))(normal(rows, hidden), normal(rows, 2 * width)),
            )
        for pdl in {False, can_launch_early(DEVICE)}:
            early = coded_gemv_tiling(2, weight.shape[1] // weight.plane, gated=True)
            y = coded_gemv(normal(2, hidden), weight, None, None, early, gated=True, pdl=pdl)
            check("coded product of two rows", y)
            x, tiling = normal(70, hidden), Tiling(64, 0, 4, 2, splits=2)
            y = coded_skinny(x, weight, arrivals, None, None, tiling, gated=True, pdl=pdl)
            check("coded product", y, arrivals)


def check_tokens(tokens: Tensor, vocab: int) -> None:
    if not bool(((tokens >= 0) & (tokens < vocab)).all()):
        raise SystemExit(f"sampling: {tokens.tolist()} are no tokens")


def sampling() -> None:
    rows, vocab = 4, 5000
    for dtype in (DTYPE, torch.float32):
        for pdl in {False, can_launch_early(DEVICE)}:
            sampler = TokenSampler(rows, DEVICE, pdl=pdl)
            newest = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
            sent = torch.zeros(rows, dtype=torch.int64, pin_memory=True)
            delivery = Delivery(newest, sent, ints(3, -1, 1, 0))
            for filters in (False, True):
                tokens = sampler(
                    normal(rows, vocab, dtype=dtype),
                    torch.arange(rows, device=DEVICE),
                    torch.arange(rows, device=DEVICE),
                    temperature=torch.tensor([0.0, 0.7, 1.0, 1.3], device=DEVICE),
                    top_k=ints(0, 0, 7, 0),
                    top_p=torch.tensor([1.0, 1.0, 0.9, 0.5], device=DEVICE),
                    min_p=torch.tensor([0.0, 0.0, 0.0, 0.1], device=DEVICE),
                    seed=torch.arange(rows, device=DEVICE),
                    filters=filters,
                    delivery=delivery,
                )
                check_tokens(tokens, vocab)


def rules() -> None:
    rows, vocab = 3, 5000
    for pdl in {False, can_launch_early(DEVICE)}:
        tables = RuleTables(rows + 1, vocab, DEVICE, pdl=pdl)
        tables.set_penalties(3, (0.5, 0.1, 1.2), [0, 4999, 4999], [7, 7])
        tables.set_biases(1, {0: 1.0, 4999: -2.0})
        at = torch.tensor([3, 0, 1], device=DEVICE)
        changed = tables.change(normal(rows, vocab), at)
        tables.penalise(changed, at[1:] * 0 + 2, at[1:])
        tables.count(at, torch.tensor([4999, 5, -1], device=DEVICE))
        check("rules", changed)


def step_inputs() -> None:
    staged = torch.zeros(STAGED + 2, 4, dtype=torch.int32, device=DEVICE)
    staged[0], staged[2] = ints(2, 0, 1, 3), ints(0, 15, 16, 0)
    staged[3], staged[4] = ints(1, 16, 17, 0), ints(0, -1, 1, -1)  # the last one is padding
    staged[1, 1:3], staged[5], staged[STAGED:, 0] = -1, -1, 5
    tables = torch.zeros(2, 4, 9, dtype=torch.int32, device=DEVICE)
    made = prepare_decode(staged, tables, torch.arange(4, device=DEVICE), 16)
    check("step inputs", made.ids, made.slots, made.lens)


def mixed_step(block: int) -> tuple[AttentionBatch, int]:
    """Decodes of several lengths, one of them padding, then segments, one of them empty; (batch, blocks)."""
    decodes, segments = (1, block + 3, 0, 5 * block), ((9, 9), (0, 0), (3, block + 1))
    free = iter(range(1000))
    tables = [[next(free) for _ in range(-(-n // block))] for n in (*decodes, *(n for _, n in segments))]
    width = max(map(len, tables))
    padded = torch.tensor(
        [row + [0] * (width - len(row)) for row in tables], dtype=torch.int32, device=DEVICE
    )
    positions, slots = [max(n - 1, 0) for n in decodes], []
    for row, n in zip(tables, decodes, strict=False):
        slots.append(row[(n - 1) // block] * block + (n - 1) % block if n else -1)
    for row, (new, n) in zip(tables[len(decodes) :], segments, strict=True):
        for at in range(n - new, n):
            positions.append(at)
            slots.append(row[at // block] * block + at % block)
    starts = [0]
    for new, _ in segments:
        starts.append(starts[-1] + new)
    table = SegmentTable(
        ints(*starts), ints(*(n for _, n in segments)), padded[len(decodes) :].contiguous(), 9
    )
    count = len(decodes)
    batch = AttentionBatch(
        ints(*positions), ints(*slots), count, padded[:count].contiguous(), ints(*decodes), table
    )
    return batch, next(free)


def attention() -> None:
    """Of heads that are no power of two, with a window and without, with norms and without."""
    for heads, kv_heads, dim, window, with_norms in ((7, 1, 64, None, False), (4, 2, 128, 20, True)):
        shape = AttentionShape(1, heads, kv_heads, dim, window)
        norms = QKNorms(((normal(dim), normal(dim)),), 1e-6) if with_norms else None
        inv_freq = 100.0 ** -(torch.arange(0, dim, 2, device=DEVICE) / dim)
        qkv_width = (heads + 2 * kv_heads) * dim
        for pdl in {False, can_launch_early(DEVICE)}:
            for block, tiling in ((16, DecodeTiling(16, 3, 4, 2, boxes=pdl and not window)), (64, None)):
                batch, blocks = mixed_step(block)
                config = AttentionConfig(shape, blocks, block, inv_freq, 2048, DTYPE, norms)
                own = TritonAttention(
                    config,
                    pdl=pdl,
                    levers=Levers.of(DEVICE),
                    decode_tiling=tiling,
                )
                own.cache.normal_()
                step, qkv = own.begin_step(batch), normal(len(batch.positions), qkv_width)
                step(0, qkv)
                out = step(0, qkv)  # not the first any more, so that it may read early
                check("triton attention", out, own.cache, own.workspace.arrivals)
                fixed = TritonAttention(config, pdl=pdl, fixed_order=True)
                fixed.cache.copy_(own.cache)
                check("attention in fixed order", fixed.begin_step(batch)(0, qkv), fixed.cache)
                if torch.cuda.get_device_capability(DEVICE) >= (8, 9):
                    small = replace(config, dtype=torch.float8_e4m3fn, scales=(KVScales(0.1, 0.2),))
                    cached = TritonAttention(small, pdl=pdl, levers=Levers.of(DEVICE), decode_tiling=tiling)
                    step = cached.begin_step(batch)
                    check("attention to e4m3", step(0, qkv), step(0, qkv), cached.cache.float())
        if importlib.util.find_spec("flash_attn"):
            # flash-attn 2.8.3 joins splits 8 rows (sequence and head) at a time and writes the log-sums of up
            # to 7 rows that are not there. Torch gives memory out in 512 bytes, where they find room; the
            # sanitizer, without torch's allocator, would report them.
            shape = replace(shape, num_heads=-(-heads // 4) * 4)
            batch, blocks = mixed_step(256)
            flash = FlashAttention(AttentionConfig(shape, blocks, 256, inv_freq, 2048, DTYPE, norms))
            flash.cache.normal_()
            qkv = normal(len(batch.positions), (shape.num_heads + 2 * kv_heads) * dim)
            check("flash_attn attention", flash.begin_step(batch)(0, qkv), flash.cache)


def models() -> None:
    """Decoders of random weights, of experts, states and latents: a mixed step, some decodes, and one."""
    ops, block = GpuOperators(DTYPE, DEVICE, "triton"), 16
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps({**SIZES, **config}))
            spec = load_spec(Path(folder))
            weights = load_weights(Path(folder), spec, "dummy", DTYPE, device=DEVICE.type, packed=ops.packed)
        model, groups = DecoderModel(spec, weights, ops), len(spec.cache_plan.windows)
        mixed, blocks = mixed_step(block)
        rows = torch.arange(mixed.num_decodes + 3, device=DEVICE)
        attention = model.attention(blocks, block, 512, DTYPE, DEVICE, len(rows))
        decodes = [
            replace(
                mixed,
                positions=mixed.positions[:count],
                slots=mixed.slots[:count],
                num_decodes=count,
                decode_blocks=mixed.decode_blocks[:count],
                decode_lens=mixed.decode_lens[:count],
                segment_table=None,
            )
            for count in (mixed.num_decodes, 1)
        ]
        for batch in (mixed, *decodes):
            count = len(rows) if batch is mixed else batch.num_decodes
            group = replace(batch, rows=rows[:count])  # of the same blocks: what is computed is not looked at
            step = attention.begin_step(replace(group, others=(group,) * (groups - 1)))
            tokens = torch.arange(len(batch.positions), device=DEVICE)
            check(name, model.logits(model.forward(tokens, step)))


def peers() -> None:
    """A rank that need not wait for the other one."""
    room = 4096
    boxes = [torch.zeros(box_bytes(2, room) // 8, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    for pdl in {False, can_launch_early(DEVICE)}:
        exchange = PeerExchange(0, [box.data_ptr() for box in boxes], room, DEVICE, pdl=pdl)
        exchange._ended.fill_(1)
        for residual in (None, normal(3, 300)):
            check("sum over ranks", exchange.sum(normal(3, 300), residual))
        check("parts of ranks", exchange.join(normal(3, 250)))


PARTS = {
    part.__name__: part
    for part in (operators, scaled, coded, sampling, rules, step_inputs, attention, models, peers)
}


def launched() -> dict[str, bool]:
    """Whether each kernel of ours has a compiled form by now; by name, what others call is no kernel."""
    found: dict[str, bool] = {}
    for module in (*MODULES, *["stream"] * Levers.of(DEVICE).stream):
        package = "attention" if module.startswith("triton") else "gpu"
        for name, kernel in vars(importlib.import_module(f"microvllm.ops.{package}.{module}")).items():
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                found[f"{module}.{name}"] = any(cache[0] for cache in kernel.device_caches.values())
    return found


def watched(tool: str, part: str) -> tuple[bool, dict[str, bool]]:
    """Run a part under a tool of compute-sanitizer -> whether nothing was found, and what it launched.

    Without torch's caching every tensor is an allocation of its own, so that an access past its end is seen.
    A launch that waits for its kernel lets the trace of a fault name it. cuBLAS's kernels are left out: they
    hand buffers over in ways that racecheck does not follow, and of what it makes of one the GPU has failed.
    """
    excluded = [w for name in ("nvjet", "gemm", "cutlass") for w in ("--kernel-name-exclude", f"kns={name}")]
    options = ["--error-exitcode", "1", "--force-blocking-launches", "--target-processes", "application-only"]
    command = ["compute-sanitizer", "--tool", tool, *options, *excluded]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launched.json"
        done = subprocess.run(
            [*command, sys.executable, str(Path(__file__).resolve()), part, "--out", str(file)],
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            check=False,
        )
        return done.returncode == 0, json.loads(file.read_text()) if file.exists() else {}


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tool", help="of compute-sanitizer: memcheck, racecheck, synccheck or initcheck")
    parser.add_argument("--out", type=Path, help="write here, as JSON, which kernels were launched")
    args = parser.parse_args(arguments)
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(PARTS)}")
    parts: list[str] = args.parts or list(PARTS)
    failed: list[str] = []
    found: dict[str, bool] = {}
    for part in parts:
        if args.tool is None:
            torch.manual_seed(0)
            with torch.inference_mode():
                PARTS[part]()
        else:
            is_clean, kernels = watched(args.tool, part)
            failed += [] if is_clean else [part]
            found |= {name: one or found.get(name, False) for name, one in kernels.items()}
        print(part, "FAILED" if part in failed else "done", flush=True)
    if args.tool is None:
        found = launched()
    if args.out is not None:
        args.out.write_text(json.dumps(found))
        return 0
    for name, is_launched in found.items():
        print(f"{name}: {'launched' if is_launched else 'NOT LAUNCHED'}")
    return int(bool(failed) or (len(parts) == len(PARTS) and not all(found.values())))


if __name__ == "__main__":
    sys.exit(main())
