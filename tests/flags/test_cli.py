"""The commands as processes: help, exit status, progress and signals."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cli_case import DEMO, get_command, own_flags
from http_tools import held_port
from process_tools import alive, wait_until
from typer.testing import CliRunner

from microvllm import cli
from microvllm.openai_compat import server
from microvllm.openai_compat.flags.progress import ProgressLine
from microvllm.runtime.errors import EngineError
from microvllm.runtime.options.flag import SECTIONS

MICROVLLM = str(Path(sys.executable).with_name("microvllm"))
AT_ONCE_S = 30.0  # of processor time; one or two of them, or five where modules have to be compiled first


def start(*argv: str, **env: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs the console script in a process of its own; the seconds are processor time.

    A busy machine must not fail a test, so "at once" is measured in work done and the timeout is long.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [MICROVLLM, *argv],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env=os.environ | env,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_console_script() -> None:
    result, seconds = start("serve", "/no/such/model")
    assert (result.returncode, result.stdout) == (2, "")
    assert "/no/such/model" in result.stderr and result.stderr.count("\n") == 2
    assert seconds < AT_ONCE_S


def test_commands_need_no_asserts_and_no_docstrings() -> None:
    """With both compiled away: no check may be one, no command may need the others."""
    wrong = {
        "--model": ["serve", "--modle", "x"],
        "--port": ["serve", "x", "--port", "70000"],
        "--gpu-memory-utilization": ["serve", "x", "--gpu-memory-utilization", "nan"],
        "/no/such/model": ["serve", "/no/such/model"],
    }
    code = f"from microvllm import cli\nfor argv in {list(wrong.values())}: print(cli.run(argv))"
    command = [sys.executable, "-OO", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.split() == ["2"] * 4
    causes, hints = result.stderr.splitlines()[::2], result.stderr.splitlines()[1::2]
    assert len(hints) == 4 and all(line.startswith("microvllm: hint: ") for line in hints)
    assert all(name in line for name, line in zip(wrong, causes, strict=True))


@pytest.mark.model
def test_a_taken_port_is_known_before_the_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result, seconds = start("serve", "--model", DEMO, "--port", str(port))
    assert result.returncode == 2 and str(port) in result.stderr and result.stderr.count("\n") == 2
    assert "Loading" not in result.stdout + result.stderr
    assert seconds < AT_ONCE_S


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    result, seconds = start("serve", "--help")
    assert result.returncode == 0 and seconds < AT_ONCE_S
    for flag in own_flags():
        assert flag in result.stdout
    code = (
        "import sys; from microvllm import cli; status = cli.run(['serve', '--help'])\n"
        "print(status, sorted({'torch', 'transformers', 'numpy', 'starlette'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert result.stdout.endswith("0 []\n")


def test_help_explains_the_backends() -> None:
    text = " ".join(CliRunner().invoke(cli.app, ["serve", "--help"]).output.split())
    for words in ("cpu, our kernels in C", "torch, PyTorch's own operators", "auto, cpu where"):
        assert words in text


@pytest.mark.parametrize("command", ["serve", "generate", "run-batch", "chat", "complete", "bench serve"])
def test_help_shows_no_type_of_python(command: str) -> None:
    text = CliRunner().invoke(cli.app, [*command.split(), "--help"]).output
    assert text.startswith("Usage: ") and not re.findall(r"\[\[|<Any>|list\[", text)


def test_help_is_in_sections_and_names_each_flag_once() -> None:
    text = CliRunner().invoke(cli.app, ["serve", "--help"]).output
    titles = re.findall(r"^(\w[\w ]*):$", text, re.M)
    assert titles[:3] == ["Arguments", "Model", "Requests and answers"] and titles[-1] == "Options"
    listed = re.findall(r"^  (?:-\w, )?(--[a-z-]+)(?: / (--[a-z-]+))?", text, re.M)
    flags = [flag for pair in listed for flag in pair if flag]
    assert sorted(flags) == sorted({*flags, *own_flags(), "--help"})
    own = set(own_flags().values())
    params = get_command(cli.app).commands["serve"].params  # type: ignore[attr-defined]
    known = {param.name for param in params if getattr(param, "rich_help_panel", None) in SECTIONS}
    assert len(known & own) > 60
    assert own - known == {"config", "ignore_unsupported_flags", "fail_on_environ_validation"}


@pytest.mark.parametrize(
    ("word", "there", "absent"),
    [
        ("max-num", "--max-num-seqs", "--port"),
        ("--max_num_seqs", "--max-num-seqs", "--max-num-batched-tokens"),
        ("Server", "--port", "--max-num-seqs"),
        ("all", "--port", "--no-such-flag"),
    ],
)
def test_help_of_a_word_is_about_it_alone(word: str, there: str, absent: str) -> None:
    text = CliRunner().invoke(cli.app, ["serve", f"--help={word}"]).output
    assert re.search(rf"^  {there} ", text, re.M) and not re.search(rf"^  {absent} ", text, re.M)


def test_help_of_a_word_that_is_nowhere_names_the_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--help=no-such-word"]) == 2
    assert (
        "--help=no-such-word" in (lines := capsys.readouterr().err) and ", Scheduling and KV cache, " in lines
    )


def test_without_arguments_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    out, err = capsys.readouterr()
    assert "Usage: microvllm" in out and "collect-env" in out and err == ""


def test_version_and_help() -> None:
    runner = CliRunner()
    assert re.fullmatch(r"microvllm \d+\.\d+\.\d+\n", runner.invoke(cli.app, ["--version"]).output)
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0 and "serve" in result.output and "generate" in result.output
    assert "--max-tokens" in runner.invoke(cli.app, ["generate", "--help"]).output


def test_an_engine_that_fails_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineError("the engine process ended with signal 9")

    monkeypatch.setattr(server, "serve", fail)
    assert cli.run(["serve", "m"]) == 1
    cause, hint = capsys.readouterr().err.splitlines()
    assert cause == "microvllm: error: the engine process ended with signal 9"
    assert "`microvllm collect-env`" in hint


def test_a_library_that_cannot_be_loaded_is_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("libtorch_cpu.so: failed to map segment", name="torch._C")

    monkeypatch.setattr(server, "serve", fail)
    assert cli.run(["serve", "m"]) == 1
    cause, hint = capsys.readouterr().err.splitlines()
    assert cause == "microvllm: error: torch._C cannot be loaded: libtorch_cpu.so: failed to map segment"
    assert "ulimit -v" in hint


def test_what_the_options_come_to_is_written_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(*_: object, **__: object) -> None:
        for name in ("microvllm.config", "microvllm.config", "microvllm.engine", "microvllm.engine"):
            logging.getLogger(name).warning("of %s", name)

    monkeypatch.setattr(server, "serve", warn)
    assert cli.run(["serve", "m"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"microvllm: warning: of microvllm.{name}" for name in ("config", "engine", "engine")]


@pytest.mark.parametrize(
    ("argv", "buffered"),
    [("collect-env", False), ("--help", False), ("--help", True), ("--version", True)],
    ids=lambda value: {True: "at-exit", False: "at-once"}.get(value, value),
)
def test_a_reader_that_is_gone_ends_a_command_quietly(argv: str, buffered: bool) -> None:
    """With a buffer the failure comes with the last flush, without one in the middle of the command."""
    reader, writer = os.pipe()
    os.close(reader)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    result = subprocess.run([MICROVLLM, argv], stdout=writer, stderr=subprocess.PIPE, timeout=300, env=env)
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_full_disk_behind_stdout_is_two_lines() -> None:
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run([MICROVLLM, "--version"], stdout=full, stderr=subprocess.PIPE, timeout=300)
    cause, hint = result.stderr.decode().splitlines()
    assert result.returncode == 2 and "hint: " in hint
    assert cause == "microvllm: error: the output cannot be written: No space left on device"


def test_load_progress_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine() as progress:
        for done in range(1, 101):
            progress("Loading weights", done, 100)
        progress("Nothing", 0, 0)
        for done in range(3):
            progress("Capturing CUDA graphs", done, 3)
        progress("Capturing CUDA graphs", 3, 3, "Captured 3 graphs in 4.2 s, 1.1 GB")
        progress("Warming up", 0, 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        *(f"microvllm: Loading weights: {share} %" for share in (25, 50, 75, 100)),
        *(f"microvllm: Capturing CUDA graphs: {share} %" for share in (0, 25, 50)),
        "microvllm: Captured 3 graphs in 4.2 s, 1.1 GB",
        "microvllm: Warming up ...",
    ]


def test_load_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with ProgressLine() as progress:
        progress("Loading weights", 1, 2)
        progress("Loading weights", 2, 2)
        progress("Capturing CUDA graphs", 0, 35)
        progress("Capturing CUDA graphs", 34, 35)
        progress("Capturing CUDA graphs", 35, 35, "Captured 35 graphs in 4.2 s, 1.1 GB")
    shown = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    lines = [line for line in re.split("[\r\n]", shown) if line.strip()]
    assert re.match(
        r"Loading weights .* 2/2 100 % 0:\d\d:\d\d", [line for line in lines if "weights" in line][-1]
    )
    assert re.match(r"Captured 35 graphs in 4.2 s, 1.1 GB .* 35/35 100 % 0:\d\d:\d\d", lines[-1])


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads_ends_everything(number: signal.Signals) -> None:
    port = held_port()
    process = subprocess.Popen(
        [MICROVLLM, "serve", "--model", DEMO, "--port", str(port.getsockname()[1])],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        # It has a handler an instant after it has started the engine; before, SIGTERM ends it like any other.
        wait_until(lambda: catches(process.pid, signal.SIGTERM), "there is an engine process, and a handler")
        engine = children(process.pid)
        assert engine
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
    finally:
        port.close()
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    wait_until(lambda: not any(map(alive, engine)), "the engine process is gone")


@pytest.mark.model
def test_generate_streams_to_the_terminal() -> None:
    argv = (
        "generate",
        "The capital of France is",
        "--model",
        DEMO,
        "--max-tokens",
        "8",
        "--temperature",
        "0",
    )
    result, _ = start(*argv, "--stop", ".", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == " Paris\n"
