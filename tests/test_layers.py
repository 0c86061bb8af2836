"""The house rules that a reader relies on, checked over the syntax tree of every file of the package."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from model_tools import load_script

ROOT = Path(__file__).resolve().parent.parent
# From the top down: a module imports from its own layer and from those after it.
LAYERS = ("cli", "openai_compat", "runtime", "adapters", "ops")
MAX_LINES = 500
CORE_PATH_LINES, CORE_PATH_FILES = 2300, 16
# What may import torch in runtime/, even within a function: what computes.
TORCH_ROOMS = ("microvllm.runtime.worker.", "microvllm.runtime.engine")
NEEDS_RAY = "microvllm.openai_compat.ray_serve"  # which the tests do not install
REPORTS_TORCH = "microvllm.runtime.collect_env"  # `collect-env` prints torch's own report
# What may import torch or transformers when it is imported: what computes, or runs an engine in the caller's
# process.
HEAVY = (
    "microvllm.runtime.worker",
    "microvllm.runtime.engine",
    "microvllm.runtime.offline.beams",
    "microvllm.runtime.offline.llm",
    "microvllm.runtime.offline.pooling",
    "microvllm.runtime.text.hf_tokenizer",
    "microvllm.adapters.files.checkpoints",
    "microvllm.adapters.formats",
    "microvllm.adapters.decoder",
    "microvllm.adapters.head",
    "microvllm.adapters.rotary",
    "microvllm.adapters.taken_weights",
    "microvllm.adapters.weights",
    "microvllm.ops",
)


def package_files() -> dict[str, Path]:
    """Module name -> file, for all that is installed."""
    files = [ROOT / "__init__.py", ROOT / "__main__.py", ROOT / "cli.py"]
    for layer in LAYERS[1:]:
        files += sorted((ROOT / layer).rglob("*.py"))
    modules = {}
    for file in files:
        parts = ["microvllm", *file.relative_to(ROOT).with_suffix("").parts]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


MODULES = package_files()


@functools.cache
def tree_of(module: str) -> ast.Module:
    """In a test, not at import: every process of a test run imports this file, and one runs it."""
    return ast.parse(MODULES[module].read_text("utf-8"), str(MODULES[module]))


@functools.cache
def imports_of(module: str, *, at_import_only: bool = False) -> list[tuple[int, str]]:
    return list(imports(tree_of(module), at_import_only=at_import_only))


def imports(tree: ast.AST, *, at_import_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of each import; `from microvllm.a import b` gives `microvllm.a.b` if that is a module.

    With `at_import_only` function bodies and `if TYPE_CHECKING:` are left out: what runs on import.
    A relative import gives a name that begins with a dot.
    """
    for node in ast.iter_child_nodes(tree):
        if at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(ast.Module([other], []), at_import_only=True)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if name in MODULES else base
        yield from imports(node, at_import_only=at_import_only)


def layer_of(module: str) -> int | None:
    """Position in LAYERS; None for the package itself (its version, its lazy names)."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else None


def upward(module: str, imported: Iterable[tuple[int, str]]) -> list[str]:
    own = layer_of(module)
    found = []
    for line, target in imported:
        if target.split(".")[0] == "microvllm" and own is not None:
            other = layer_of(target)
            if other is not None and other < own:
                found.append(f"{module}:{line} imports {target}")
    return found


def imported_by(module: str) -> dict[str, str]:
    """Each module that importing `module` imports in turn, ours and others -> the chain that leads there."""
    chains = {module: module}
    queue = [module]
    while queue:
        current = queue.pop()
        for _, target in imports_of(current, at_import_only=True):
            # Importing a.b.c runs a and a.b first.
            parts = target.split(".")
            for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                if name not in chains:
                    chains[name] = f"{chains[current]} -> {name}"
                    if name in MODULES:
                        queue.append(name)
    return chains


def test_every_module_is_seen() -> None:
    assert {
        "microvllm",
        "microvllm.cli",
        "microvllm.runtime.core.scheduler",
        "microvllm.adapters.spec",
    } <= MODULES.keys()
    assert len(MODULES) > 15


def test_imports_are_absolute_and_go_down() -> None:
    everything = [(module, *found) for module in MODULES for found in imports_of(module)]
    relative = [f"{module}:{line}" for module, line, target in everything if target.startswith(".")]
    assert not relative
    assert not [found for module in MODULES for found in upward(module, imports_of(module))]


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of the graph as a list of one line, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def test_no_import_cycle() -> None:
    """Nor with imports of types alone or within functions: a reader follows those, too."""
    graph = {module: {target for _, target in imports_of(module) if target in MODULES} for module in MODULES}
    assert not cycles(graph)


def test_no_include_cycle() -> None:
    files = {file.name: file.read_text("utf-8") for file in (ROOT / "ops" / "cpu").glob("*.[ch]")}
    graph = {name: set(re.findall(r'^#include "(.+)"', text, re.MULTILINE)) for name, text in files.items()}
    assert all(included in files for others in graph.values() for included in others)
    assert not cycles(graph)


def importers(names: set[str], layers: Collection[int]) -> list[str]:
    """The modules of these layers that import one of the packages anywhere, even inside a function."""
    own = [module for module in MODULES if layer_of(module) in layers]
    return [module for module in own if names & {target.split(".")[0] for _, target in imports_of(module)}]


def test_torch_stays_in_its_rooms() -> None:
    found = importers({"torch"}, [LAYERS.index("runtime")])
    assert found
    assert not [name for name in found if not name.startswith(TORCH_ROOMS) and name != REPORTS_TORCH]


def test_the_core_path_stays_readable() -> None:
    """What a reader should read first: it may shrink, and grows only with a reason in the same commit."""
    path = load_script("count_lines").core_path(ROOT)
    assert sum(path.values()) <= CORE_PATH_LINES and len(path) <= CORE_PATH_FILES, path


def light_modules() -> list[str]:
    return [name for name in MODULES if not name.startswith(HEAVY)]


def test_heavy_rooms_exist() -> None:
    assert all(any(name.startswith(room) for name in MODULES) for room in HEAVY)


def test_no_torch_on_import() -> None:
    for module in light_modules():
        chains = imported_by(module)
        assert not [chains[heavy] for heavy in ("torch", "transformers") if heavy in chains]


def test_no_torch_in_the_api_process() -> None:
    """The same for what other packages import: all these modules together, in a fresh interpreter."""
    names = sorted(name for name in light_modules() if layer_of(name) is not None and name != NEEDS_RAY)
    code = (
        f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_engine_knows_no_http() -> None:
    assert not importers({"starlette", "uvicorn", "httptools", "h11"}, range(2, len(LAYERS)))
    assert importers({"starlette"}, [1])


def test_the_http_layer_never_imports_torch() -> None:
    assert not importers({"torch", "pydantic", "fastapi"}, [1])


def forbidden(tree: ast.AST) -> list[str]:
    """`assert` is gone under `python -O`; pickle, eval and exec run what a file or a client sends."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(f"line {node.lineno}: assert")
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("eval", "exec")
        ):
            found.append(f"line {node.lineno}: {node.func.id}")
        elif isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node) == "torch.load":
            found.append(f"line {node.lineno}: torch.load")
    for line, target in imports(tree):
        unpickle = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing.connection")
        if target.split(".")[0] in unpickle or target in unpickle:
            found.append(f"line {line}: import {target}")
    return found


def test_no_assert_no_pickle_no_eval() -> None:
    assert not {module: found for module in MODULES if (found := forbidden(tree_of(module)))}


def test_a_file_can_be_read_in_one_sitting() -> None:
    lines = {module: len(file.read_text("utf-8").splitlines()) for module, file in MODULES.items()}
    assert not {module: count for module, count in lines.items() if count > MAX_LINES}


def test_the_checks_see_what_they_are_for() -> None:
    """Each check above finds a planted fault."""
    parse = ast.parse
    within = imports(parse("def f():\n    from microvllm.runtime import errors\n"))
    assert upward("microvllm.ops.linear", within)
    assert upward("microvllm.runtime.engine", imports(parse("import microvllm.openai_compat.server")))
    down = imports(parse("from microvllm.adapters.spec import ModelSpec"))
    assert not upward("microvllm.runtime.engine", down)
    assert [target for _, target in imports(parse("from . import x"))] == ["."]
    lazy = parse("def f():\n    import torch\nif TYPE_CHECKING:\n    import numpy\nelse:\n    import json\n")
    assert [target for _, target in imports(lazy, at_import_only=True)] == ["json"]
    assert [target for _, target in imports(lazy)] == ["torch", "numpy", "json"]
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a -> b -> c -> a"]
    assert not cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    for source in (
        "assert x",
        "import pickle",
        "from pickle import loads",
        "import multiprocessing.connection",
        "eval('1')",
        "torch.load(f)",
    ):
        assert forbidden(parse(source)), source
    assert not forbidden(parse("model.eval()"))
