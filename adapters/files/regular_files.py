"""Refuses what is no regular file where a file of the model belongs. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from microvllm.adapters.errors import ModelFileError

# Of the files that are read from a model's folder, here or by the tokenizer libraries.
SUFFIXES = frozenset((".json", ".jinja", ".safetensors", ".gguf", ".model", ".tiktoken", ".txt"))


def check_regular(path: Path) -> None:
    """Raises `ModelFileError` for a pipe, socket, device or folder: opening a pipe would block."""
    if path.exists() and not path.is_file():
        raise ModelFileError(path, "is not a regular file")


def check_folder(folder: Path) -> None:
    """Raises `ModelFileError` for the first entry with the name of a model's file that is none."""
    for each in sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*"))):
        if each.suffix in SUFFIXES:
            check_regular(each)
