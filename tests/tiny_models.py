"""Small random models of every family, written the way real ones are: for tests, and for trying things out.

The weights come from transformers' own classes and the GGUF files from gguf's own writer, so that nothing
here shares code with the readers under test. Sizes are odd on purpose: 9 query heads over 3 KV heads, and a
head size that is not hidden / heads wherever the family allows it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENIZER_SIZE = 320
CORRECTION = ("e_score_correction_bias", "expert_bias")
QUANTIZABLE = {"hidden_size": 288, "intermediate_size": 320}  # rows of all matrices in whole blocks of 32

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog. The engine schedules every request on a token budget, "
    "and the cache keeps the keys and values of the tokens that were computed. A block is shared when it is "
    "full. Naïve café, straße, привет, 世界. 0 1 2 3 4 5 6 7 8 9 10 100 1000. The the and and in in on on."
)

GGUF_ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "lfm2_moe": "lfm2moe",
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.gate_proj_exps": "ffn_gate_exps",
    "mlp.up_proj_exps": "ffn_up_exps",
    "mlp.down_proj_exps": "ffn_down_exps",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.w1_exps": "ffn_gate_exps",
    "block_sparse_moe.w3_exps": "ffn_up_exps",
    "block_sparse_moe.w2_exps": "ffn_down_exps",
    "model.embedding_norm": "token_embd_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.w1_exps": "ffn_gate_exps",
    "feed_forward.w2_exps": "ffn_down_exps",
    "feed_forward.w3_exps": "ffn_up_exps",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
# Whose q and k llama.cpp stores with neighbours that turn together.
GGUF_INTERLEAVED = ("llama", "granite", "smollm3")


def make_hf_folder(
    path: Path,
    family: str,
    *,
    seed: int = 0,
    tie: bool = False,
    sharded: bool = False,
    dtype: str = "float32",
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a random model of `family`, a `model_type`, as a Hugging Face folder, and return its path.

    `overrides` go into the configuration (`hidden_size`, `num_hidden_layers`, `rope_parameters`, ...).
    `dtype` is the stored one. The same arguments give the same weights. The scale of the weights makes greedy
    text varied, and its margins wide against rounding errors of float32.
    """
    import torch
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": TOKENIZER_SIZE,
        "hidden_size": 144,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "dtype": dtype,
    }
    if family != "qwen2":
        sizes["head_dim"] = 32
    if family == "mistral":
        sizes["sliding_window"] = None
    sizes.update(overrides)
    config = transformers.AutoConfig.for_model(family, **sizes)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    model.to(getattr(torch, dtype))
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size="500KB" if sharded else "5GB")
    if tokenizer:
        write_tokenizer(path)
    return path


def randomize(model: Any, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        buffers = [each for each in model.named_buffers() if each[0].endswith(("layer_scalar", *CORRECTION))]
        for name, parameter in sorted([*model.named_parameters(), *buffers]):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(CORRECTION):
                values = 0.1 * noise
            elif name.endswith("layer_scalar"):
                values = 0.9 + 0.1 * noise
            elif name.endswith(("A_log", "dt_bias")):
                values = 0.5 * noise
            elif parameter.ndim == 1 and not name.endswith(".bias"):  # norms, and scales
                values = 1.0 + 0.2 * noise
            elif name.endswith(("bias", "sinks")):
                values = (3.0 if "sinks" in name else 0.3) * noise
            elif "embed_tokens" in name:
                values = 0.2 * noise
            else:
                values = noise * (1.5 / math.sqrt(parameter.shape[-1]))
            parameter.copy_(values)


def reference(path: Path) -> Any:
    """The folder as transformers loads it: float32, plain attention, ready to compute."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@functools.lru_cache(maxsize=1)
def _backend_json() -> str:
    """A byte-level BPE tokenizer of 320 tokens, as tokenizer.json holds it; the special ones come last."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS], trainer)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    if backend.get_vocab_size() != TOKENIZER_SIZE:
        raise RuntimeError(f"the corpus gave {backend.get_vocab_size()} tokens instead of {TOKENIZER_SIZE}")
    return str(backend.to_str(pretty=False))


def token_id(token: str) -> int:
    """The id of a special token in the small tokenizer."""
    return TOKENIZER_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(token)


def write_tokenizer(path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json with a ChatML template into a folder."""
    (path / "tokenizer.json").write_text(_backend_json(), "utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")


def write_gguf(
    path: Path,
    folder: Path,
    *,
    quantization: str = "F32",
    extra_tensors: dict[str, Any] | None = None,
    extra_metadata: dict[str, Any] | None = None,
    blocks: Callable[[str, Any], tuple[str, Any] | None] | None = None,
    tensors_a_part: int = 0,
    no_tensors_first: bool = False,
) -> Path:
    """Write the model of a folder made by `make_hf_folder(dtype="float32")` as one GGUF file.

    `quantization` is a type that gguf can write: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1. Vectors stay
    F32, and so do matrices whose rows are no whole number of blocks (see `QUANTIZABLE`). Values of
    `extra_metadata` may be str, int or float, and replace those written otherwise. `blocks` gives, for a
    tensor's GGUF name and values, the type and the bytes to store in their place: [rows, bytes of a row].
    With `tensors_a_part` it is split into files of that many tensors, named as llama.cpp does.
    """
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text("utf-8"))
    architecture = GGUF_ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(
        path, architecture, split_max_tensors=tensors_a_part, small_first_shard=no_tensors_first
    )
    _add_hyperparameters(writer, config)
    add_tokenizer(writer, config["vocab_size"])
    for key, value in (extra_metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        if any(key in part for part in writer.kv_data):
            for part in writer.kv_data:
                part.pop(key, None)
        add(key, value)
    kind = gguf.GGMLQuantizationType[quantization]
    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(file))
    if architecture == "gpt-oss":
        weights = _gpt_oss_names(weights)
    for name, values in _stacked(weights).items():
        if architecture in GGUF_INTERLEAVED:
            values = _interleave(name, values, config)
        gguf_name = "" if name.endswith(".expert_bias") else _gguf_name(name)
        if name.endswith("shared_expert_gate.weight"):  # llama.cpp's converter squeezes
            values = values[0]
        if name.endswith(".expert_bias"):
            gguf_name = f"blk.{name.split('.')[2]}.exp_probs_b.bias"
        if name.endswith("conv.conv.weight"):
            values = values[:, 0]
        if architecture in ("gpt-oss", "seed_oss"):
            gguf_name = gguf_name.replace(".ffn_norm.", ".post_attention_norm.")
        instead = None if blocks is None else blocks(gguf_name, values)
        if instead is not None:
            stored = gguf.GGMLQuantizationType[instead[0]]
            writer.add_tensor(gguf_name, instead[1], raw_dtype=stored)
            continue
        fits = (
            values.ndim > 1
            and "gate_inp" not in gguf_name
            and "shortconv.conv" not in gguf_name
            and not name.endswith(".bias")
            and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        )
        stored = kind if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gpt_oss_names(weights: dict[str, Any]) -> dict[str, Any]:
    """As llama.cpp's converter has them: gate and up apart, rows of all experts [E, out, in]."""
    import numpy as np

    found = {}
    for name, values in weights.items():
        before, is_of_experts, role = name.partition(".experts.")
        suffix = "bias" if role.endswith("_bias") else "weight"
        role = role.removesuffix("_bias")
        if name.endswith(".sinks"):
            found[f"{name}.weight"] = values
        elif not is_of_experts:
            found[name] = values
        else:
            rows = values.swapaxes(1, 2) if suffix == "weight" else values
            parts = {"down_proj": rows}
            if role == "gate_up_proj":
                parts = {"gate_proj": rows[:, ::2], "up_proj": rows[:, 1::2]}
            for part, of_part in parts.items():
                found[f"{before}.{part}_exps.{suffix}"] = np.ascontiguousarray(of_part)
    return found


def _stacked(weights: dict[str, Any]) -> dict[str, Any]:
    """The matrices of all experts of a layer as one tensor, as llama.cpp has them."""
    import numpy as np

    stacks: dict[str, dict[int, Any]] = {}
    plain = {}
    for name, values in weights.items():
        before, found, rest = name.partition(".experts.")
        if found:
            number, role, suffix = rest.split(".")
            stacks.setdefault(f"{before}.{role}_exps.{suffix}", {})[int(number)] = values
        else:
            plain[name] = values
    return plain | {name: np.stack([of[i] for i in range(len(of))]) for name, of in stacks.items()}


def _add_hyperparameters(writer: Any, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    heads = config["num_key_value_heads"]
    if "conv_L_cache" in config:
        writer.add_shortconv_l_cache(config["conv_L_cache"])
        heads = [heads * (kind != "conv") for kind in config["layer_types"]]
    writer.add_head_count_kv(heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config["rope_parameters"]
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["norm_eps"])
    count = config.get("num_experts", config.get("num_local_experts"))
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        if "shared_expert_intermediate_size" in config:
            writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config["model_type"] == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if config["model_type"] == "lfm2_moe":
        import gguf

        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config["model_type"] == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])


def add_tokenizer(writer: Any, vocab_size: int) -> None:
    import gguf

    model = json.loads(_backend_json())["model"]
    tokens = {index: token for token, index in model["vocab"].items()}
    tokens.update({token_id(token): token for token in SPECIAL_TOKENS})
    kinds = [gguf.TokenType.NORMAL] * TOKENIZER_SIZE
    for token in SPECIAL_TOKENS:
        kinds[token_id(token)] = gguf.TokenType.CONTROL
    padding = range(TOKENIZER_SIZE, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[index] for index in range(TOKENIZER_SIZE)] + [f"[PAD{i}]" for i in padding])
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED for _ in padding])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(token_id("<|endoftext|>"))
    writer.add_eos_token_id(token_id("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.{suffix}"


def _interleave(name: str, values: Any, config: dict[str, Any]) -> Any:
    """The order in which llama.cpp stores q and k rows of Llama models: neighbours turn together."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for projection, key in heads.items():
        if projection in name:
            paired = values.reshape(config[key], 2, values.shape[0] // config[key] // 2, -1)
            return paired.swapaxes(1, 2).reshape(values.shape)
    return values


HARMONY_TOKENS = (
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"),
    *("<|return|>", "<|call|>", "<|refusal|>"),
)
# What there is of gpt-oss's own: a system message, tools as a developer's, calls and results as messages.
HARMONY_TEMPLATE = (
    "<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>"
    "{% if tools %}<|start|>developer<|message|>{% for tool in tools %}{{ tool.function.name }}\n{% endfor %}"
    "<|end|>{% endif %}"
    "{% for message in messages %}"
    "{% if message.tool_calls %}<|start|>assistant<|channel|>commentary to=functions."
    "{{ message.tool_calls[0].function.name }} <|constrain|>json<|message|>"
    "{{ message.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif message.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>"
    "{{ message.content }}<|end|>"
    "{% else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def write_harmony_tokenizer(path: Path) -> None:
    """Write a tokenizer with gpt-oss's special tokens, a template, and the tokens that end a generation."""
    from tokenizers import AddedToken, Tokenizer

    write_tokenizer(path)
    backend = Tokenizer.from_str(_backend_json())
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in HARMONY_TOKENS]
    )
    (path / "tokenizer.json").write_text(str(backend.to_str(pretty=False)), "utf-8")
    settings = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    settings |= {"eos_token": "<|return|>", "chat_template": HARMONY_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    ends = [backend.token_to_id(token) for token in ("<|return|>", "<|endoftext|>", "<|call|>")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), "utf-8")
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": ends[0]}), "utf-8")
