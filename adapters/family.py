"""Defines `Family`: everything that is particular to one model family, as one record in a file of its own.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from microvllm.adapters.files.fields import Fields
from microvllm.adapters.files.gguf_file import GGUFFile
from microvllm.adapters.spec import MLPKind, ModelSpec

# Role of a tensor -> its name without ".weight" or ".bias", or the whole name and `tensors.BARE`; "{i}" is
# the layer, "{e}" the expert. These are Llama's, which most families share. One that stores q, k and v as one
# tensor has the role "qkv" in their place, one that stores gate and up as one the role "gate_up", and one
# whose experts' rows of gate and up alternate `tensors.PAIRS`.
HF_TENSORS: Mapping[str, str] = {
    "embed": "model.embed_tokens",
    "lm_head": "lm_head",
    "norm": "model.norm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "o": "model.layers.{i}.self_attn.o_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
    "mixer_norm": "model.layers.{i}.input_layernorm",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
}
GGUF_TENSORS: Mapping[str, str] = {
    "embed": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "o": "blk.{i}.attn_output",
    "sinks": "blk.{i}.attn_sinks",
    "q_norm": "blk.{i}.attn_q_norm",
    "k_norm": "blk.{i}.attn_k_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
    "router": "blk.{i}.ffn_gate_inp",
    "expert_gate": "blk.{i}.ffn_gate_exps",
    "expert_up": "blk.{i}.ffn_up_exps",
    "expert_down": "blk.{i}.ffn_down_exps",
    "shared_gate": "blk.{i}.ffn_gate_shexp",
    "shared_up": "blk.{i}.ffn_up_shexp",
    "shared_down": "blk.{i}.ffn_down_shexp",
    "shared_scale": "blk.{i}.ffn_gate_inp_shexp",
    "mixer_norm": "blk.{i}.attn_norm",
    "mlp_norm": "blk.{i}.ffn_norm",
}


def with_mlp(
    spec: ModelSpec, mlp: MLPKind, where: Callable[[int], bool] = lambda index: True, **changes: Any
) -> ModelSpec:
    """The model with this MLP, or these experts, in the layers of such numbers from 0, and these fields."""
    layers = (layer.with_parts(mlp=mlp) if where(i) else layer for i, layer in enumerate(spec.layers))
    return spec.with_layers(layers, **changes)


class Family(NamedTuple):
    """How the files of one model family are read.

    `name` is the `model_type` of config.json and becomes `ModelSpec.architecture`; `hf_class` is the class in
    `architectures`. `hf_stacked`: names that take the place of others in folders that have the experts of a
    layer in one tensor; `hf_unused`: beginnings of names that are left out on purpose ("{n}": the number of
    layers). A family without `from_gguf` has no GGUF files; `gguf_name` is their `general.architecture`.
    `gguf_interleaved`: these files store the rows of q and k with the two halves of each head interleaved, so
    that neighbours rotate together.
    """

    name: str
    hf_class: str
    from_hf: Callable[[Fields], ModelSpec]
    hf_tensors: Mapping[str, str] = HF_TENSORS
    hf_stacked: Mapping[str, str] = {}
    hf_unused: tuple[str, ...] = ()
    from_gguf: Callable[[GGUFFile], ModelSpec] | None = None
    gguf_name: str = ""
    gguf_tensors: Mapping[str, str] = GGUF_TENSORS
    gguf_interleaved: bool = False
