#!/usr/bin/env python3
"""Compare served engines on this machine's CPU: same client, same weights, same prompts, turn by turn.

    python scripts/bench_cpu.py --vllm-python ~/vllm/bin/python --transformers-python ~/hf/bin/python \\
        --llama-server ~/llama.cpp/llama-server --json result.json

All servers are started one after the other and stay up. Those whose turn it is not are halted (SIGSTOP), so
that they take no processor time. Then the engines take turns, A B C A B C ...; the ratios are taken within a
round, and the table has the medians over the rounds. Every prompt is new, prefix caches are off, a turn
before the first round is thrown away. An engine whose program is not given is left out; the report says so.

The weights are those of one GGUF file. vLLM and transformers get them as a Hugging Face folder, written by
export_hf.py; llama.cpp gets the file itself, or copies of it in other number formats. "Ready after" is a
later start: what an engine compiles once and keeps is there already (for vLLM, if it ever ran here).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from bench_engines import (
    HERE,
    Engine,
    Server,
    busy_neighbour,
    convert_gguf,
    llama_cpp_python,
    llama_server,
    microvllm,
    transformers,
    vllm,
)
from bench_report import Row, Shape, as_json, markdown
from bench_serve import BenchError, measure, positive_int, random_texts

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import load_spec
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.models import find_model

SPEED_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# After its first answer a server gets a moment to come to rest; then it is watched for as long as IDLE_S.
SETTLE_S = 1.0
IDLE_S = 2.0


def say(message: str) -> None:
    """A line of progress on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def build_engines(args: argparse.Namespace, folder: Path) -> list[Engine]:
    """The engines that were asked for, with their model files written into `folder`. Raises `BenchError`."""
    try:
        model = find_model(args.model)
        eos_token_ids = load_spec(model).eos_token_ids
    except (ConfigError, ModelFileError) as error:
        raise BenchError(str(error)) from error
    if not model.is_file():
        raise BenchError(
            f"--model {args.model}: must be a GGUF file, the one format that all engines can be given"
        )

    def exported(dtype: str) -> Path:
        target = folder / f"hf-{dtype}"
        if not target.exists():
            say(f"writing the weights as a Hugging Face folder in {dtype}")
            command = [
                args.microvllm_python,
                str(HERE / "export_hf.py"),
                str(model),
                str(target),
                "--dtype",
                dtype,
            ]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode:
                raise BenchError(answer.stderr.strip().splitlines()[-1])
        return target

    def converted(dtype: str) -> tuple[Path, str]:
        if dtype == "file":
            return model, model.stem.rpartition(".")[2]
        target = folder / f"{model.stem}.{dtype}.gguf"
        if not target.exists():
            say(f"writing the weights as a GGUF file in {dtype}")
            convert_gguf(model, target, dtype)
        return target, dtype

    def flags(name: str) -> list[str]:
        return shlex.split(getattr(args, f"{name}_args"))

    engines = []
    for wish in args.microvllm_dtypes:
        # What "auto" means here. This compiles its kernels, if they never were.
        config = EngineArgs(model=str(model), dtype=wish).resolve()
        engines.append(
            microvllm(
                args.microvllm_python, model, config.dtype, config.attention_backend, flags("microvllm")
            )
        )
    for dtype in args.vllm_dtypes if args.vllm_python else ():
        engines += [
            vllm(args.vllm_python, exported(dtype), dtype, binding, flags("vllm"))
            for binding in args.vllm_bindings
        ]
    for dtype in args.transformers_dtypes if args.transformers_python else ():
        engines.append(transformers(args.transformers_python, exported(dtype), dtype, flags("transformers")))
    for dtype in args.llama_dtypes if args.llama_server else ():
        slots = max(args.streams)
        engines.append(llama_server(args.llama_server, *converted(dtype), slots, flags("llama_server")))
    for dtype in args.llama_dtypes if args.llama_python else ():
        file, weights = converted(dtype)
        engines.append(
            llama_cpp_python(args.llama_python, file, weights, eos_token_ids, flags("llama_python"))
        )
    return engines


def start(engine: Engine, folder: Path, timeout_s: float, stack: ExitStack) -> tuple[Server, Row]:
    """Start a server, note what it takes when idle, and halt it. Raises `BenchError`."""
    say(f"starting {engine.name}, {engine.weights}")
    server = Server(engine, folder)
    stack.callback(server.stop)
    server.wait_ready(timeout_s)
    time.sleep(SETTLE_S)
    before = server.cpu_seconds()
    time.sleep(IDLE_S)
    row = Row(engine, server.ready_s, (server.cpu_seconds() - before) / IDLE_S)
    say(f"ready after {row.ready_s:.1f} s, {100 * row.idle_cpu:.1f} % of a core when idle")
    server.halt()
    return server, row


def run_rounds(
    servers: Sequence[tuple[Server, Row]], shapes: Sequence[Shape], args: argparse.Namespace
) -> None:
    """Let the engines take turns; the reports go into their rows."""
    for turn in range(args.rounds + 1):
        for server, row in servers:
            server.resume()
            for shape in shapes:
                if turn == 0 and shape.busy:
                    continue
                # The turn before the first round is short: it is there to load code and data, and to let
                # those that compile for a shape do so.
                output_len = args.output_len if turn else min(16, args.output_len)
                prompts = random_texts(shape.streams, args.input_len, time.monotonic_ns())
                with busy_neighbour() if shape.busy else nullcontext():
                    report = measure(
                        server.target,
                        prompts,
                        output_len=output_len,
                        streams=shape.streams,
                        timeout_s=args.timeout,
                    )
                if turn:
                    row.reports.setdefault(shape, []).append(report)
                what = f"round {turn}" if turn else "warm-up"
                say(f"{what}: {row.label}, {shape}: {report.output_throughput:.1f} tok/s")
                for error in sorted({request.error for request in report.failed}):
                    say(f"error: {error}")
            if turn == args.rounds:
                row.memory = server.memory()
            server.halt()


def machine() -> dict[str, Any]:
    """What is measured on."""
    values: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    flags = values.get("flags", "").split()
    return {
        "cpu": "{} (family {}, model {})".format(
            *(values.get(name, "?") for name in ("model name", "cpu family", "model"))
        ),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in SPEED_FLAGS if flag in flags],
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def left_out(args: argparse.Namespace) -> list[str]:
    """The engines that no program was given for."""
    options = {
        "vLLM": "vllm_python",
        "transformers": "transformers_python",
        "llama.cpp": "llama_server",
        "llama.cpp (Python)": "llama_python",
    }
    return [
        f"{name} (no --{option.replace('_', '-')})"
        for name, option in options.items()
        if not getattr(args, option)
    ]


def stream_counts(text: str) -> list[int]:
    """An argparse type: `1,8`."""
    return [positive_int(part) for part in text.split(",")]


def words_of(*allowed: str) -> Any:
    """An argparse type: some of the allowed words, separated by commas."""

    def parse(text: str) -> list[str]:
        words = text.split(",")
        if wrong := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(allowed)}")
        return words

    return parse


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a .gguf file or its name")
    parser.add_argument("--microvllm-python", default=sys.executable, help="interpreter that has microvllm")
    parser.add_argument("--vllm-python", help="interpreter that has vLLM")
    parser.add_argument("--transformers-python", help="interpreter that has transformers[serving]")
    parser.add_argument("--llama-server", help="the llama-server program of llama.cpp")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python[server]")
    for name, kinds, default in (
        ("microvllm", ("auto", "float32", "bfloat16"), "auto"),
        ("vllm", ("float32", "bfloat16"), "float32"),
        ("transformers", ("float32", "bfloat16"), "float32"),
        ("llama", ("file", "f32", "f16", "bf16"), "file"),
    ):
        parser.add_argument(
            f"--{name}-dtypes",
            type=words_of(*kinds),
            default=default,
            metavar="LIST",
            help=f"some of {', '.join(kinds)}: each is an engine of its own (default: {default})",
        )
    parser.add_argument(
        "--vllm-bindings",
        type=lambda text: text.split(","),
        default="auto",
        metavar="LIST",
        help="values of VLLM_CPU_OMP_THREADS_BIND, such as auto,0-1: each is an engine of its own",
    )
    for name in ("microvllm", "vllm", "transformers", "llama-server", "llama-python"):
        # Its cache would take most of the memory that is free.
        flags = "--continuous-batching --cb-max-memory-percent 0.1" if name == "transformers" else ""
        parser.add_argument(
            f"--{name}-args",
            default=flags,
            metavar="FLAGS",
            help=f"flags of its server (default: {flags or 'none'})",
        )
    parser.add_argument("--streams", type=stream_counts, default="1,8", metavar="LIST")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--input-len", type=positive_int, default=128, help="words of a prompt")
    parser.add_argument("--output-len", type=positive_int, default=128, help="tokens of an answer")
    parser.add_argument("--busy-neighbour", action="store_true", help="measure with a competing process, too")
    parser.add_argument(
        "--start-timeout", type=float, default=600.0, help="seconds a server may take to start"
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take")
    parser.add_argument("--json", type=Path, help="file for every single figure")
    parser.add_argument(
        "--keep", type=Path, help="folder for converted weights and logs, used again next time"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "machine": machine(),
        "model": args.model,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "rounds": args.rounds,
        "left_out": left_out(args),
    }
    shapes = [
        Shape(streams, busy) for busy in (False, True)[: 1 + args.busy_neighbour] for streams in args.streams
    ]
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        servers = []
        for engine in build_engines(args, folder):
            try:
                servers.append(start(engine, folder, args.start_timeout, stack))
            except BenchError as error:
                if engine.name == "microvllm":
                    raise
                say(str(error))
                facts["left_out"].append(f"{engine.name}, {engine.weights} ({error})")
        run_rounds(servers, shapes, args)
        rows = [row for _, row in servers]
    print(markdown(rows, shapes, facts))
    if args.json:
        args.json.write_text(json.dumps(as_json(rows, facts), indent=1) + "\n")
    return 1 if any(row.errors() for row in rows) else 0


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    # Ended from outside, it must not leave servers behind, least of all halted ones.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"bench_cpu: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
