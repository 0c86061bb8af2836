"""Reads the sampling defaults of a model from its `generation_config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.hf_config import read_json
from microvllm.runtime.errors import ConfigError, InvalidRequestError
from microvllm.runtime.options.find_model import user_path
from microvllm.runtime.request import SamplingParams
from microvllm.runtime.sampling_checks import check_sampling

# Fields of generation_config.json, and their names in `SamplingParams`.
GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_new_tokens": "max_tokens",
    "skip_special_tokens": "skip_special_tokens",
}


def generation_defaults(
    requested: str, model: Path, card: dict[str, Any], override: dict[str, Any], vocab_size: int
) -> dict[str, Any]:
    """Return the sampling defaults that `--generation-config` names, with the override put on them.

    "auto" reads the model's own, or takes `card` where there is no such file, "vllm" none, anything else is a
    folder. Also carries the file's `eos_token_id` list: models name further end tokens there (Llama 3's
    128009). A null in the override removes the model's default, as in vLLM.
    """
    file = _generation_file(requested, model)
    found = card if requested == "auto" else {}
    defaults = dict(found) if file is None else _read_generation_config(file, vocab_size)
    unknown = sorted(set(override) - {*GENERATION_FIELDS, "eos_token_id"})
    if unknown:
        raise ConfigError(
            f"--override-generation-config: {unknown[0]} is not known; it may hold "
            f"{', '.join(GENERATION_FIELDS)} and eos_token_id"
        )
    kept = {name: value for name, value in defaults.items() if name not in override}
    return {**kept, **_checked_defaults(override, "--override-generation-config", vocab_size)}


def _generation_file(requested: str, model: Path) -> Path | None:
    if requested == "vllm":
        return None
    folder = model if requested == "auto" else user_path(requested, "--generation-config")
    file = folder / "generation_config.json"
    if folder.is_dir() and file.exists():
        return file
    if requested == "auto":
        return None
    raise ConfigError(f"--generation-config {requested}: no generation_config.json there")


def _read_generation_config(file: Path, vocab_size: int) -> dict[str, Any]:
    try:
        content = read_json(file)
    except ModelFileError as error:
        raise ConfigError(str(error), remedy=error.remedy) from error
    return _checked_defaults(content, str(file), vocab_size)


def _checked_defaults(content: dict[str, Any], source: str, vocab_size: int) -> dict[str, Any]:
    """Return the known fields of a generation config, checked; `eos_token_id` becomes a list."""
    defaults = {name: content[name] for name in GENERATION_FIELDS if content.get(name) is not None}
    ends = content.get("eos_token_id")
    try:
        check_sampling(SamplingParams(**{GENERATION_FIELDS[name]: value for name, value in defaults.items()}))
    except InvalidRequestError as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        msgspec.convert(ends, int | list[int | None] | None)
    except ValueError:
        raise ConfigError(f"{source}: eos_token_id must be token ids, got {ends!r:.200}") from None
    if ends is None:
        return defaults
    known = Fields(Path(source), content).token_ids("eos_token_id", vocab_size)
    return {**defaults, "eos_token_id": list(known)}
