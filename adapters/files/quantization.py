"""Reads how the matrices of a Hugging Face folder are quantised: `quantization_config` of config.json.

The keys are those that transformers and vLLM read, of the methods fp8 (DeepSeek's and Qwen's blocks too),
compressed-tensors, ModelOpt, GPTQ, AWQ and gpt-oss's MXFP4. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from microvllm.adapters.files.fields import Fields, shorten

KEY = "quantization_config"
# Matrices that no method quantises, whatever its part of config.json says of them.
PLAIN_ROLES = ("embed", "inputs_embed", "router", "shared_scale", "delta_conv", "conv")
LINEAR = "Linear"  # the class of torch that stands for all matrices but the embeddings


class Scheme(msgspec.Struct, frozen=True, kw_only=True):
    """How a matrix [out, in] is stored: codes of `bits` bits and scales that they are multiplied by.

    `layout`: "scaled" (a code for each weight), "packed", "gptq" or "awq" (several codes in 32 bits), see
    `adapters.formats.dequantize`; or "mxfp4", see `adapters.formats.mxfp4`. `block`: rows and columns that
    share a scale, 0 for all. Codes are floating-point numbers (e4m3; of "mxfp4" e2m1) or integers, from which
    a zero point is subtracted: half of their range if `symmetric`. Of GPTQ's first format the stored zero
    points are too small by `zero_offset`. `ordered`: which scales belong to a column is stored too, as its
    group may be anywhere ("act-order"). `activations`: how the checkpoint wants them rounded to e4m3: "none",
    "token" (by each token's largest) or "tensor" (by a stored scale).
    """

    layout: str
    bits: int = 8
    block: tuple[int, int] = (0, 0)
    is_float: bool = False
    symmetric: bool = True
    zero_offset: int = 0
    ordered: bool = False
    activations: str = "none"


# Targets and their scheme.
Groups = tuple[tuple[tuple[str, ...], Scheme], ...]


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """Which modules of a checkpoint are quantised, and how.

    `groups`: targets and their scheme. Targets and `ignored` are `LINEAR`, "re:" and a regular expression,
    a pattern of the shell, or a part of a module's name between dots. `with_head`: the head is a target too.
    `fp8_cache`: keys and values are to be cached in e4m3, by scales that are stored.
    `on_loading`: the files have plain weights, which are quantised as they are loaded. Then experts have
    groups of their own, `expert_groups`, whose targets name the module that holds all of a layer's experts.
    """

    method: str
    groups: Groups
    expert_groups: Groups = ()
    ignored: tuple[str, ...] = ()
    with_head: bool = False
    fp8_cache: bool = False
    on_loading: bool = False

    def scheme_of(self, role: str, module: str) -> Scheme | None:
        """The scheme of the weight of a module in its role of the model; None if it is plain."""
        if role in PLAIN_ROLES or (role == "lm_head" and not self.with_head):
            return None
        return self.scheme(module)

    def scheme(self, module: str, groups: Groups | None = None) -> Scheme | None:
        """The scheme of a linear module by its name; None if it is not quantised."""
        if any(_matches(pattern, module) for pattern in self.ignored):
            return None
        for wanted in (lambda target: _matches(target, module), LINEAR.__eq__):
            for targets, scheme in self.groups if groups is None else groups:
                if any(wanted(target) for target in targets):
                    return scheme
        return None

    def scheme_of_experts(self, module: str) -> Scheme | None:
        """The scheme that experts get on loading; module: the name of what holds those of a layer."""
        return self.scheme(module, self.expert_groups)

    def targets_of(self, module: str) -> list[str]:
        """The targets that name a module, or experts."""
        targets = (target for names, _ in (*self.groups, *self.expert_groups) for target in names)
        return [target for target in dict.fromkeys(targets) if _matches(target, module)]


def read_quantization(config: Fields) -> Quantization | None:
    """Read the part of config.json; None for plain weights. Raises as `read_method` does."""
    part = config.part(KEY) or config.part("compression_config")  # an older name of the same
    return None if part is None else read_method(part)


def read_method(part: Fields) -> Quantization:
    """Read the object of a method. Raises `ModelFileError` naming the key that no reader here takes."""
    method = part.text("quant_method")
    if method not in METHODS:
        raise part.error("quant_method", f"{shorten(method)} is not supported: {', '.join(METHODS)} are")
    return msgspec.structs.replace(METHODS[method](part), fp8_cache=_has_fp8_cache(part))


def _has_fp8_cache(config: Fields) -> bool:
    """Whether keys and values are to be cached in e4m3, with a scale for each layer.

    ModelOpt's key is `kv_cache_quant_algo`, compressed-tensors' `kv_cache_scheme`.
    """
    key, inner = "kv_cache_quant_algo", config.part("quantization") or config
    if inner.get(key):
        return _choice(inner, key, None, ("FP8",)) == "FP8"
    scheme = config.part("kv_cache_scheme")
    if scheme is None:
        return False
    if scheme.size("num_bits") != 8:
        raise scheme.error("num_bits", f"must be 8, got {shorten(scheme.get('num_bits'))}")
    _choice(scheme, "type", None, ("float",))
    _choice(scheme, "strategy", "tensor", ("tensor",))
    if scheme.flag("dynamic"):
        raise scheme.error("dynamic", "is true: the scales of keys and values have to be stored")
    if not scheme.flag("symmetric", True):
        raise scheme.error("symmetric", "is false, which keys and values cannot be")
    return True


def _refuse(config: Fields, key: str, reason: str) -> None:
    if config.get(key) not in (None, {}, [], "", False):
        raise config.error(key, f"is set: {reason}")


ACTIVATIONS = {"dynamic": "token", "static": "tensor"}


def _fp8(config: Fields) -> Quantization:
    activations = _choice(config, "activation_scheme", "dynamic", ("dynamic", "static"))
    _choice(config, "fmt", "e4m3", ("e4m3",))
    block = (0, 0) if config.get("weight_block_size") is None else _pair(config, "weight_block_size")
    ignored = _names(config, "ignored_layers", "modules_to_not_convert")
    scheme = Scheme(layout="scaled", is_float=True, block=block, activations=ACTIVATIONS[activations])
    return Quantization(method="fp8", groups=(((LINEAR,), scheme),), ignored=ignored)


def _modelopt(config: Fields) -> Quantization:
    config = config.part("quantization") or config
    kinds = {"FP8": ((0, 0), "tensor"), "FP8_PER_CHANNEL_PER_TOKEN": ((1, 0), "token")}
    block, activations = kinds[_choice(config, "quant_algo", None, tuple(kinds))]
    scheme = Scheme(layout="scaled", is_float=True, block=block, activations=activations)
    ignored = _names(config, "exclude_modules", "ignore")
    return Quantization(method="modelopt", groups=(((LINEAR,), scheme),), ignored=ignored)


def _compressed(config: Fields) -> Quantization:
    for key in ("sparsity_config", "transform_config"):
        inner = config.part(key)
        if inner is not None and inner.get("format") != "dense":
            raise config.error(key, "is set: only quantised weights are supported")
    every = config.text("format", "")
    parts = config.part("config_groups")
    if parts is None:
        raise config.error("config_groups", "is missing")
    groups = []
    for name in parts:
        group = parts.part(name)
        if group is None:
            raise parts.error(name, "is empty")
        targets = _names(group, "targets")
        for target in targets:
            if target != LINEAR and "." not in target and not target.startswith("re:"):
                raise group.error(
                    "targets", f"has {shorten(target)}; {LINEAR}, modules and re: are supported"
                )
        _refuse(group, "output_activations", "outputs are not quantised here")
        weights = group.part("weights")
        if weights is None:
            raise group.error("weights", "is missing: activations alone are not quantised here")
        form = group.text("format", every)
        if form not in COMPRESSED:
            raise (group if "format" in group else config).error(
                "format", f"{shorten(form)} is not supported: {', '.join(COMPRESSED)} are"
            )
        scheme = _compressed_scheme(weights, *COMPRESSED[form])
        inputs = group.part("input_activations")
        if inputs is not None and inputs.get("type") == "float" and inputs.get("num_bits") == 8:
            kind = "token" if inputs.get("dynamic", False) else "tensor"
            scheme = msgspec.structs.replace(scheme, activations=kind)
        groups.append((targets, scheme))
    return Quantization(
        method="compressed-tensors",
        groups=tuple(groups),
        ignored=_names(config, "ignore"),
        with_head=True,
    )


def _compressed_scheme(config: Fields, kind: str, widths: tuple[int, ...], strategies: str) -> Scheme:
    bits = config.size("num_bits")
    if bits not in widths:
        raise config.error("num_bits", f"must be {' or '.join(map(str, widths))} in this format, got {bits}")
    _choice(config, "type", "int", (kind,))
    if config.flag("dynamic"):
        raise config.error("dynamic", "is true: scales of weights are stored")
    packed = len(widths) > 1
    symmetric = config.flag("symmetric", True)
    if not symmetric and not packed:
        raise config.error("symmetric", "is false, which only packed weights may be")
    size = config.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = _choice(config, "strategy", default, tuple(strategies.split()))
    block = {"tensor": (0, 0), "channel": (1, 0)}.get(strategy)
    if block is None:
        block = (1, config.size("group_size")) if strategy == "group" else _pair(config, "block_structure")
    order = config.get("actorder")
    if order not in (None, False, True, "group", "dynamic", "weight", "static"):
        raise config.error("actorder", f"{shorten(order)} is not supported")
    # "weight" sorts the columns only while they are quantised: nothing of it is in the file.
    ordered = order in (True, "group", "dynamic")
    if ordered and not (packed and strategy == "group"):
        raise config.error("actorder", "is set: only packed weights in groups may have it")
    layout = "packed" if packed else "scaled"
    return Scheme(
        layout=layout,
        bits=bits,
        block=block,
        is_float=kind == "float",
        symmetric=symmetric,
        ordered=ordered,
    )


# Format: the type of its codes, their widths, and what may share a scale.
COMPRESSED: Mapping[str, tuple[str, tuple[int, ...], str]] = {
    "float-quantized": ("float", (8,), "tensor channel block"),
    "int-quantized": ("int", (8,), "tensor channel"),
    "pack-quantized": ("int", (4, 8), "channel group"),
}


def _gptq(config: Fields) -> Quantization:
    bits = config.size("bits")
    if bits not in (4, 8):
        raise config.error("bits", f"must be 4 or 8, got {bits}")
    _refuse(config, "dynamic", "one scheme for all modules is supported")
    _refuse(config, "is_marlin_format", "weights in the order of one kernel are not supported")
    _choice(config, "pack_dtype", "int32", ("int32",))
    key = "checkpoint_format" if "checkpoint_format" in config else "format"
    form = _choice(config, key, "gptq", ("gptq", "gptq_v2"))
    modules = config.get("modules_in_block_to_quantize") or [[LINEAR]]
    if not isinstance(modules, list):
        raise config.error("modules_in_block_to_quantize", "must be a list of names")
    flat = [name for entry in modules for name in (entry if isinstance(entry, list) else [entry])]
    if not all(isinstance(name, str) for name in flat):
        raise config.error("modules_in_block_to_quantize", "must be a list of names")
    scheme = Scheme(
        layout="gptq",
        bits=bits,
        block=(1, _group_size(config, "group_size")),
        symmetric=config.flag("sym"),
        zero_offset=int(form == "gptq"),
        ordered=config.flag("desc_act"),
    )
    return Quantization(
        method="gptq",
        groups=((tuple(flat), scheme),),
        ignored=_names(config, "modules_to_not_convert"),
        with_head=config.flag("lm_head"),
    )


def _awq(config: Fields) -> Quantization:
    key = "bits" if "bits" in config else "w_bit"
    if config.size(key) != 4:
        raise config.error(key, f"must be 4, got {shorten(config.get(key))}")
    if not config.flag("zero_point", True):
        raise config.error("zero_point", "is false: zero points are expected")
    version = config.text("version", "gemm")
    if version.lower() != "gemm":
        raise config.error("version", f"must be gemm, got {shorten(version)}")
    size = _group_size(config, "group_size" if "group_size" in config else "q_group_size")
    scheme = Scheme(layout="awq", bits=4, block=(1, size), symmetric=False)
    ignored = _names(config, "modules_to_not_convert")
    return Quantization(method="awq", groups=(((LINEAR,), scheme),), ignored=ignored)


def _mxfp4(config: Fields) -> Quantization:
    """The experts alone, whatever else `modules_to_not_convert` names; see `adapters.formats.mxfp4`."""
    ignored = _names(config, "modules_to_not_convert")
    # Of modules that hold the experts' tensors a pattern without them is enough.
    inner = tuple(f"{name}.*" for name in ignored if "*" in name and not name.startswith("re:"))
    scheme = Scheme(layout="mxfp4", bits=4, block=(1, 32), is_float=True)
    return Quantization(method="mxfp4", groups=((("experts",), scheme),), ignored=ignored + inner)


METHODS: Mapping[str, Callable[[Fields], Quantization]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
}


# Rows and columns that share a scale, by the value of `--quantization` for plain weights; 0 for all.
ON_LOADING: Mapping[str, tuple[int, int]] = {
    "fp8": (0, 0),
    "fp8_per_tensor": (0, 0),
    "fp8_per_channel": (1, 0),
    "fp8_per_block": (128, 128),
}
# Values of `--quantization`. Those in _marlin name vLLM's kernels for the same checkpoints.
QUANTIZATIONS = tuple(dict.fromkeys((*METHODS, *ON_LOADING, "online", "gptq_marlin", "awq_marlin", "gguf")))


def scheme_on_loading(requested: str) -> Scheme:
    """Of matrices of a plain checkpoint; `requested`: see `ON_LOADING`."""
    return Scheme(layout="scaled", is_float=True, block=ON_LOADING[requested], activations="token")


def _choice(config: Fields, key: str, default: str | None, choices: tuple[str, ...]) -> str:
    value = config.text(key, default)
    if value not in choices:
        raise config.error(key, f"{shorten(value)} is not supported: {', '.join(choices)} is")
    return value


def _group_size(config: Fields, key: str) -> int:
    """Columns that share a scale; 0, in files -1, for all of them."""
    return 0 if config.get(key) == -1 else config.size(key)


def _pair(config: Fields, key: str) -> tuple[int, int]:
    """Two sizes: [128, 128] or "128x128"."""
    value = config.get(key)
    sizes: Any = value.split("x") if isinstance(value, str) else value
    if not isinstance(sizes, list) or len(sizes) != 2:
        raise config.error(key, f"must be two sizes, got {shorten(value)}")
    try:
        rows, columns = (int(size) for size in sizes)
    except (TypeError, ValueError, OverflowError):
        raise config.error(key, f"must be two sizes, got {shorten(value)}") from None
    if not 0 < rows < 1 << 31 or not 0 < columns < 1 << 31:
        raise config.error(key, "must be two sizes above 0")
    return rows, columns


def _names(config: Fields, *keys: str) -> tuple[str, ...]:
    """The patterns under these keys together."""
    found: list[str] = []
    for key in keys:
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise config.error(key, "must be a list of names")
        for name in names:
            try:
                re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
            except re.error as error:
                raise config.error(key, f"has {shorten(name)}, which is no expression ({error})") from None
        found += names
    return tuple(found)


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern stands for a module: see `Quantization`."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    if any(letter in pattern for letter in "*?["):
        return fnmatchcase(module, pattern)
    return f".{pattern}." in f".{module}."


def why_not_quantized(requested: str, stored: str | None, model: str) -> str | None:
    """What is wrong with a value of `--quantization` for a checkpoint; None if nothing is.

    `stored` is the method that quantised it, None for plain weights.
    """
    if stored is None and requested in ON_LOADING:
        return None
    if stored == requested.removesuffix("_marlin"):
        return None
    if stored is None:
        return (
            f"--quantization {requested}: {model} has plain weights, which loading quantises to "
            f"{', '.join(ON_LOADING)}"
        )
    return f"--quantization {requested}: {model} is quantised as {stored}"
