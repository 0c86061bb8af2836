"""Describes the rotary embedding of a model, and reads it from `config.json` or from GGUF metadata.

Defaults and precedence are those of transformers' `modeling_rope_utils` and of llama.cpp. Imports no torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.files.fields import MAX_ROPE_FACTOR, Fields, shorten

if TYPE_CHECKING:
    from microvllm.adapters.files.gguf_file import GGUFFile

COMMON_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
ORIGINAL = "original_max_position_embeddings"
KINDS = {
    "default": {"factor"},  # some exports write factor 1 beside "default"
    "linear": {"factor", ORIGINAL},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL},
    "yarn": {"factor", ORIGINAL, "attention_factor", "attn_factor", "beta_fast", "beta_slow", "truncate"}
    | {"mscale", "mscale_all_dim", "extrapolation_factor", "finetuned"},
    "dynamic": {"factor"},
    "longrope": {"factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"},
}
ALIASES = {"su": "longrope"}
LLAMA3_TENSOR = "rope_freqs.weight"
SHORT_TENSOR, LONG_TENSOR = "rope_factors_short.weight", "rope_factors_long.weight"
# Of every release with rotary factors (Llama 3.1, 3.2, 3.3); only `factor` differs between them.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding (Su et al., 2021, arXiv:2104.09864) and its context extension.

    `scaling` is "none", "linear", "llama3", "yarn", "dynamic", "longrope" or "proportional":
    `adapters.rotary` has the formulas. cos and sin are multiplied by `attention_factor`. Only the first
    `rotary_dim` elements of a head are rotated (None: all of them; 0: none); `interleaved`: neighbours
    against each other in the checkpoint, not the two halves.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope: divisors of the head_dim / 2 frequencies
    long_factors: tuple[float, ...] = ()
    proportion: float = 1.0  # proportional: of a head's pairs that turn, those of the highest frequencies
    rotary_dim: int | None = None
    interleaved: bool = False

    @property
    def depends_on_length(self) -> bool:
        """Whether texts beyond the original length are rotated differently from shorter ones."""
        return self.scaling in ("dynamic", "longrope")

    def at_length(self, length: int, head_dim: int) -> RopeSpec:
        """The rotation for texts of `length` tokens, which then holds for texts of every length.

        Keys stay in the cache while a text grows, and texts share them, so that the authors' change of all
        keys at some length is fixed at the longest text, as in vLLM. "dynamic" has a base that grows with
        the length ("NTK-aware"), "longrope" divisors of its own beyond the original length.
        """
        if not self.depends_on_length or length <= self.original_max_position:
            return self
        if self.scaling == "longrope":
            return msgspec.structs.replace(self, short_factors=self.long_factors)
        growth = self.factor * length / self.original_max_position - (self.factor - 1)
        dim = self.rotary_dim or head_dim
        theta = self.theta * growth ** (dim / (dim - 2))
        return msgspec.structs.replace(self, scaling="none", theta=theta)

    def order(self, head_dim: int) -> list[tuple[int, int]]:
        """The stored elements of a head, as runs [start, stop), so that j is rotated with j + head_dim / 2.

        Elements that are not rotated fill the rest of both halves; scores do not depend on the order.
        """
        dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if self.interleaved:
            halves = [[(j, j + 1) for j in range(first, dim, 2)] for first in (0, 1)]
        else:
            halves = [[(0, dim // 2)], [(dim // 2, dim)]]
        middle = (dim + head_dim) // 2
        runs: list[tuple[int, int]] = []
        for start, stop in (*halves[0], (dim, middle), *halves[1], (middle, head_dim)):
            if runs and runs[-1][1] == start:
                runs[-1] = runs[-1][0], stop
            elif start < stop:
                runs.append((start, stop))
        return runs


class Rotary(NamedTuple):
    """A rotary scaling, and the number of positions that it reaches."""

    spec: RopeSpec
    max_position: int


def rope_from_hf(
    config: Fields,
    head_dim: int,
    default_max_position: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    interleaved: bool = False,
) -> Rotary:
    """Read either spelling: `rope_scaling` beside `rope_theta`, or `rope_parameters`; see `scaled_rope`."""
    scaling = config.part("rope_scaling") or config.part("rope_parameters")
    theta = config.number("rope_theta", theta)
    sizes = head_dim, default_max_position
    return scaled_rope(config, scaling, theta, *sizes, partial=partial, interleaved=interleaved)


def scaled_rope(
    config: Fields,
    scaling: Fields | None,
    theta: float,
    head_dim: int,
    default_max_position: int,
    *,
    partial: float | None = None,
    interleaved: bool = False,
) -> Rotary:
    """The rotation with the base `theta`, changed as `scaling`, an object of the config, says.

    partial: the default of `partial_rotary_factor`, for families that rotate a part of each head.
    Raises `ModelFileError` for an unknown kind, a key that the kind does not have, and a bad value.
    """
    key = "partial_rotary_factor"
    at = config if scaling is None or key not in scaling else scaling
    factor = at.number(key, 1.0 if partial is None else partial, at_most=1.0)
    if partial is None and (factor != 1.0 or config.number(key, 1.0) != 1.0):
        raise at.error(key, "other than 1 is not supported")
    dim = int(head_dim * factor)
    if dim % 2 or not dim:
        raise at.error(key, f"{factor:g} of a head of {head_dim} is not an even number of elements")
    rope, max_position = _scaled_rope(config, scaling, theta, dim, default_max_position)
    rotary_dim = None if dim == head_dim else dim
    return Rotary(msgspec.structs.replace(rope, rotary_dim=rotary_dim, interleaved=interleaved), max_position)


def _scaled_rope(
    config: Fields, scaling: Fields | None, theta: float, dim: int, default_max_position: int
) -> Rotary:
    """dim: the elements of a head that are rotated."""
    trained = config.size("max_position_embeddings", default_max_position)
    if scaling is None:
        return Rotary(RopeSpec(theta=theta), trained)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    kind = ALIASES.get(kind, kind)
    if kind not in KINDS:
        key = "rope_type" if "rope_type" in scaling else "type"
        raise scaling.error(key, f"must be one of {', '.join(KINDS)}, got {shorten(kind)}")
    for key in scaling:
        if isinstance(scaling.get(key), dict):
            raise scaling.error(
                key, "is an object: rotary parameters that differ between layers are not supported"
            )
        if key not in COMMON_KEYS | KINDS[kind]:
            raise scaling.error(key, f"is not a key of rotary scaling {kind!r}")
    theta = scaling.number("rope_theta", theta)
    if kind == "default":
        if scaling.number("factor", 1.0) != 1.0:
            raise scaling.error("factor", "has no meaning without a rope_type")
        return Rotary(RopeSpec(theta=theta), trained)
    # Phi-3 and its kind write the original length beside the scaling, where it wins.
    original = config.size(ORIGINAL, scaling.size(ORIGINAL, trained))
    ratio = max(1.0, trained / original) if kind in ("yarn", "longrope") and original != trained else None
    one = 1.0 if kind == "longrope" else None
    factor = scaling.number("factor", ratio or one, at_least=1.0, at_most=MAX_ROPE_FACTOR)
    common: dict[str, Any] = {"theta": theta, "scaling": kind, "factor": factor}
    if kind == "linear":
        return Rotary(RopeSpec(**common), int(trained * factor))
    if kind == "dynamic":
        if dim < 4:
            raise scaling.error("rope_type", f"dynamic needs heads of at least 4, not of {dim}")
        return Rotary(RopeSpec(**common, original_max_position=trained), int(trained * factor))
    common["original_max_position"] = original
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if high <= low:
            raise scaling.error("high_freq_factor", f"must be above low_freq_factor {low:g}, got {high:g}")
        return Rotary(RopeSpec(**common, low_freq_factor=low, high_freq_factor=high), trained)
    if kind == "longrope":
        attention = math.sqrt(1 + math.log(factor) / math.log(max(2, original)))
        spec = RopeSpec(
            **common,
            attention_factor=scaling.number("attention_factor", attention),
            short_factors=_divisors(scaling, "short_factor", dim),
            long_factors=_divisors(scaling, "long_factor", dim),
        )
        return Rotary(spec, trained)
    return Rotary(_yarn(scaling, common), int(original * factor))


def _yarn(scaling: Fields, common: dict[str, Any]) -> RopeSpec:
    if scaling.number("extrapolation_factor", 1.0) != 1.0:
        raise scaling.error("extrapolation_factor", "other than 1 is not supported")
    factor, attention = common["factor"], yarn_attention_factor(common["factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):  # 0 asks for none, as in transformers
        over, under = scaling.number("mscale"), scaling.number("mscale_all_dim")
        attention = yarn_attention_factor(factor, over) / yarn_attention_factor(factor, under)
    if common["theta"] <= 1.0:
        raise scaling.error("rope_theta", f"must be above 1 for yarn, got {common['theta']:g}")
    fast, slow = scaling.number("beta_fast", 32.0), scaling.number("beta_slow", 1.0)
    if fast < slow:
        raise scaling.error("beta_fast", f"must not be below beta_slow {slow:g}, got {fast:g}")
    return RopeSpec(
        **common,
        attention_factor=scaling.number(
            "attention_factor", attention * scaling.number("attn_factor", 1.0), at_most=MAX_ROPE_FACTOR
        ),
        beta_fast=fast,
        beta_slow=slow,
        truncate=scaling.flag("truncate", True),
    )


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Eq. 22 of YaRN (arXiv:2309.00071), by which cos and sin are multiplied; `mscale` is DeepSeek's."""
    return 0.1 * mscale * math.log(factor) + 1.0


def _divisors(scaling: Fields, key: str, dim: int) -> tuple[float, ...]:
    """One divisor for each pair of a head's dimensions."""
    values = scaling.get(key)
    if values is None:
        raise scaling.error(key, "is missing")
    listed = values if isinstance(values, list) else []
    good = [type(value) in (int, float) and 0 < value <= MAX_ROPE_FACTOR for value in listed]
    if len(listed) != dim // 2 or not all(good):
        raise scaling.error(
            key,
            f"must list {dim // 2} numbers above 0, one for each pair of a head's elements that is rotated",
        )
    return tuple(float(value) for value in listed)


def rope_from_gguf(file: GGUFFile, keys: Fields, head_dim: int) -> Rotary:
    """Read the `rope.*` keys and the tensors of divisors of a GGUF file."""
    trained = keys.size("context_length")
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.text("rope.scaling.type", "none")
    old_factor = keys.number("rope.scale_linear", 1.0, at_least=1.0, at_most=MAX_ROPE_FACTOR)
    factor = keys.number("rope.scaling.factor", old_factor, at_least=1.0, at_most=MAX_ROPE_FACTOR)
    if "rope.scale_linear" in keys and "rope.scaling.type" not in keys:
        kind = "linear"  # the spelling before 2023-10
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.error("rope.scaling.type", f"must be none, linear, yarn or longrope, got {shorten(kind)}")
    for key, expected in (("yarn_ext_factor", 1.0), ("alpha", 0.0)):
        if keys.get(f"rope.scaling.{key}") not in (None, expected):
            raise keys.error(f"rope.scaling.{key}", f"other than {expected:g} is not supported")
    # llama.cpp computes it from the factor, whatever is stored.
    stored = keys.number("rope.scaling.yarn_attn_factor", 1.0)
    implied = yarn_attention_factor(factor) if kind == "yarn" else 1.0
    if stored != 1.0 and abs(stored - implied) > 1e-4:
        raise keys.error("rope.scaling.yarn_attn_factor", f"must be 1 or {implied:g}, got {stored:g}")
    original = keys.size("rope.scaling.original_context_length", trained)
    attention = keys.number("rope.scaling.attn_factor", 1.0, at_most=MAX_ROPE_FACTOR)
    common: dict[str, Any] = {"theta": theta, "attention_factor": attention}
    tensors = [name for name in (LLAMA3_TENSOR, SHORT_TENSOR, LONG_TENSOR) if name in file.tensors]
    # Phi-3's files have the two tensors and no type.
    if kind == "longrope" or (kind == "none" and LONG_TENSOR in tensors):
        if "rope.scaling.factor" in keys and factor != 1.0:
            raise keys.error("rope.scaling.factor", "is not supported beside longrope's divisors")
        if tensors != [SHORT_TENSOR, LONG_TENSOR]:
            raise ModelFileError(file.path, f"longrope needs the tensors {SHORT_TENSOR} and {LONG_TENSOR}")
        short, long = (_tensor_divisors(file, name, head_dim, 0.0) for name in tensors)
        spec = RopeSpec(
            **common,
            scaling="longrope",
            original_max_position=original,
            short_factors=tuple(short.tolist()),
            long_factors=tuple(long.tolist()),
        )
        return Rotary(spec, trained)
    if kind == "none" or factor == 1.0:
        if LLAMA3_TENSOR in tensors:
            divisors = _tensor_divisors(file, LLAMA3_TENSOR, head_dim, 1.0 - 1e-6)
            return Rotary(_llama3_from_divisors(file, common, divisors, head_dim), trained)
        return Rotary(RopeSpec(**common), trained)
    if tensors:
        raise ModelFileError(
            file.path, f"has both {keys.where}rope.scaling.type {kind} and a tensor {tensors[0]}"
        )
    if kind == "linear":
        return Rotary(RopeSpec(**common, scaling="linear", factor=factor), int(trained * factor))
    if theta <= 1.0:
        raise keys.error("rope.freq_base", f"must be above 1 for yarn, got {theta:g}")
    attention *= yarn_attention_factor(factor)
    if keys.get("rope.scaling.yarn_log_multiplier"):
        attention /= yarn_attention_factor(factor, keys.number("rope.scaling.yarn_log_multiplier"))
    spec = RopeSpec(
        theta=theta,
        attention_factor=attention,
        scaling="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
    )
    return Rotary(spec, int(original * factor))


def _tensor_divisors(file: GGUFFile, name: str, head_dim: int, least: float) -> Any:
    """The divisors of the head_dim / 2 rotary frequencies that a tensor holds: float64."""
    import numpy as np  # takes 0.1 s, which --help does without

    divisors = file.tensor(name).astype(np.float64).ravel()
    good = len(divisors) == head_dim // 2 and np.isfinite(divisors).all() and divisors.min() > least
    if not good:
        bound = f"of at least {least:.0f}" if least else "above 0"
        raise ModelFileError(file.path, f"tensor {name} does not hold {head_dim // 2} divisors {bound}")
    return divisors


def _llama3_from_divisors(file: GGUFFile, common: dict[str, Any], divisors: Any, head_dim: int) -> RopeSpec:
    """Recover Llama 3's scaling from the divisors of the frequencies that its GGUF files hold instead.

    The largest divisor is `factor`; the whole curve is computed again from it and must agree, so that
    factors made in another way are refused rather than approximated.
    """
    factor = float(divisors.max())
    if factor < 1.0 + 1e-6:
        return RopeSpec(**common)
    spec = RopeSpec(
        **common,
        scaling="llama3",
        factor=round(factor, 4),
        low_freq_factor=LLAMA3_LOW,
        high_freq_factor=LLAMA3_HIGH,
        original_max_position=LLAMA3_ORIGINAL,
    )
    expected = llama3_divisors(spec, head_dim)
    if not all(abs(d - e) <= 1e-8 + 1e-3 * abs(e) for d, e in zip(divisors, expected, strict=True)):
        raise ModelFileError(
            file.path, f"tensor {LLAMA3_TENSOR} is not Llama 3's scaling, the only one supported"
        )
    return spec


def llama3_divisors(rope: RopeSpec, head_dim: int) -> list[float]:
    """What Llama 3.1 divides each of the head_dim / 2 rotary frequencies by."""
    divisors = []
    for index in range(head_dim // 2):
        wavelength = 2 * math.pi * rope.theta ** (2 * index / head_dim)
        turns = rope.original_max_position / wavelength  # how often it turns over the trained context
        ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = min(1.0, max(0.0, ramp))
        divisors.append(1.0 / ((1.0 - kept) / rope.factor + kept))
    return divisors
