"""`config.json` of a Hugging Face folder -> the parts of a `ModelSpec` that all families share.

Imports no torch. Defaults of absent keys are those of transformers' configuration classes (5.x).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.fields import MAX_LAYERS, Fields, shorten
from microvllm.adapters.regular_files import check_regular
from microvllm.adapters.rope_spec import rope_from_hf
from microvllm.adapters.spec import ModelSpec

MAX_JSON_BYTES = 64 << 20
DTYPES = ("float32", "bfloat16", "float16")
MOE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `ModelFileError` if the file is missing, too large or holds something else."""
    try:
        check_regular(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFileError(path, f"larger than {MAX_JSON_BYTES >> 20} MiB, which no such file is")
        content = path.read_text("utf-8")
    except FileNotFoundError:
        raise ModelFileError(path, "no such file") from None
    except OSError as error:
        raise ModelFileError(path, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ModelFileError(path, "is not UTF-8 text") from None
    if not content.strip():
        raise ModelFileError(path, "the file is empty")
    try:
        values = json.loads(content)
    except RecursionError:
        raise ModelFileError(path, "is not usable JSON: nested too deeply") from None
    except ValueError as error:
        raise ModelFileError(path, f"is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelFileError(path, f"must hold a JSON object, got {shorten(values)}")
    return values


def hf_spec(
    config: Fields,
    architecture: str,
    *,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    default_max_position: int,
    sliding_window: int | None = None,
    window_by_layer: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelSpec:
    """Build the spec from what every family has in its config, and from what its own file says.

    Raises `ModelFileError` naming the key for anything that this engine would compute differently from
    the model's authors: other activations, quantised weights, experts, unknown rotary scaling, ...
    """
    refuse_unsupported(config)
    vocab_size = config.size("vocab_size")
    hidden_size = config.size("hidden_size")
    num_heads = config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", default_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise config.error(
            "num_attention_heads", f"{num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if "head_dim" not in config and default_head_dim is None and hidden_size % num_heads:
        raise config.error(
            "hidden_size", f"{hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    head_dim = config.size("head_dim", default_head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise config.error("head_dim", f"must be even for rotary embeddings, got {head_dim}")
    rotary = rope_from_hf(config, head_dim, default_max_position)
    max_position = rotary.max_position
    if window_by_layer:
        sliding_window = _layerwise_window(config, max_position)
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=config.size("intermediate_size"),
        num_layers=config.size("num_hidden_layers", at_most=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rotary.spec,
        tie_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        sliding_window=None if sliding_window is None or sliding_window >= max_position else sliding_window,
        dtype=stored_dtype(config),
        bos_token_id=config.token_id("bos_token_id", vocab_size),
        eos_token_ids=config.token_ids("eos_token_id", vocab_size),
    )


def _layerwise_window(config: Fields, max_position: int) -> int | None:
    """Qwen's sliding window: `use_sliding_window`, and from layer `max_window_layers` on.

    None if no layer slides; layers of both kinds in one model are refused.
    """
    num_layers = config.size("num_hidden_layers", at_most=MAX_LAYERS)
    window = config.size("sliding_window", 4096)
    listed = "layer_types" in config
    if listed:
        kinds = config.get("layer_types")
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise config.error("layer_types", f"must list one kind for each of the {num_layers} layers")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise config.error("layer_types", f"names {shorten(kind)}, which is not supported")
        sliding = kinds.count("sliding_attention")
    else:
        first = config.get("max_window_layers")
        first = 28 if first is None else first
        if type(first) is not int or first < 0:
            raise config.error("max_window_layers", f"must be an integer of at least 0, got {shorten(first)}")
        sliding = max(0, num_layers - first)
    if not config.flag("use_sliding_window") or config.is_null("sliding_window"):
        sliding = 0
    if sliding == 0 or window >= max_position:
        return None
    if sliding < num_layers:
        key = "layer_types" if listed else "max_window_layers"
        raise config.error(
            key, f"lets {sliding} of {num_layers} layers slide; a mix of both kinds is not supported"
        )
    return window


def refuse_unsupported(config: Fields) -> None:
    """Raise `ModelFileError` for what no family here computes: quantised weights, experts, ..."""
    if config.get("quantization_config") is not None:
        quantization = config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise config.error("quantization_config", f"(quant_method {shorten(method)}) is not supported")
    for key in MOE_KEYS:
        if config.get(key) not in (None, 0):
            raise config.error(key, "is set: mixture-of-experts models are not supported")
    activation = config.get("hidden_act")
    if activation not in (None, "silu", "swish"):
        raise config.error("hidden_act", f"must be silu, got {shorten(activation)}")
    if config.number("partial_rotary_factor", 1.0) != 1.0:
        raise config.error("partial_rotary_factor", "other than 1 is not supported")


def stored_dtype(config: Fields) -> str:
    """The checkpoint's own dtype, under transformers' newer or older key."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    dtype = config.text(key, "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise config.error(key, f"must be one of {', '.join(DTYPES)}, got {shorten(dtype)}")
    return dtype
