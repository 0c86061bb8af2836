"""Writes a tokenizer as the files that `AutoTokenizer.from_pretrained` reads.

Benchmark clients load the tokenizer from what `/v1/models` names as `root`. A GGUF file and a folder with a
tiktoken vocabulary cannot be loaded that way, so for these `root` is a folder in the cache. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

from microvllm.ops.cache import cache_folders
from microvllm.runtime.text.tokenizer import TIKTOKEN_FILE, Tokenizer

logger = logging.getLogger("microvllm.tokenizer")

FORMAT = 1  # of the files; another number makes them anew
FILES = ("tokenizer.json", "tokenizer_config.json")


def loadable_path(tokenizer: Tokenizer, path: Path, model_max_length: int) -> str:
    """Return a folder from which transformers loads this tokenizer, which was read from `path`.

    A folder that transformers can read is its own answer. For any other the files are written below the
    cache, once for each state of the file; where that fails, `path` is returned and a warning is logged.
    """
    path = Path(os.path.abspath(path))
    source = path / TIKTOKEN_FILE if path.is_dir() else path
    if path.is_dir() and ((path / FILES[0]).is_file() or not source.is_file()):
        return str(path)
    problem: OSError | None = None
    try:
        for cache in cache_folders():
            try:
                return str(_cached(tokenizer, source, model_max_length, cache))
            except OSError as error:
                problem = error  # it may be full
    except OSError as error:
        problem = problem or error
    logger.warning("The tokenizer of %s cannot be kept for benchmark clients: %s", path, problem)
    return str(path)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (special tokens, chat template) into `folder`.

    Raises `OSError`.
    """
    (folder / FILES[0]).write_text(tokenizer.backend.to_str(), "utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    (folder / FILES[1]).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _cached(tokenizer: Tokenizer, source: Path, model_max_length: int, cache: Path) -> Path:
    status = source.stat()
    state = (FORMAT, str(source), status.st_size, status.st_mtime_ns, model_max_length)
    name = re.sub(r"[^\w.-]", "_", source.stem)[:64]
    parent = cache / "tokenizers"
    folder = parent / f"{name}-{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}"
    if all((folder / file).is_file() for file in FILES):
        return folder
    parent.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    try:
        write_tokenizer(tokenizer, made, model_max_length)
        made.chmod(0o755)  # a client of another user may read it
        made.rename(folder)  # in one step: whoever looks sees all of it or nothing
    except OSError:
        if not all((folder / file).is_file() for file in FILES):  # else another process was first
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
