"""What the shell scripts for a GPU do without one: command lines, and a checkout beside another in turns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from model_tools import load_script
from process_tools import PATIENCE_S

GPU_SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts" / "gpu"


def test_the_shell_script_hands_the_comparison_over(tmp_path: Path) -> None:
    """With an interpreter that only notes its arguments, and the environment that vLLM gets."""
    log, site = tmp_path / "log", tmp_path / "vllm"
    for folder in ("bin", "vllm/vllm", "model", "wheels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "wheels" / "one.whl").touch()
    python = tmp_path / "bin" / "python3"
    python.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    python.chmod(0o755)
    script = GPU_SCRIPTS / "compare.sh"
    environment = {
        **{"PATH": f"{python.parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "OUT": "there"},
        "ENGINES": "microvllm vllm hf-generate vllm-offline",
    }
    words = [str(script), str(site), str(tmp_path / "model"), str(tmp_path / "wheels")]
    subprocess.run([*words, "--", "--workload", "single"], env=environment, check=True, timeout=PATIENCE_S)
    last = log.read_text().splitlines()[-1]
    work = tmp_path / "microvllm-compare"
    assert last == (
        f"scripts/compare.py --model {tmp_path / 'model'} --device cuda --turns halt --warmup-len 64 "
        f"--keep {work / 'models'} --kv-cache-memory-bytes 23000000000 --vllm-python {work / 'python'} "
        f"--hf-python {work / 'python'} --engine microvllm --engine vllm "
        "--engine hf-generate workloads=single,concurrent35,chat --engine vllm-offline --out there "
        "--workload single"
    )
    wrapper = (work / "python").read_text()
    assert f"PYTHONPATH='{site}' VLLM_USE_FLASHINFER_SAMPLER=0" in wrapper


def environment_of_a_run(pid: int) -> dict[str, str]:
    """What marks the processes of a run of compare.sh: its shell and when that began."""
    stat = Path(f"/proc/{pid}/stat")
    moment = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else "1"
    return {**os.environ, "MICROVLLM_COMPARE_RUN": f"{pid}.{moment}"}


def test_a_comparison_leaves_no_process_behind(tmp_path: Path) -> None:
    """Neither of its own servers, in a session of theirs, nor of a run that was killed; of others, all."""
    for folder in ("bin", "vllm/vllm", "model", "wheels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "wheels" / "one.whl").touch()
    (tmp_path / "vllm" / "env.sh").write_text("export PYTHONPATH=other OF_VLLM=1\n")
    python, started = tmp_path / "bin" / "python3", tmp_path / "started"
    python.write_text(
        "#!/bin/bash\n[[ $1 == */compare.py ]] || exit 0\n"
        f"setsid sleep 300 & disown\necho $! >{started}\n"
        """[[ $* == *"--engine vllm args='--a 1 --b'"* ]] && exit 3\n"""
    )
    python.chmod(0o755)
    left = subprocess.Popen(["sleep", "300"], env=environment_of_a_run(999_999_999))
    other = subprocess.Popen(["sleep", "300"], env=environment_of_a_run(os.getpid()))
    try:
        words = [str(GPU_SCRIPTS / "compare.sh"), *(str(tmp_path / name) for name in ("vllm", "model"))]
        environment = {
            **{"PATH": f"{python.parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)},
            **{"ENGINES": "vllm", "VLLM_ARGS": "--a 1 --b"},
        }
        ended = subprocess.run([*words, str(tmp_path / "wheels")], env=environment, timeout=PATIENCE_S)
        assert ended.returncode == 3
        assert left.wait(PATIENCE_S) == -9 and other.poll() is None
        stat = Path(f"/proc/{int(started.read_text())}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    finally:
        left.kill()
        other.kill()
        left.wait()
        other.wait()
    python.write_text('#!/bin/sh\necho "$PYTHONPATH $OF_VLLM $TRITON_CACHE_DIR $VLLM_CACHE_ROOT"\n')
    wrapper = tmp_path / "microvllm-compare" / "python"
    environment["TRITON_CACHE_DIR"] = "ours"
    found = subprocess.run([wrapper], env=environment, capture_output=True, text=True, check=True).stdout
    caches = tmp_path / "microvllm-compare" / "caches"
    assert found.split() == [str(tmp_path / "vllm"), "1", f"{caches}/triton", f"{caches}/vllm"]


def test_two_checkouts_take_turns(tmp_path: Path) -> None:
    """Each imports its own package, this one's from the checkout that the script is in."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "__init__.py").touch()
    subprocess.run(["tar", "-C", base, "-cJf", tmp_path / "base.tar.xz", "."], check=True, timeout=PATIENCE_S)
    words = ["-c", "import microvllm, os; print(os.path.realpath(microvllm.__path__[0]) == os.getcwd())"]
    command = [str(GPU_SCRIPTS / "turns.sh"), str(tmp_path / "base.tar.xz"), "2", *words]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout
    rounds = [f"== {name}, round {i}" for i in (1, 2) for name in ("base", "head")]
    assert found.splitlines() == [line for each in rounds for line in (each, "True")]


def test_a_kernel_compiles_without_a_gpu(tmp_path: Path) -> None:
    """In a process of its own: whether kernels are interpreted is decided where they are defined."""
    pytest.importorskip("triton", reason="needs the package triton (pip install triton)")
    command = [sys.executable, str(GPU_SCRIPTS / "compile_kernels.py"), "step_inputs"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    assert re.search(r"^_prepare_kernel +4 +\d+ +0 +0$", found.stdout, re.MULTILINE)


def test_a_part_that_crashes_under_the_sanitizer_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tool that only notes its arguments, and says what each part has launched."""
    pytest.importorskip("triton", reason="needs the package triton (pip install triton)")
    sanitize = load_script("gpu/sanitize")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f'#!/bin/bash\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >>{tmp_path}/log\n'
        '[[ " $* " == *" coded "* ]] && exit 1\n'
        'echo "{\\"a._kernel\\": true, \\"b._kernel\\": false}" >"${@: -1}"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sanitize.main(["coded", "rules", "--tool", "racecheck"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["coded FAILED", "rules done", "a._kernel: launched", "b._kernel: NOT LAUNCHED"]
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first.startswith("1 --tool racecheck --error-exitcode 1 ") and " coded --out " in first
    assert "--kernel-name-exclude kns=nvjet" in second and " rules --out " in second
    assert sanitize.main(["rules", "--tool", "racecheck"]) == 0, "what a part leaves out others launch"
    assert sanitize.main(["--tool", "racecheck"]) == 1
