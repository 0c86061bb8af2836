"""Nemotron-H (arXiv:2504.03624), Nemotron Nano 2 and 3: layers of Mamba-2, attention, MLPs or experts."""

from __future__ import annotations

import msgspec

from microvllm.adapters.families.mamba2_config import MambaKeys, read_mamba
from microvllm.adapters.families.routed_experts import KEYS as EXPERT_KEYS
from microvllm.adapters.families.routed_experts import Defaults, routed_experts
from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import Fields, shorten
from microvllm.adapters.files.hf_config import SILU, hf_spec
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.mamba2 import Mamba2, tensors
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.layers.nothing import Nothing
from microvllm.adapters.rope_spec import RopeSpec, Rotary
from microvllm.adapters.spec import LayerSpec, ModelSpec
from microvllm.adapters.tensors import BARE

LAYER = "backbone.layers.{i}"
MIXER = f"{LAYER}.mixer"
TENSORS = {
    "embed": "backbone.embeddings",
    "lm_head": "lm_head",
    "norm": "backbone.norm_f",
    **tensors(MIXER),
    **{role: f"{MIXER}.{role}_proj" for role in ("q", "k", "v", "o", "up", "down")},
    "router": f"{MIXER}.gate",
    "correction": f"{MIXER}.gate.e_score_correction_bias{BARE}",
    "expert_up": f"{MIXER}.experts.{{e}}.up_proj",
    "expert_down": f"{MIXER}.experts.{{e}}.down_proj",
    "shared_up": f"{MIXER}.shared_experts.up_proj",
    "shared_down": f"{MIXER}.shared_experts.down_proj",
    "mixer_norm": f"{LAYER}.norm",  # of whichever of the two a layer has
    "mlp_norm": f"{LAYER}.norm",
}
PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLDER = {"mamba": "linear_attention", "attention": "full_attention"}
ACTIVATIONS = {"relu2": "relu2", **SILU}
KEYS = MambaKeys(
    num_heads=("mamba_num_heads", 128),
    head_dim=("mamba_head_dim", 64),
    num_groups=("n_groups", 8),
    state_size=("ssm_state_size", 128),
    conv_size=("conv_kernel", 4),
    conv_bias="use_conv_bias",
    bias="use_bias",
)
# Which transformers reads in the place of others, and no published file has.
OTHER_KEYS = "mamba_n_groups", "mamba_d_conv", "mamba_conv_bias", "mamba_dt_min", "mamba_dt_limit"
SMALLEST_STEP = 1e-3  # of all models' time_step_min, which their authors' kernels do not apply
HEAD_DIM, EXPERT_SIZE = 128, 7688


def from_hf(config: Fields) -> ModelSpec:
    """Describe a Nemotron-H model from the `config.json` of its folder."""
    kinds = _kinds(config)
    if config.size("num_hidden_layers", len(kinds)) != len(kinds):
        count = config.get("num_hidden_layers")
        raise config.error("num_hidden_layers", f"is {count}, but {len(kinds)} layers are listed")
    for key in ("attention_bias", "moe_latent_size", "sliding_window", *OTHER_KEYS):
        if key in config and (key in OTHER_KEYS or config.get(key) is not False):
            raise config.error(key, "is set, which is not supported")
    if config.size("attention_head_dim", size := config.size("head_dim", HEAD_DIM)) != size:
        raise config.error("attention_head_dim", f"is {config.get('attention_head_dim')}, head_dim {size}")
    spec = hf_spec(
        config.with_value("num_hidden_layers", len(kinds)),
        "nemotron_h",
        default_max_position=4096,
        default_kv_heads=8,
        default_head_dim=HEAD_DIM,
        activation_key="mlp_hidden_act",
        activations=ACTIVATIONS,
        rotary=_unrotated,
        has_experts=True,
        expert_keys=EXPERT_KEYS,
    )
    eps = config.number("layer_norm_epsilon", 1e-5)
    mlp = MLP(
        size=config.size("intermediate_size"),
        activation=ACTIVATIONS[config.text("mlp_hidden_act", "relu2")],
        gated=False,
        bias=config.flag("mlp_bias"),
    )
    parts = {"full_attention": LayerSpec(mixer=spec.layers[0].mixer, mlp=Nothing())}
    parts["mlp"] = LayerSpec(mixer=Nothing(), mlp=mlp)
    if "linear_attention" in kinds:
        parts["linear_attention"] = LayerSpec(mixer=_mamba(config, eps), mlp=Nothing())
    if "moe" in kinds:
        parts["moe"] = LayerSpec(mixer=Nothing(), mlp=_experts(config, mlp))
    return spec.with_layers((parts[kind] for kind in kinds), rms_norm_eps=eps)


def _kinds(config: Fields) -> list[str]:
    """What each layer is, from a list under either of its names, or from a character for each layer."""
    found: dict[str, list[str]] = {}
    for key in ("layers_block_type", "layer_types"):
        kinds = config.get(key, [])
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise config.error(key, "must list the kind of each layer")
        if key in config:
            found[key] = [str(OLDER.get(kind, kind)) for kind in kinds]
    if "hybrid_override_pattern" in config:
        pattern = config.text("hybrid_override_pattern")
        found["hybrid_override_pattern"] = [PATTERN.get(character, character) for character in pattern]
    if not found:
        raise config.error("hybrid_override_pattern", "is missing, and so is layers_block_type")
    (first, listed), *others = found.items()
    for key, other in others:
        if other != listed:
            raise config.error(key, f"names other layers than {first}")
    for kind in listed:
        if kind not in PATTERN.values():
            raise config.error(first, f"names {shorten(kind)}, which is not supported")
    if "full_attention" not in listed:
        raise config.error(first, "has no attention, without which models are not supported")
    return listed


def _unrotated(config: Fields, head_dim: int, default_max_position: int) -> Rotary:
    trained = config.size("max_position_embeddings", default_max_position)
    return Rotary(RopeSpec(rotary_dim=0), trained)


def _mamba(config: Fields, eps: float) -> Mamba2:
    if config.text("mamba_hidden_act", "silu") not in SILU:
        raise config.error("mamba_hidden_act", f"must be silu, got {shorten(config.get('mamba_hidden_act'))}")
    step = config.number("time_step_min", SMALLEST_STEP)
    if step > SMALLEST_STEP:
        raise config.error("time_step_min", f"must be at most {SMALLEST_STEP:g}, got {step:g}")
    return read_mamba(config, KEYS, eps)


def _experts(config: Fields, mlp: MLP) -> Experts:
    """As DeepSeek-V3 chooses them, each an MLP such as those of other layers, and one for every token."""
    if mlp.bias:
        raise config.error("mlp_bias", "is true, which is not supported for experts")
    if config.get("n_shared_experts", 1) != 1:
        raise config.error("n_shared_experts", f"must be 1, got {shorten(config.get('n_shared_experts'))}")
    experts = routed_experts(config, Defaults(count=8, num_chosen=2, size=EXPERT_SIZE))
    shared = config.size("moe_shared_expert_intermediate_size", EXPERT_SIZE)
    return msgspec.structs.replace(experts, activation=mlp.activation, gated=False, shared_size=shared)


FAMILY = Family("nemotron_h", "NemotronHForCausalLM", from_hf, hf_tensors=TENSORS, hf_unused=("mtp.",))
