"""`config.json` of a Hugging Face folder -> the parts of a `ModelSpec` that all families share.

Imports no torch. Defaults of absent keys are those of transformers' configuration classes (5.x).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.fields import MAX_EXPERTS, MAX_LAYERS, Fields, shorten
from microvllm.adapters.files.regular_files import check_regular
from microvllm.adapters.layers.experts import Experts
from microvllm.adapters.layers.mlp import MLP
from microvllm.adapters.rope_spec import Rotary, rope_from_hf
from microvllm.adapters.spec import Attention, LayerSpec, ModelSpec
from microvllm.ops.routing import Routing

MAX_JSON_BYTES = 64 << 20
TIE = "tie_word_embeddings"
INHERITED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", TIE)
DTYPES = ("float32", "bfloat16", "float16")
ATTENTION_KINDS = ("full_attention", "sliding_attention")
SILU = {"silu": "silu", "swish": "silu"}
COUNT_KEYS = ("num_experts", "num_local_experts")  # of experts, under transformers' older or newer name
OTHER_COUNT_KEYS = ("n_routed_experts", "moe_num_experts")  # of single families
# Of experts that no family here has, and what they say where they change nothing.
MOE_KEYS: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys((*OTHER_COUNT_KEYS, "n_shared_experts"), (None, 0)),
    "n_group": (None, 1),
    "routed_scaling_factor": (None, 1),
    "scoring_func": (None, "softmax"),
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `ModelFileError` if the file is missing, too large or holds something else."""
    values = read_values(path)
    if not isinstance(values, dict):
        raise ModelFileError(path, f"must hold a JSON object, got {shorten(values)}")
    return values


def read_values(path: Path) -> Any:
    """Read JSON of any type; raises as `read_json` does."""
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
        return json.loads(content)
    except RecursionError:
        raise ModelFileError(path, "is not usable JSON: nested too deeply") from None
    except ValueError as error:
        raise ModelFileError(path, f"is not JSON ({error})") from None


def hf_spec(
    config: Fields,
    architecture: str,
    *,
    default_max_position: int,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    default_tie: bool = False,
    default_eps: float = 1e-6,
    activation_key: str = "hidden_act",
    activations: Mapping[str, str] = SILU,
    windows: Callable[[Fields, int], Sequence[int | None]] | None = None,
    rotary: Callable[[Fields, int, int], Rotary] = rope_from_hf,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    has_experts: bool = False,
    expert_keys: Collection[str] = (),
) -> ModelSpec:
    """Build the spec from what every family has in its config, and from what its own file passes.

    `activations`: spelling in config.json -> name in `ops.activation`; the first is the default. `windows`
    returns the window of each of so many layers. `rotary` reads the rotation from the config, the head size
    and the default length. With `has_experts` the caller reads the experts: `read_experts`; `expert_keys` are
    those of `MOE_KEYS` that it reads, too.
    Raises `ModelFileError` naming the key for anything that this engine would compute differently from
    the model's authors: other activations, experts, unknown rotary scaling, ...
    """
    refuse_unsupported(config, has_experts=has_experts, expert_keys=expert_keys)
    vocab_size = config.size("vocab_size")
    hidden_size = config.size("hidden_size")
    num_layers = config.size("num_hidden_layers", at_most=MAX_LAYERS)
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
    activation = config.get(activation_key, next(iter(activations)))
    if not isinstance(activation, str) or activation not in activations:
        raise config.error(activation_key, f"must be {next(iter(activations))}, got {shorten(activation)}")
    rope, max_position = rotary(config, head_dim, default_max_position)
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
    )
    mlp = MLP(size=config.size("intermediate_size"), activation=activations[activation], bias=mlp_bias)
    layers = [LayerSpec(mixer=attention, mlp=mlp)] * num_layers
    if windows is not None:
        layers = [
            layer.with_mixer(window=window) if window is not None and window < max_position else layer
            for layer, window in zip(layers, windows(config, num_layers), strict=True)
        ]
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layers),
        max_position=max_position,
        rms_norm_eps=config.number("rms_norm_eps", default_eps),
        tie_embeddings=config.flag("tie_word_embeddings", default_tie),
        dtype=stored_dtype(config),
        bos_token_id=config.token_id("bos_token_id", vocab_size),
        eos_token_ids=config.token_ids("eos_token_id", vocab_size),
    )


def text_part(config: Fields) -> Fields:
    """The language model of a configuration of several parts.

    What it leaves out of `INHERITED` stands beside it, and whether its embeddings are tied always does.
    """
    text = config.part("text_config")
    if text is None:
        raise config.error("text_config", "is missing")
    own = text.values  # with its nulls, which may differ from leaving a key out
    beside = {key: config.get(key) for key in INHERITED if key in config}
    given = {key: value for key, value in own.items() if value is not None or key not in beside}
    merged = beside | given
    merged[TIE] = beside.get(TIE, own.get(TIE))
    if merged[TIE] is None:
        del merged[TIE]
    return Fields(config.path, merged, text.where)


def layer_types(
    config: Fields, num_layers: int, supported: Collection[str], default: list[str] | None = None
) -> list[str]:
    """The kind of each layer by `layer_types`, which the config must have where there is no `default`."""
    kinds = config.get("layer_types", default)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise config.error("layer_types", f"must list one kind for each of the {num_layers} layers")
    for kind in kinds:
        if kind not in supported:
            raise config.error("layer_types", f"names {shorten(kind)}, which is not supported")
    return kinds


def hybrid_layer_types(
    config: Fields, num_layers: int, supported: tuple[str, str], default: list[str] | None = None
) -> list[str]:
    """As `layer_types`, of a kind with a state and one with attention, of which there must be a layer."""
    kinds = layer_types(config, num_layers, supported, default)
    if supported[1] not in kinds:
        raise config.error("layer_types", f"has no {supported[1]}, without which models are not supported")
    return kinds


def all_but_every(period: int, num_layers: int) -> list[bool]:
    """False for every `period`-th layer."""
    return [(index + 1) % period != 0 for index in range(num_layers)]


def sliding_layers(config: Fields, num_layers: int, default: Sequence[bool]) -> list[bool]:
    """Which layers have a window, by `layer_types`; `default` where the config does not list them."""
    kinds = layer_types(config, num_layers, ATTENTION_KINDS, [ATTENTION_KINDS[each] for each in default])
    return [kind == "sliding_attention" for kind in kinds]


def scaling_of_kind(config: Fields, kind: str) -> Fields | None:
    """The scaling of the rotation of layers of this one of `ATTENTION_KINDS`.

    Older configurations have one scaling, which only layers without a window use.
    """
    parts = config.part("rope_parameters")
    if parts is None:
        return config.part("rope_scaling") if kind == "full_attention" else None
    for other in parts:
        if other not in ATTENTION_KINDS:
            raise parts.error(other, f"must be one of {', '.join(ATTENTION_KINDS)}")
    if "rope_scaling" in config:
        raise config.error("rope_scaling", "is not supported beside rope_parameters")
    return parts.part(kind)


def layer_windows(
    config: Fields, num_layers: int, window: int | None, default: Sequence[bool]
) -> list[int | None]:
    """The window of each layer: see `sliding_layers`."""
    return [window if slides else None for slides in sliding_layers(config, num_layers, default)]


def same_windows(config: Fields, num_layers: int) -> list[int | None]:
    """The window of a configuration that has one for all layers, or none."""
    return [config.size("sliding_window") if "sliding_window" in config else None] * num_layers


def qwen_windows(config: Fields, num_layers: int) -> list[int | None]:
    """Qwen's: `use_sliding_window`, and from layer `max_window_layers` on, or by `layer_types`."""
    window = config.size("sliding_window", 4096)
    first = config.size("max_window_layers", 28, at_least=0)
    windows = layer_windows(config, num_layers, window, [index >= first for index in range(num_layers)])
    used = config.flag("use_sliding_window") and not config.is_null("sliding_window")
    return windows if used else [None] * num_layers


def read_experts(
    config: Fields, *, count: int, num_chosen: int, size: int, normalized: bool, shared_size: int = 0
) -> Experts:
    """The experts of a layer; `count` and `num_chosen` are the defaults of absent keys."""
    found = {key: config.size(key, at_most=MAX_EXPERTS) for key in COUNT_KEYS if key in config}
    if len(set(found.values())) > 1:
        raise config.error(
            COUNT_KEYS[1], f"is {found[COUNT_KEYS[1]]}, but {COUNT_KEYS[0]} is {found[COUNT_KEYS[0]]}"
        )
    count = next(iter(found.values()), count)
    num_chosen = config.size("num_experts_per_tok", num_chosen)
    if num_chosen > count:
        raise config.error("num_experts_per_tok", f"is {num_chosen}, but there are {count} experts")
    if not shared_size and "shared_expert_intermediate_size" in config:
        raise config.error("shared_expert_intermediate_size", "is set: only Qwen2-MoE has shared experts")
    return Experts(
        count=count,
        size=size,
        routing=Routing(num_chosen=num_chosen, normalized=normalized),
        shared_size=shared_size,
        shared_gate=bool(shared_size),
    )


def refuse_unsupported(
    config: Fields, *, has_experts: bool = False, expert_keys: Collection[str] = ()
) -> None:
    """Raise `ModelFileError` for what no family here computes."""
    for key in () if has_experts else COUNT_KEYS:
        if key not in expert_keys and config.get(key) not in (None, 0):
            raise config.error(key, "is set, but this family has no experts here")
    for key, unchanged in MOE_KEYS.items():
        if key not in expert_keys and config.get(key) not in unchanged:
            raise config.error(key, "is set: experts of that kind are not supported")
    if not config.flag("is_causal", True):
        raise config.error("is_causal", "is false: attention in both directions is not supported")


def stored_dtype(config: Fields) -> str:
    """The checkpoint's own dtype, under transformers' newer or older key."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    dtype = config.text(key, "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise config.error(key, f"must be one of {', '.join(DTYPES)}, got {shorten(dtype)}")
    return dtype
