"""Qwen, the first of the name: Qwen-7B, Qwen-7B-Chat and their sizes (arXiv:2309.16609).

Llama with biases on q, k and v under other names: q, k and v are stored as one tensor, the gate of the MLP
is `w2`, and `intermediate_size` counts gate and up together. The authors' code scales queries
(`use_logn_attn`) and widens the rotary base (`use_dynamic_ntk`) only for texts longer than `seq_length`.
The second would change the keys that are cached already, so the context ends at `seq_length`, where both
change nothing.
"""

from __future__ import annotations

from microvllm.adapters.family import Family
from microvllm.adapters.files.fields import MAX_LAYERS, Fields
from microvllm.adapters.files.hf_config import refuse_unsupported, stored_dtype
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.rope_spec import RopeSpec
from microvllm.adapters.spec import Attention, LayerSpec, ModelSpec

HF_TENSORS = {
    "embed": "transformer.wte",
    "lm_head": "lm_head",
    "norm": "transformer.ln_f",
    "qkv": "transformer.h.{i}.attn.c_attn",
    "o": "transformer.h.{i}.attn.c_proj",
    "gate": "transformer.h.{i}.mlp.w2",
    "up": "transformer.h.{i}.mlp.w1",
    "down": "transformer.h.{i}.mlp.c_proj",
    "mixer_norm": "transformer.h.{i}.ln_1",
    "mlp_norm": "transformer.h.{i}.ln_2",
}


def from_hf(config: Fields) -> ModelSpec:
    """Defaults of absent keys are those of the model's own configuration class; `seq_length` has none."""
    refuse_unsupported(config)
    vocab_size = config.size("vocab_size", 151936)
    hidden_size = config.size("hidden_size", 4096)
    num_heads = config.size("num_attention_heads", 32)
    head_dim = config.size("kv_channels", 128)
    if head_dim * num_heads != hidden_size:
        raise config.error(
            "hidden_size", f"{hidden_size} is not num_attention_heads {num_heads} x kv_channels {head_dim}"
        )
    if head_dim % 2:
        raise config.error("kv_channels", f"must be even for rotary embeddings, got {head_dim}")
    both_widths = config.size("intermediate_size", 22016)
    if both_widths % 2:
        raise config.error("intermediate_size", f"must be even, twice the MLP's width; got {both_widths}")
    if config.number("rotary_pct", 1.0) != 1.0:
        raise config.error("rotary_pct", "other than 1 is not supported")
    if not config.flag("scale_attn_weights", True):
        raise config.error("scale_attn_weights", "must be true")
    bias = not config.flag("no_bias", True)
    trained = config.size("seq_length")
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        rope=RopeSpec(theta=config.number("rotary_emb_base", 10000.0)),
        qkv_bias=True,
        o_bias=bias,
    )
    layer = LayerSpec(mixer=attention, mlp=MLP(size=both_widths // 2, bias=bias))
    return ModelSpec(
        architecture="qwen",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(layer,) * config.size("num_hidden_layers", 32, at_most=MAX_LAYERS),
        max_position=min(trained, config.size("max_position_embeddings", trained)),
        rms_norm_eps=config.number("layer_norm_epsilon", 1e-6),
        tie_embeddings=config.flag("tie_word_embeddings"),
        dtype=_dtype(config),
        bos_token_id=config.token_id("bos_token_id", vocab_size),
        eos_token_ids=config.token_ids("eos_token_id", vocab_size),
    )


def _dtype(config: Fields) -> str:
    """`torch_dtype`, or else the flags of the authors' code; with none set theirs takes bfloat16."""
    if "dtype" in config or "torch_dtype" in config:
        return stored_dtype(config)
    if config.flag("fp32"):
        return "float32"
    return "float16" if config.flag("fp16") else "bfloat16"


FAMILY = Family("qwen", "QWenLMHeadModel", from_hf, hf_tensors=HF_TENSORS)
