"""Granite 4 (`GraniteMoeHybrid`): Granite with layers of Mamba-2, with experts beside an MLP, or neither."""

from __future__ import annotations

import msgspec

from microvllm.adapters.families.granite import multiplied_from_hf
from microvllm.adapters.families.mamba2_config import MambaKeys, read_mamba
from microvllm.adapters.family import HF_TENSORS, Family
from microvllm.adapters.files.fields import Fields, shorten
from microvllm.adapters.files.hf_config import layer_types, read_experts
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.mamba2 import Mamba2, tensors
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.spec import LayerSpec, ModelSpec

LAYER = "model.layers.{i}"
TENSORS = {
    **HF_TENSORS,
    **tensors(f"{LAYER}.mamba"),
    "gate_up": f"{LAYER}.shared_mlp.input_linear",
    "down": f"{LAYER}.shared_mlp.output_linear",
    "shared_gate_up": f"{LAYER}.shared_mlp.input_linear",
    "shared_down": f"{LAYER}.shared_mlp.output_linear",
    "router": f"{LAYER}.block_sparse_moe.router.layer",
    "expert_gate_up": f"{LAYER}.block_sparse_moe.input_linear",
    "expert_down": f"{LAYER}.block_sparse_moe.output_linear",
}
# Of transformers' two names of each kind, whether it is attention.
KINDS = {"attention": True, "full_attention": True, "mamba": False, "linear_attention": False}
HEAD_DIM = "mamba_d_head"


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Granite 4 model from the `config.json` of its folder."""
    sparse = config.get("num_local_experts", 8) != 0
    spec = multiplied_from_hf(config, "granitemoehybrid", has_experts=True)
    kinds = layer_types(config, spec.num_layers, KINDS)
    if not any(KINDS[kind] for kind in kinds):
        raise config.error("layer_types", "has no attention, without which models are not supported")
    position = config.get("position_embedding_type")
    if position not in (None, "nope", "rope"):
        raise config.error("position_embedding_type", f"must be rope or nope, got {shorten(position)}")
    (mixer,) = spec.mixers
    rope = mixer.rope if position == "rope" else msgspec.structs.replace(mixer.rope, rotary_dim=0)
    mlp = _experts(config) if sparse else MLP(size=_shared_size(config))
    attention = LayerSpec(mixer=msgspec.structs.replace(mixer, rope=rope), mlp=mlp)
    mamba = attention if all(map(KINDS.get, kinds)) else LayerSpec(mixer=_mamba(config), mlp=mlp)
    return spec.with_layers(attention if KINDS[kind] else mamba for kind in kinds)


def _shared_size(config: Fields) -> int:
    return config.size("shared_intermediate_size", 1024)


def _experts(config: Fields) -> Experts:
    """The softmax over the logits of the chosen ones, which is that over all, normalised."""
    size = config.size("intermediate_size", 11008)
    experts = read_experts(config, count=8, num_chosen=2, size=size, normalized=True)
    return msgspec.structs.replace(experts, shared_size=_shared_size(config))


def _mamba(config: Fields) -> Mamba2:
    hidden, heads = config.size("hidden_size"), config.size("mamba_n_heads", 128)
    inner = config.size("mamba_expand", 2) * hidden
    if config.get(HEAD_DIM) == "auto":
        config = config.with_value(HEAD_DIM, None)
    if inner % heads or config.size(HEAD_DIM, inner // heads) * heads != inner:
        problem = f"of {config.get(HEAD_DIM, inner // heads)} with mamba_n_heads {heads}"
        raise config.error(HEAD_DIM, f"{problem} do not make up mamba_expand times hidden_size, {inner}")
    keys = MambaKeys(
        num_heads=("mamba_n_heads", heads),
        head_dim=(HEAD_DIM, inner // heads),
        num_groups=("mamba_n_groups", 1),
        state_size=("mamba_d_state", 256),
        conv_size=("mamba_d_conv", 4),
        conv_bias="mamba_conv_bias",
        bias="mamba_proj_bias",
    )
    return read_mamba(config, keys, config.number("rms_norm_eps", 1e-6))


FAMILY = Family("granitemoehybrid", "GraniteMoeHybridForCausalLM", from_hf, hf_tensors=TENSORS)
