"""Mistral Small 3.1 and Ministral 3 as published: the text part of a model that also reads images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from microvllm.adapters.families import ministral3, mistral
from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields, shorten
from microvllm.adapters.files.hf_config import text_part
from microvllm.adapters.spec import ModelSpec

READERS: Mapping[str, Callable[[Fields], ModelSpec]] = {
    "mistral": mistral.from_hf,
    "ministral3": ministral3.from_hf,
}


def from_hf(config: Fields) -> ModelSpec:
    """Describe the language model, of one of the families `READERS`, from the folder's `config.json`."""
    text = text_part(config)
    kind = text.text("model_type", "mistral")
    if kind not in READERS:
        raise text.error("model_type", f"must be one of {', '.join(READERS)}, got {shorten(kind)}")
    return msgspec.structs.replace(READERS[kind](text), architecture="mistral3")


FAMILY = Family("mistral3", "Mistral3ForConditionalGeneration", from_hf)
