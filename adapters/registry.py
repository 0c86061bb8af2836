"""Lists the model families, and reads the `ModelSpec` of a path by its architecture.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from microvllm.adapters.errors import ModelFileError, OverrideError, unreadable
from microvllm.adapters.families import (
    deepseek_v3,
    ernie4_5_moe,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    granite_hybrid,
    lfm2,
    llama,
    minimax_m2,
    ministral3,
    mistral,
    mistral3,
    mixtral,
    nemotron_h,
    olmo3,
    olmoe,
    phi3,
    qwen,
    qwen2,
    qwen3,
    qwen_moe,
    qwen_next,
    seed_oss,
    smollm3,
)
from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields, shorten
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.files.hf_config import read_json
from microvllm.adapters.files.overrides import override, unread
from microvllm.adapters.files.pooling import folder_pooling, gguf_pooling, headless, headless_folder
from microvllm.adapters.files.quantization import KEY as QUANTIZATION_KEY
from microvllm.adapters.files.quantization import Quantization, read_method, read_quantization
from microvllm.adapters.pooling_spec import Pooling
from microvllm.adapters.spec import ModelSpec

FLAG = "--hf-overrides"

FAMILIES = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    *gemma4.FAMILIES,
    phi3.FAMILY,
    smollm3.FAMILY,
    granite.FAMILY,
    granite_hybrid.FAMILY,
    seed_oss.FAMILY,
    glm4.FAMILY,
    olmo3.FAMILY,
    ministral3.FAMILY,
    mistral3.FAMILY,
    mixtral.FAMILY,
    qwen_moe.QWEN2,
    qwen_moe.QWEN3,
    glm4_moe.FAMILY,
    minimax_m2.FAMILY,
    ernie4_5_moe.FAMILY,
    olmoe.FAMILY,
    gpt_oss.FAMILY,
    *qwen_next.FAMILIES,
    *lfm2.FAMILIES,
    nemotron_h.FAMILY,
    deepseek_v3.DEEPSEEK_V3,
    deepseek_v3.GLM4_MOE_LITE,
)
BY_NAME: Mapping[str, Family] = {family.name: family for family in FAMILIES}
# The class in `architectures` decides; `model_type` if there is none.
BY_CLASS: Mapping[str, Family] = {family.hf_class: family for family in FAMILIES}
# Models that were saved without a head, as embedding models often are.
BY_HEADLESS_CLASS: Mapping[str, Family] = {
    family.hf_class.replace("ForCausalLM", "TextModel" if family.name.endswith("_text") else "Model"): family
    for family in FAMILIES
}
BY_GGUF_NAME: Mapping[str, Family] = {family.gguf_name: family for family in FAMILIES if family.from_gguf}


def load_spec(model: Path, overrides: Mapping[str, Any] | None = None, runner: str = "generate") -> ModelSpec:
    """Read what the model is from a Hugging Face folder (`config.json`) or from one GGUF file.

    `overrides` replace values of config.json. `runner`: "generate", "pooling" for a model without its head,
    which makes vectors, or "auto", which the model's files decide.

    Only the JSON and the GGUF header are read: no weights, and never code that comes with the model.
    Raises `ModelFileError` naming the file and the key.
    """
    try:
        if model.is_dir():
            return _from_folder(model, overrides or {}, runner)
        if overrides:
            raise OverrideError(
                model, f"{FLAG} replaces values of config.json, which a GGUF file does not have"
            )
        return _from_file(model, runner)
    except OSError as error:  # no permission, a name that is too long, a loop of links, ...
        raise unreadable(error.filename or model, error) from None


def _from_file(model: Path, runner: str) -> ModelSpec:
    if not model.exists():
        raise ModelFileError(model, "no such file or folder")
    if not model.is_file():  # opening a pipe would block indefinitely
        raise ModelFileError(model, "is neither a folder nor a regular file")
    if model.suffix == ".safetensors":
        raise ModelFileError(model, "holds only weights; give the folder that also holds config.json")
    file = GGUFFile(model)
    family = BY_GGUF_NAME.get(file.architecture)
    if family is None or family.from_gguf is None:
        supported = ", ".join(BY_GGUF_NAME)
        raise ModelFileError(
            model, f"general.architecture is {shorten(file.architecture)}; supported are {supported}"
        )
    spec = family.from_gguf(file)
    pooling = None if runner == "generate" else gguf_pooling(file)
    if pooling is None and runner == "pooling":
        pooling = Pooling()
    return spec if pooling is None else headless(spec, pooling)


def _from_folder(folder: Path, overrides: Mapping[str, Any], runner: str) -> ModelSpec:
    path = folder / "config.json"
    if not path.exists():
        gguf = sorted(folder.glob("*.gguf"))
        hint = f"; give the path of {gguf[0].name} in it as the model" if gguf else ""
        raise ModelFileError(path, f"no such file, so the folder is not a Hugging Face model{hint}")
    config = Fields(path, override(read_json(path), overrides))
    try:
        family, without_head = _family(config)
        spec = msgspec.structs.replace(family.from_hf(config), quantization=_quantization(folder, config))
        if without_head and runner == "generate":
            raise config.error("architectures", "names a model without a head, which cannot generate")
        pooling = None if runner == "generate" else folder_pooling(folder)
        if pooling is None and (without_head or runner == "pooling"):
            pooling = Pooling()
        if pooling is not None:
            spec = headless_folder(spec, pooling, folder, config)
    except ModelFileError as error:
        if overrides:
            raise OverrideError(path, f"{error.problem} (as changed by {FLAG})") from None
        raise
    if ignored := unread(overrides, config.read):
        raise OverrideError(path, f"{FLAG}: {ignored[0]} is no key that a {spec.architecture} model has here")
    return spec


def _quantization(folder: Path, config: Fields) -> Quantization | None:
    """From config.json, or else from the file that ModelOpt wrote before config.json had a key for it."""
    path = folder / "hf_quant_config.json"
    if QUANTIZATION_KEY in config or not path.exists():
        return read_quantization(config)
    return read_method(Fields(path, {"quant_method": "modelopt", **read_json(path)}))


def _family(config: Fields) -> tuple[Family, bool]:
    """The family, and whether the class is that of the model without its head."""
    classes = config.get("architectures")
    model_type = config.text("model_type", "")
    if classes is None or classes == []:
        if not model_type:
            raise config.error("architectures", f"is missing; supported are those of {', '.join(BY_NAME)}")
        if model_type not in BY_NAME:
            raise config.error("model_type", f"is {shorten(model_type)}; supported are {', '.join(BY_NAME)}")
        return BY_NAME[model_type], False
    if not isinstance(classes, list) or not isinstance(classes[0], str):
        raise config.error("architectures", "must be a list of class names")
    family = BY_CLASS.get(classes[0]) or BY_HEADLESS_CLASS.get(classes[0])
    if family is None:
        raise config.error(
            "architectures", f"names {shorten(classes[0])}; supported are those of {', '.join(BY_NAME)}"
        )
    if model_type in BY_NAME and model_type != family.name:
        raise config.error("model_type", f"is {shorten(model_type)}, but architectures names {classes[0]}")
    return family, classes[0] not in BY_CLASS
