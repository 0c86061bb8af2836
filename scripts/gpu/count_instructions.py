"""Counts the instructions of products with few rows, compiled for compute capability 9.0; no GPU.

    python scripts/gpu/count_instructions.py [coded early scaled …] [--rows 1 35] [--tilings]

A line is a kernel of a product: its programs; lane instructions a weight by what they do; how many
microseconds an H200 needs at least for what it issues (4 instructions a clock and multiprocessor), for those
instructions that half of the lanes execute (shifts, masks, permutations, additions of integers), for its
tensor cores, for the bytes from memory, and for those from the L2 cache, x included; registers of a thread,
bytes of its stack, where it spills, and of shared memory; warps that a multiprocessor holds (of 64); and the
share of the multiprocessors' time that programs fill if all take equally long. The sums are of one layer.

`coded` are codes of 4 bits, `zeros` those with zero points, `zeros-fetched` these with `early_zeros`,
`bytes` those of 8 bits, and with `early` in front each by `ops.gpu.coded_gemv`; `streams` are 16-bit weights
with `more_streams`, `scaled` FP8, `blocks-ahead` FP8 in blocks of 128 x 128 and `blocks` these without
`block_w8a8`, `mxfp4` the experts of gpt-oss-20b and `experts` those of Qwen3-30B-A3B in bfloat16, by so many
tokens, if each expert has one tile of rows. What is outside of the longest loop counts once a program, and so
do shorter loops; what waits once more behind the program's end does not. --tilings has those that the tuners
time, too.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

REGISTERS, SHARED_MEMORY, WARPS, PROGRAMS = 65_536, 227 << 10, 64, 32  # of a multiprocessor, at most
MULTIPROCESSORS, CLOCKS_US = 132, 1_750
MEMORY_BYTES_US, CACHE_BYTES_US = 4.3e6, 5.5e6
# By what an instruction does; of an opcode the first name that it begins with decides.
PURPOSES = {
    "load": ("LDGSTS", "LDG", "LDGDEPBAR", "UTMALDG", "UBLKCP", "CCTL"),
    "unpack": ("LOP3", "SHF", "PRMT", "SGXT", "BMSK"),
    "convert": ("F2F", "I2F", "F2I", "HADD2.F32", "I2I"),
    "arithmetic": ("HADD2", "HFMA2", "HMUL2", "FFMA", "FADD", "FMUL", "MUFU", "FMNMX", "FSEL", "FSETP"),
    "tensor": ("HMMA", "HGMMA", "QGMMA", "QMMA", "IMMA"),
    "shared": ("LDSM", "LDS", "STSM", "STS", "SHFL"),
    "barrier": ("BAR", "DEPBAR", "WARPGROUP", "WARPSYNC", "SYNCS", "BSYNC", "BSSY", "MEMBAR", "ERRBAR"),
    "address": ("IMAD", "IADD3", "LEA", "ISETP", "VIADD", "VIMNMX", "MOV", "SEL", "PLOP3", "LDC", "CS2R"),
}
# Executed by half of the lanes a clock; IMAD shares those of the multiplications instead.
HALF_RATE = (
    *("LOP3", "SHF", "PRMT", "SGXT", "BMSK", "IADD3", "LEA", "ISETP", "VIADD", "VIMNMX", "SEL", "PLOP3"),
    *("F2FP", "FMNMX", "FSEL", "FSETP", "P2R", "R2P"),
)
SIZES = {  # hidden, columns of qkv, intermediate
    "Qwen2-7B": (3584, 4608, 18944),
    "Qwen3-8B": (4096, 6144, 12288),
    "Qwen3-0.6B": (1024, 4096, 3072),
    "Qwen3.5-9B": (4096, 10240, 12288),  # its layers with attention
    "Gemma 3 12B": (3840, 8192, 15360),
}


class Hopper:
    """As much of a driver as compilation calls."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Launch(NamedTuple):
    kernel: Any
    programs: int


@dataclass(frozen=True, slots=True)
class Case:
    """A product: `call` launches its kernel last.

    weights: that it multiplies; trips: passes through a program's loop; weight_bytes: from memory; x_bytes:
    that a program reads of x; most: programs that have work, where fewer than all do.
    """

    name: str
    call: Callable[[], object]
    weights: int
    trips: float
    weight_bytes: float
    x_bytes: float
    most: int | None = None


def tool(name: str, kernel: Any, *options: str) -> str:
    """What a tool of Triton's prints of a compiled kernel."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run(
            [str(path), *options, file.name], capture_output=True, text=True, check=True
        ).stdout


def resources(kernel: Any) -> dict[str, int]:
    """What ptxas says of a compiled kernel: REG, STACK, SHARED, LOCAL."""
    shown = tool("cuobjdump", kernel, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", shown)}


def compile_only() -> list[Launch]:
    """From now on kernels are compiled where they would be launched -> where those are listed."""
    launches: list[Launch] = []

    def get(self: Any, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: launches.append(
            Launch(JITFunction.run(self, *args, grid=grid, warmup=True, **options), math.prod(grid))
        )

    driver.set_active(Hopper())  # type: ignore[arg-type]
    JITFunction.__getitem__ = get  # type: ignore[method-assign]
    return launches


def instructions(sass: str) -> tuple[list[str], list[str]]:
    """Opcodes with their suffixes of nvdisasm's text: those outside of the longest loop, and those of it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    longest = (0, 0)
    # Waits that are not over at once go on behind the end, from where they jump back into a loop.
    for line in sass[: sass.rindex("EXIT") + len("EXIT")].splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            opcodes.append(found[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            begin = labels.get(target[1], len(opcodes)) if target else len(opcodes)
            if len(opcodes) - begin > max(longest[1] - longest[0], 1):
                longest = begin, len(opcodes)
    inside = opcodes[slice(*longest)]
    outside = opcodes[: longest[0]] + opcodes[longest[1] :]
    return [each for each in outside if not each.startswith("NOP")], inside


def purpose_of(opcode: str) -> str:
    if opcode.startswith("U") and not opcode.startswith(("UTMA", "UBLK")):
        return "uniform"
    for purpose, names in PURPOSES.items():
        if opcode.startswith(names):
            return purpose
    return "other"


def tensor_clocks(opcode: str) -> float:
    """Of a multiprocessor's tensor cores for one warp's instruction; `mma` has half the rate of `wgmma`."""
    if found := re.match(r"([HQ])GMMA\.64x(\d+)x(\d+)", opcode):
        return 64 * int(found[2]) * int(found[3]) / (4096 if found[1] == "Q" else 2048) / 4
    return 2.0 if opcode.startswith(("HMMA.16816", "QMMA")) else 0.0


def count(case: Case, launch: Launch, sass_dir: Path | None) -> list[float]:
    """Print the line of a kernel -> its bounds in microseconds."""
    kernel, programs = launch.kernel, min(launch.programs, case.most or launch.programs)
    sass = tool("nvdisasm", kernel, "-c")
    if sass_dir:
        (sass_dir / f"{re.sub('[^A-Za-z0-9]+', '_', case.name)}.sass").write_text(sass)
    outside, inside = instructions(sass)
    warps = kernel.metadata.num_warps
    issued: Counter[str] = Counter()
    half, tensor = 0.0, 0.0
    for opcodes, times in ((outside, 1.0), (inside, case.trips)):
        for opcode in opcodes:
            issued[purpose_of(opcode)] += times  # type: ignore[assignment]
            half += times * opcode.startswith(HALF_RATE)
            tensor += times * tensor_clocks(opcode)
    total = sum(issued.values())
    used, shared = resources(kernel), kernel.metadata.shared
    by_registers = REGISTERS // (-(-used["REG"] // 8) * 8 * 32 * warps)
    resident = min(by_registers, SHARED_MEMORY // (shared + 1024), WARPS // warps, PROGRAMS)
    # The multiprocessor with most programs, in waves of those that it holds.
    each = programs / MULTIPROCESSORS
    fill = each / (math.ceil(each) if each <= resident else resident * math.ceil(each / resident))
    clocks = programs * warps / MULTIPROCESSORS / CLOCKS_US
    bounds = [
        total / 4 * clocks,
        half / 2 * clocks,
        tensor * clocks,
        case.weight_bytes / MEMORY_BYTES_US,
        (case.weight_bytes + case.x_bytes * programs) / CACHE_BYTES_US,
    ]
    lanes = programs * warps * 32 / case.weights
    shown = "".join(f"{issued[purpose] * lanes:7.2f}" for purpose in [*PURPOSES, "uniform", "other"])
    memory = f"{used['REG']:5}{max(used['STACK'], used['LOCAL']):5}{shared:8}{resident * warps:4}"
    print(
        f"{case.name:44}{programs:6}{shown}{total * lanes:7.2f} |{''.join(f'{us:7.1f}' for us in bounds)} |"
        f"{memory}{fill:6.0%}",
        flush=True,
    )
    return bounds


# ---- the products ----------------------------------------------------------------------------------------


def of_layer(model: str) -> dict[str, tuple[int, int, bool]]:
    """n, k, gated of a layer's products."""
    hidden, qkv, width = SIZES[model]
    return {
        "qkv": (qkv, hidden, False),
        "o": (hidden, hidden, False),
        "gate_up": (width, hidden, True),
        "down": (hidden, width, False),
    }


def named(kind: str, name: str, rows: int, tiling: Any) -> str:
    sizes = [tiling.block_n, tiling.block_k, tiling.warps, tiling.stages, tiling.splits]
    sizes += [tiling.max_registers] if tiling.max_registers else []
    return f"{kind} {name} {rows} ({','.join(map(str, sizes))})"


def coded_cases(
    rows: int,
    model: str,
    more: bool,
    *,
    early: bool = False,
    bits: int = 4,
    zeros: bool = False,
    fetch: bool = False,
) -> Iterator[Case]:
    from tune_coded import GROUP, Way, candidates

    from microvllm.ops.coded import PLANE, CodedTensor
    from microvllm.ops.gpu.coded_gemv import coded_gemv
    from microvllm.ops.gpu.coded_skinny import MIN_ROWS, MOST_ROWS, coded_skinny
    from microvllm.ops.gpu.tiling import MAX_EARLY_CODED_ROWS, coded_gemv_tiling

    if early and rows > MAX_EARLY_CODED_ROWS:
        return
    arrivals, step = torch.zeros(1 << 12, dtype=torch.int32), PLANE * 32 // bits
    for name, (n, k, gated) in of_layer(model).items():
        out, runs = n * (1 + gated), -(-k // step)
        words, scales = torch.zeros(out, runs * PLANE, dtype=torch.int32), torch.zeros(-(-k // GROUP), out)
        points = scales.byte() if zeros else None
        weight = CodedTensor.of(words, bits, k, GROUP, scales.half(), points)
        x = torch.zeros(rows, k).bfloat16()
        ways: Iterable[Way] = candidates(rows, (n, k, gated, False, False), SHARED_MEMORY, step)
        if early:
            ways = [Way(coded_gemv_tiling(rows, runs, gated=gated), gemv=True)]
        for way in ways if more else itertools.islice(ways, 1):
            tiling, fused = way.tiling, gated and not way.plain
            steps = runs / tiling.splits
            if way.gemv:
                splits, ahead = 1, min(tiling.stages, math.ceil(steps))
                trips: float = math.ceil(math.ceil(steps) / ahead)
                call = partial(coded_gemv, x, weight, None, None, tiling, gated=fused, pdl=True)
            else:
                splits, trips = tiling.splits, steps
                options = {"gated": fused, "pdl": True, "fetch": fetch}
                call = partial(coded_skinny, x, weight, arrivals, None, None, tiling, **options)

            kind = "gemv" if way.gemv else "plain" if way.plain else "coded"
            padded = min(MOST_ROWS, max(MIN_ROWS, rows if rows > 8 else triton.next_power_of_2(rows)))
            x_bytes = (rows if way.gemv else padded) * k * 2 / splits
            size = out * k * (bits + (24 if zeros else 16) / GROUP) / 8
            weights = out * k * -(-rows // MOST_ROWS)
            yield Case(named(kind, name, rows, tiling), call, weights, trips, size, x_bytes)


def stream_cases(rows: int, model: str, _: bool) -> Iterator[Case]:
    """16-bit weights by `ops.gpu.stream`, with tilings that were not timed (`more_streams`)."""
    from microvllm.ops.gpu.stream import StreamedWeight
    from microvllm.ops.gpu.tunings import guessed_tilings

    arrivals = torch.zeros(1 << 12, dtype=torch.int32)
    for name, (n, k, gated) in of_layer(model).items():
        if gated and model.startswith("Gemma"):  # the kernel has no GELU
            n, gated = 2 * n, False
        out = n * (1 + gated)
        tilings = guessed_tilings(n, k, gated=gated)
        streamed = StreamedWeight(
            torch.zeros(out, k, dtype=torch.bfloat16), arrivals, tilings, gated=gated, pdl=True
        )
        if tiling := streamed.tiling(rows):
            call = partial(streamed, torch.zeros(rows, k).bfloat16(), tiling)
            trips = -(-k // tiling.block_k) / tiling.splits
            x_bytes = max(8, triton.next_power_of_2(rows)) * k * 2 / tiling.splits
            yield Case(named("stream", name, rows, tiling), call, out * k, trips, out * k * 2, x_bytes)


def scaled_cases(
    rows: int, model: str, more: bool, *, blocks: bool = False, ahead: bool = False
) -> Iterator[Case]:
    from tune_scaled import candidates

    from microvllm.ops.gpu import tiling as rules
    from microvllm.ops.gpu.scaled_gemv import scaled_gemv
    from microvllm.ops.gpu.stream import StreamedWeight
    from microvllm.ops.scaled import E4M3, ScaledTensor

    arrivals = torch.zeros(1 << 16, dtype=torch.int32)
    rounds = rows > rules.MAX_EXACT_ROWS
    for name, (n, k, gated) in of_layer(model).items():
        out = n * (1 + gated)
        block = (128, 128) if blocks else (1, k)
        of_blocks = torch.ones(-(-out // block[0]), -(-k // block[1]))
        weight = ScaledTensor.of(torch.zeros(out, k, dtype=E4M3), of_blocks, block, "token")
        normed = gated or name == "qkv"
        if rows <= rules.MAX_GEMV_ROWS:
            used = rules.scaled_gemv_tiling(rows, n, k, gated=gated)
        elif rounds:
            used = rules.rounded_stream_tiling(rows, n, k, gated=gated, whole_rows=not blocks, ahead=ahead)
        else:
            used = rules.scaled_stream_tiling(rows, n, k, 128, gated=gated)
        others = candidates(rows, (n, k, gated, normed, False), rounds) if more else ()
        for tiling in dict.fromkeys((used, *others)):
            x = torch.zeros(rows, k).bfloat16()
            call: Callable[[], object]
            if rows <= rules.MAX_GEMV_ROWS:
                gain = torch.zeros(k).bfloat16() if normed and rows == 1 else None
                call = partial(scaled_gemv, x, weight, None, gain, 1e-6, None, tiling, gated=gated, pdl=True)
            else:
                streamed = StreamedWeight(weight, arrivals, {}, gated=gated, pdl=True, ahead=ahead)
                scales = torch.ones(-(-k // block[1]), rows) if rounds else None
                rounded = x.to(E4M3) if rounds else x
                call = partial(streamed, rounded, tiling, None, None, scales, torch.bfloat16)
            trips = -(-k // tiling.block_k) / tiling.splits
            size = 1 if rounds else 2
            kind = "blocks" if blocks else "W8A8" if rounds else "W8A16"
            case = named(kind, name, rows, tiling)
            yield Case(case, call, out * k, trips, out * k, rows * k * size / tiling.splits)


def expert_cases(kind: str, tokens: int) -> Iterator[Case]:
    """Products of tokens that choose alike often and by themselves, sorted by expert."""
    from microvllm.ops.gpu.experts import TILINGS, mxfp4_tiling
    from microvllm.ops.gpu.grouped import GroupedWeight
    from microvllm.ops.gpu.mxfp4 import Mxfp4Weight
    from microvllm.ops.gpu.routing import SortedChoices
    from microvllm.ops.mxfp4 import Mxfp4Tensor

    packed = kind == "mxfp4"
    hidden, width, experts, chosen = (2880, 2880, 32, 4) if packed else (2048, 768, 128, 8)
    count = tokens * chosen
    room = triton.next_power_of_2(-(-2 * count // experts))
    read = experts * (1 - (1 - chosen / experts) ** tokens)
    for name, n, k, gated in (("gate_up", width, hidden, True), ("down", hidden, width, False)):
        out, runs = experts * n * (1 + gated), -(-k // 256)
        tiling = TILINGS[min(max(room, min(TILINGS)), max(TILINGS))]
        if packed:
            tiling = mxfp4_tiling(count / experts, gated=gated)
        terms = 256 if packed else tiling.block_k
        stages = replace(tiling, block_k=terms).within(SHARED_MEMORY, 2, 1 if packed else 2).stages
        tiling = replace(tiling, stages=stages)
        tiles = (count + min(experts, count) * (tiling.rows - 1)) // tiling.rows
        places = torch.zeros(tiles, dtype=torch.int32)
        choices = SortedChoices(torch.zeros(count, dtype=torch.int32), places, places, places)
        if packed:
            words, scales = torch.zeros(out, runs * 32, dtype=torch.int32), torch.zeros(out, runs * 8).byte()
            weight: Any = Mxfp4Weight(Mxfp4Tensor.of(words, k, scales), n, gated=gated, clamped=gated)
            size = runs * (128 + 8)
        else:
            weight = GroupedWeight(torch.zeros(out, k).bfloat16(), n, torch.bfloat16, boxes=True, gated=gated)
            size = k * 2
        x = torch.zeros(tokens if gated else count, k).bfloat16()
        of_choices = None if gated else torch.zeros(count, 1)
        call = partial(weight, x, choices, chosen, tiling, scales=of_choices, pdl=True)
        most = round(read) * -(-n // tiling.columns)
        multiplied = round(read * n * (1 + gated) * k)
        case = f"{kind} {name} {tokens} ({tiling.rows},{tiling.columns},{terms},{tiling.warps},{stages})"
        bytes_of = read * n * (1 + gated) * size
        yield Case(case, call, multiplied, -(-k // terms), bytes_of, count / read * k * 2, most)


KINDS: dict[str, Callable[[int, str, bool], Iterator[Case]]] = {
    "coded": coded_cases,
    "early": partial(coded_cases, early=True),
    "zeros": partial(coded_cases, zeros=True),
    "zeros-fetched": partial(coded_cases, zeros=True, fetch=True),
    "early-zeros": partial(coded_cases, zeros=True, early=True),
    "bytes": partial(coded_cases, bits=8),
    "early-bytes": partial(coded_cases, bits=8, early=True),
    "streams": stream_cases,
    "scaled": scaled_cases,
    "blocks": partial(scaled_cases, blocks=True),
    "blocks-ahead": partial(scaled_cases, blocks=True, ahead=True),
    "mxfp4": lambda rows, *_: expert_cases("mxfp4", rows),  # of gpt-oss-20b
    "experts": lambda rows, *_: expert_cases("experts", rows),  # of Qwen3-30B-A3B, in bfloat16
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 35])
    parser.add_argument("--model", choices=SIZES, default="Qwen2-7B")
    parser.add_argument("--tilings", action="store_true", help="all that the tuners time")
    parser.add_argument("--sass", type=Path, help="where to write the machine code")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"there are no {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    launches = compile_only()
    names = [*PURPOSES, "uniform", "other", "all"]
    print(f"{'':44}{'':6}{''.join(f'{name[:6]:>7}' for name in names)} |", end="")
    print(f"{''.join(f'{name:>7}' for name in ('issue', 'half', 'tensor', 'memory', 'L2'))} |", end="")
    print(f"{'regs':>5}{'spil':>5}{'shared':>8}{'wps':>4}{'fill':>6}")
    for kind in args.kinds:
        for rows in args.rows:
            sums = [0.0] * 5
            for case in KINDS[kind](rows, args.model, args.tilings):
                try:
                    case.call()
                except Exception as error:  # too much shared memory, ...
                    print(f"{case.name:44} no: {str(error).splitlines()[0][:100]}")
                    continue
                sums = [a + b for a, b in zip(sums, count(case, launches[-1], args.sass), strict=True)]
            if not args.tilings and any(sums):
                print(f"{f'{kind} {rows}: a layer':50}{'':77} |{''.join(f'{us:7.1f}' for us in sums)} |")


if __name__ == "__main__":
    main()
