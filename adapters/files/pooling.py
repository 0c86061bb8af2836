"""Reads how a checkpoint makes a vector of a text, as sentence-transformers stores it. Imports no torch.

`modules.json` lists what is applied in turn: the transformer, a pooling, which has a folder of its own
(`1_Pooling/config.json`), and a normalisation. Dense layers behind them are not computed here and refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.fields import Fields, shorten
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.hf_config import read_json, read_values
from microvllm.adapters.pooling_spec import Pooling, PoolingMethod
from microvllm.adapters.spec import ModelSpec

MODULES = "modules.json"
TEXT_SETTINGS = "sentence_bert_config.json"
# Names of sentence-transformers behind "pooling_mode_", and since version 5.3 as values of "pooling_mode".
METHODS: dict[str, PoolingMethod] = {
    "lasttoken": "last",
    "mean_tokens": "mean",
    "mean": "mean",
    "cls_token": "first",
    "cls": "first",
}
GGUF_METHODS: tuple[PoolingMethod | None, ...] = (None, "mean", "first", "last")  # llama.cpp's numbers


def folder_pooling(folder: Path) -> Pooling | None:
    """Return the pooling that a folder stores, or None. Raises `ModelFileError` naming the key at fault."""
    path = folder / MODULES
    if not path.exists():
        return None
    modules = read_values(path)
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise ModelFileError(path, "must hold a list of objects")
    kinds = [str(each.get("type")).rpartition(".")[2] for each in modules]
    if "Pooling" not in kinds:
        return None
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelFileError(path, f"lists a module {shorten(kind)}, which is not supported")
    place = modules[kinds.index("Pooling")].get("path")
    if not isinstance(place, str) or not place or Path(place).name != place:
        raise ModelFileError(
            path, f"path of the module Pooling must be a folder's name, got {shorten(place)}"
        )
    return Pooling(method=_method(folder / place / "config.json"), normalize="Normalize" in kinds)


def gguf_pooling(file: GGUFFile) -> Pooling | None:
    """Return the pooling of a GGUF file; None for a model that generates. Raises as `folder_pooling` does."""
    key = f"{file.architecture}.pooling_type"
    number = file.metadata.get(key, 0)
    if number not in range(len(GGUF_METHODS)):
        raise ModelFileError(file.path, f"{key} {shorten(number)} is not supported")
    method = GGUF_METHODS[number]
    return None if method is None else Pooling(method=method)


def headless(spec: ModelSpec, pooling: Pooling) -> ModelSpec:
    """The model without its head, for vectors."""
    return msgspec.structs.replace(spec, pooling=pooling, tie_embeddings=True)


def headless_folder(spec: ModelSpec, pooling: Pooling, folder: Path, config: Fields) -> ModelSpec:
    """The same for a folder's model, of texts of the length that sentence-transformers cuts at."""
    sizes = config.get("matryoshka_dimensions")
    if sizes is not None and not (isinstance(sizes, list) and all(type(size) is int for size in sizes)):
        raise config.error("matryoshka_dimensions", "must be a list of integers")
    matryoshka = tuple(sizes) if sizes else () if config.flag("is_matryoshka") else None
    spec = headless(spec, msgspec.structs.replace(pooling, matryoshka=matryoshka))
    path = folder / TEXT_SETTINGS
    if not path.exists():
        return spec
    settings = Fields(path, read_json(path))
    if settings.flag("do_lower_case"):
        raise settings.error("do_lower_case", "is true, which is not supported")
    longest = settings.size("max_seq_length", spec.max_position)
    return msgspec.structs.replace(spec, max_position=min(longest, spec.max_position))


def _method(path: Path) -> PoolingMethod:
    values = read_json(path)
    named = values.get("pooling_mode")
    chosen: Iterable[Any]
    if named is not None:
        chosen = named if isinstance(named, list) else [named]
    else:
        prefix = "pooling_mode_"
        chosen = [key.removeprefix(prefix) for key in values if key.startswith(prefix) and values[key]]
    names = [str(name) for name in chosen]
    if len(names) != 1 or names[0] not in METHODS:
        raise ModelFileError(
            path, f"pooling_mode {shorten(', '.join(names))} is not supported: lasttoken, mean and cls are"
        )
    return METHODS[names[0]]
