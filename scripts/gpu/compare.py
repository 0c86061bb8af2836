"""This engine and vLLM on the same GPU, driven alternately by vLLM's own client; prints the ratios.

    compare.py prepare --configs FOLDER [MODEL…]   write a random checkpoint of each model
    compare.py start ENGINE:MODEL…                 start engines in the background, and return at once
    compare.py measure ROW… --out FILE.json        measure rows, starting what does not run yet
    compare.py stop [ENGINE:MODEL…]                end engines
    compare.py table FILE.json…                    merge results into one Markdown table; needs no GPU

ENGINE is microvllm, vllm, microvllm-offline or vllm-offline. Engines stay between commands, so that the work
can be spread over several: what runs is in FOLDER/engines.json (--folder). Both engines of a row load the
same checkpoint, have KV caches of the same size and no prefix cache, and else vLLM's defaults and ours. Of a
round both get the same prompts. scripts/gpu/compare.sh does all of it by one command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_table import machine, markdown

HERE = Path(__file__).resolve().parent
START_TIMEOUT_S = 400
MAX_MODEL_LEN = 4096
# Room for all requests of a row at once: 256 of up to 2,048 tokens hold 175,000 tokens at most at a time.
KV_BYTES = {"qwen2-7b": 4_000_000_000, "qwen3-0.6b": 23_000_000_000, "qwen2.5-0.5b": 4_000_000_000}
# vLLM has no FlashInfer here, which matters to top-k and top-p alone: all rows are greedy.
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


@dataclass(frozen=True)
class Row:
    """A workload. Lengths are drawn from U(mean * (1 - ratio), mean * (1 + ratio)), rounded outwards."""

    name: str
    model: str
    prompts: int
    concurrency: int
    input: int
    output: int
    ratio: float = 0.0
    clients: int = 1
    rounds: int = 3
    offline: bool = False


ROWS = {
    row.name: row
    for row in (
        Row("7b-1", "qwen2-7b", 2, 1, 128, 500),
        Row("7b-35", "qwen2-7b", 70, 35, 320, 500),
        Row("0.6b-1", "qwen3-0.6b", 5, 1, 128, 500),
        Row("0.6b-256", "qwen3-0.6b", 256, 256, 562, 562, 0.822, clients=4),
        Row("0.6b-offline", "qwen3-0.6b", 256, 256, 562, 562, 0.822, offline=True),
        Row("0.5b-256", "qwen2.5-0.5b", 256, 256, 562, 562, 0.822, clients=4),
    )
}


# ---- engines --------------------------------------------------------------------------------------------


class Engines:
    """Processes that outlive this one; {"vllm:qwen2-7b": {"pid", "port", "log", "command"}} in a file."""

    def __init__(self, folder: Path, models: Path, site: str) -> None:
        self._folder, self._models, self._site = folder, models, site
        self._file = folder / "engines.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def start(self, name: str) -> None:
        if name in self.known and alive(self.known[name]["pid"]):
            return
        engine, _, model = name.partition(":")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = self._command(engine, model, port)
        environment = dict(os.environ)
        if engine.startswith("vllm"):
            environment |= {**VLLM_ENVIRONMENT, "PYTHONPATH": self._site}
        log = self._folder / f"{name.replace(':', '-')}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.known[name] = {
            "pid": process.pid,
            "port": port,
            "log": str(log),
            "command": command,
            "began": time.time(),
        }
        self._file.write_text(json.dumps(self.known, indent=1))

    def _command(self, engine: str, model: str, port: int) -> list[str]:
        folder, kv = str(self._models / model), str(KV_BYTES[model])
        if engine.endswith("-offline"):
            script = str(HERE / "../bench/offline_server.py")
            kind = engine.removesuffix("-offline")
            return [sys.executable, script, kind, folder, str(port), "--kv-cache-memory-bytes", kv]
        common = ["--model", folder, "--served-model-name", model, "--host", "127.0.0.1", "--port", str(port)]
        common += ["--max-model-len", str(MAX_MODEL_LEN), "--no-enable-prefix-caching"]
        common += ["--kv-cache-memory-bytes", kv, "--disable-uvicorn-access-log"]
        if engine == "vllm":
            # The share is asked for at the start only, as the size of the cache is given.
            common += ["--gpu-memory-utilization", "0.3"]
            return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *common]
        return [sys.executable, "-m", "microvllm.cli", "serve", *common]

    def wait(self, name: str) -> str:
        """The engine's URL once it answers. Raises `SystemExit` with its last lines if it does not."""
        engine = self.known[name]
        url = f"http://127.0.0.1:{engine['port']}"
        waited = False
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and alive(engine["pid"]):
            try:
                get(f"{url}/health")
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)
                waited = True
                continue
            if waited:  # else it may have been ready long ago
                engine["ready_s"] = round(time.time() - engine["began"], 1)
                self._file.write_text(json.dumps(self.known, indent=1))
                print(f"{name} answers, {engine['ready_s']} s after its start", flush=True)
            return url
        tail = Path(engine["log"]).read_text("utf-8", "replace").splitlines()[-40:]
        raise SystemExit("\n".join([f"{name} did not start:", *tail]))

    def stop(self, name: str) -> None:
        engine = self.known.pop(name, None)
        if engine is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if not alive(engine["pid"]):
                break
            os.killpg(engine["pid"], sign)
            deadline = time.monotonic() + 10
            while alive(engine["pid"]) and time.monotonic() < deadline:
                time.sleep(0.1)
        self._file.write_text(json.dumps(self.known, indent=1))


def alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a child of ours that has ended goes away
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def get(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=300) as answer:
        return str(answer.read().decode())


def counters(url: str) -> dict[str, float]:
    """Sums over all engines of the counters that tell what a run did, by name and the part of a step."""
    found: dict[str, float] = {}
    wanted = r"^((?:vllm:(?:num_preemptions|prompt_tokens|generation_tokens)_total"
    wanted += r"|microvllm:\w+_total))(?:\{(.*?)\})? (\S+)$"
    for name, labels, value in re.findall(wanted, get(f"{url}/metrics"), re.MULTILINE):
        part = re.search(r'part="(\w+)"', labels)
        key = f"{name}[{part[1]}]" if part else name
        found[key] = found.get(key, 0.0) + float(value)
    return found


# ---- measuring ------------------------------------------------------------------------------------------


class Client:
    """A running scripts/gpu/load_client.py."""

    def __init__(self, site: str, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "load_client.py")],
            env={**os.environ, **VLLM_ENVIRONMENT, "PYTHONPATH": site},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "client.err").open("w"),
            text=True,
        )

    def run(self, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**job, "log": str(self._folder / "client.log")}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the client ended:\n{(self._folder / 'client.err').read_text()[-3000:]}")
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            raise SystemExit(f"the client failed:\n{result['error']}")
        return result

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(row: Row, urls: dict[str, str], client: Client, models: Path) -> list[dict[str, Any]]:
    """All rounds of a row, the engines in turn. Raises `SystemExit` for a run that fell short of its work."""

    def drive(engine: str, seed: int, **change: Any) -> dict[str, Any]:
        if row.offline:
            tiny = {"tiny": True} if change else {}
            answer: dict[str, Any] = json.loads(get(f"{urls[engine]}/run", {"seed": seed, **tiny}))
            return answer
        return client.run(
            **{
                **{"url": urls[engine], "model": row.model, "tokenizer": str(models / row.model)},
                **{"input": row.input, "output": row.output, "ratio": row.ratio, "prompts": row.prompts},
                **{"concurrency": row.concurrency, "clients": row.clients, "seed": seed},
                **change,
            }
        )

    for engine in urls:  # whatever is compiled or allocated at the first use
        drive(engine, 99, output=32, prompts=row.concurrency)
    runs = []
    for turn in range(row.rounds):
        for engine, url in urls.items():
            before = {} if row.offline else counters(url)
            result = drive(engine, turn)
            after = {} if row.offline else counters(url)
            result |= {"engine": engine, "round": turn}
            result["counters"] = {key: value - before.get(key, 0.0) for key, value in after.items()}
            if result["failed"] or result["tokens"] != result["asked"]:
                raise SystemExit(
                    f"{row.name}, {engine}: {result['failed']} requests failed, {result['tokens']} tokens "
                    f"came of {result['asked']} that were asked for"
                )
            runs.append(result)
            extra = "".join(f", {key} {result[key]:.2f}" for key in ("tpot_ms", "ttft_ms") if key in result)
            print(
                f"{row.name} round {turn + 1} {engine:10} {result['tok_s']:9,.1f} tok/s, {result['tokens']} "
                f"tokens in {result['seconds']:.2f} s{extra}, preemptions "
                f"{result['counters'].get('vllm:num_preemptions_total', 0):.0f}",
                flush=True,
            )
    speed = {engine: [run["tok_s"] for run in runs if run["engine"] == engine] for engine in urls}
    ratio = statistics.median(speed["microvllm"]) / statistics.median(speed["vllm"])
    print(f"{row.name}: {ratio:.3f} times vLLM", flush=True)
    return runs


def command_measure(args: argparse.Namespace, engines: Engines) -> None:
    """Each row's result goes to the file as soon as it is there; what is in it is not measured again."""
    results = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    client = Client(args.site, args.folder)
    for name in args.names:
        if name in results["rows"]:
            continue
        row = ROWS[name]
        suffix = "-offline" if row.offline else ""
        needed = {engine: f"{engine}{suffix}:{row.model}" for engine in ("microvllm", "vllm")}
        for engine in needed.values():
            engines.start(engine)
        urls = {kind: engines.wait(engine) for kind, engine in needed.items()}
        together = sorted(key for key, engine in engines.known.items() if alive(engine["pid"]))
        runs = measure(row, urls, client, args.models)
        results["machine"] = machine(args.site)
        results["rows"][name] = {
            "row": vars(row),
            "config": json.loads((args.models / row.model / "config.json").read_text()),
            "runs": runs,
            "commands": {kind: engines.known[engine]["command"] for kind, engine in needed.items()},
            "ready_s": {kind: engines.known[engine].get("ready_s") for kind, engine in needed.items()},
            "on_the_gpu": together,
        }
        args.out.write_text(json.dumps(results))
    client.close()


def command_prepare(args: argparse.Namespace) -> None:
    tokenizer = next(iter(args.configs.parent.rglob("tokenizer.json")), None)
    for model in args.names or KV_BYTES:
        command = [sys.executable, str(HERE / "write_checkpoint.py"), str(args.configs / model)]
        command += [str(args.models / model), *(["--tokenizer", str(tokenizer)] if tokenizer else [])]
        subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("prepare", "start", "measure", "stop", "table"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / "microvllm-compare"
    parser.add_argument("--folder", type=Path, default=folder, help="for logs, and what is running")
    parser.add_argument("--models", type=Path, default=folder / "models", help="the checkpoints")
    parser.add_argument("--configs", type=Path, help="folders of configurations")
    parser.add_argument("--site", default="", help="where vLLM is installed: its PYTHONPATH")
    parser.add_argument("--out", type=Path, help="the results")
    args = parser.parse_intermixed_args()
    if args.command == "table":
        print(markdown([json.loads(Path(name).read_text()) for name in args.names]))
        return
    if args.command == "prepare":
        command_prepare(args)
        return
    engines = Engines(args.folder, args.models, args.site)
    if args.command == "start":
        for name in args.names:
            engines.start(name)
    elif args.command == "stop":
        for name in args.names or list(engines.known):
            engines.stop(name)
    else:
        unknown = [name for name in args.names if name not in ROWS]
        if unknown or args.out is None:
            parser.error(f"measure needs --out and rows of {', '.join(ROWS)}, not {unknown}")
        command_measure(args, engines)


if __name__ == "__main__":
    main()
