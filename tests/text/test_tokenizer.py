"""The tokenizer: ids of the real SmolLM2 vocabulary, GGUF and folder forms, and files that are wrong."""

import json
import random
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from microvllm.adapters.errors import ModelFileError
from microvllm.runtime.errors import ConfigError, EngineError, InvalidRequestError
from microvllm.runtime.options.find_model import DEMO_MODEL, find_model
from microvllm.runtime.text.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from microvllm.runtime.text.growth import check_growth
from microvllm.runtime.text.tokenizer import Tokenizer

# Ids that llama.cpp gives for the same file (llama-cpp-python 0.3.36, `tokenize(..., special=True)`).
SMOLLM2_IDS = {
    "Hello world 12345": [19556, 905, 216, 33, 34, 35, 36, 37],
    "  a\n\n b  \t c": [216, 253, 1116, 278, 256, 197, 265],
    "日本語 😀 café": [23274, 115, 40993, 179, 120, 248, 40303, 218, 37366],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
    " x  y": [1792, 216, 329],
    "it's 9's": [269, 506, 216, 41, 506],
    "": [],
}
TEXTS = [
    *SMOLLM2_IDS,
    "def f(x):\n    return x ** 2  # ½ ٣\n",
    "a\x00b",
    "tab\t\tand\r\nlines\n\n\n",
    "e\u0301 \u00a0\u3000 \u200d👩‍👩‍👧",
    "'S 'T don't DON'T 1,000.50",
]


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    return find_model(DEMO_MODEL)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_path)


def test_smollm2_is_read_from_its_gguf(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.bos_token_id, smollm2.eos_token_id) == (49152, 1, 2)
    assert smollm2.special_tokens["bos_token"] == "<|im_start|>"
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.id_to_token(260) == "Ġthe"
    assert smollm2.chat_template is not None and "<|im_start|>" in smollm2.chat_template


@pytest.mark.parametrize("text", SMOLLM2_IDS)
def test_smollm2_ids_are_those_of_llama_cpp(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.encode(text) == SMOLLM2_IDS[text]


def test_random_texts_agree_with_llama_cpp(smollm2: Tokenizer, smollm2_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    other = llama_cpp.Llama(str(smollm2_path), vocab_only=True, verbose=False)
    draw = random.Random(0)
    bits = [
        "a",
        " ",
        "  ",
        "\n",
        "\t",
        "1",
        "23",
        "'s",
        "é",
        "日",
        "😀",
        "<|im_end|>",
        "!",
        "..",
        "The ",
        "½",
        "_",
    ]
    for _ in range(300):
        text = "".join(draw.choice(bits) for _ in range(draw.randint(1, 30)))
        assert smollm2.encode(text) == other.tokenize(text.encode(), add_bos=True, special=True), text


@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


def test_loading_a_large_vocabulary_is_quick(smollm2_path: Path) -> None:
    started = time.process_time()
    Tokenizer.load(smollm2_path)
    assert time.process_time() - started < 10  # 0.4 s on a quiet machine


def test_token_bytes_say_what_decode_says(smollm2: Tokenizer) -> None:
    assert smollm2.token_bytes is not None
    for index in range(smollm2.vocab_size):
        assert smollm2.token_bytes.all[index].decode("utf-8", "replace") == smollm2.decode([index], False)
        assert smollm2.token_bytes.visible[index].decode("utf-8", "replace") == smollm2.decode([index], True)


def test_a_lone_surrogate_is_the_requests_fault(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        smollm2.encode("a\ud800b")


def test_others_go_on_while_a_text_is_encoded(smollm2: Tokenizer) -> None:
    with ThreadPoolExecutor(1) as pool:
        encoded = pool.submit(smollm2.encode, " ".join(map(str, range(30_000))))
        turns = 0
        while not encoded.done():
            time.sleep(0.001)
            turns += 1
    assert turns > 10 and len(encoded.result()) > 30_000


def test_ids_outside_the_vocabulary_decode_to_nothing(smollm2: Tokenizer) -> None:
    assert smollm2.decode([-1, 19556, 49152, 2**40]) == "Hello"
    assert [smollm2.id_to_token(index) for index in (-1, 49152, 2**40)] == [None, None, None]


# --- GGUF metadata ---


def sentencepiece_metadata() -> dict[str, object]:
    """A small "llama" vocabulary: byte tokens, one user-defined token, pieces with scores."""
    tokens, types = ["<unk>", "<s>", "</s>"], [2, 3, 3]
    for byte in range(256):
        tokens.append(f"<0x{byte:02X}>")
        types.append(6)
    tokens.append("<mask>")
    types.append(4)
    pieces = ["▁a", "ab", "▁ab", "bc", "abc", "▁▁", "cab", "▁c", "ca", "▁abc"]
    tokens += [*pieces, *"▁abcdé日"]
    types += [1] * (len(tokens) - len(types))
    first = tokens.index("▁a")
    scores = [0.0] * first + [-float(index) for index in range(len(tokens) - first)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def byte_level_metadata(**changes: object) -> dict[str, object]:
    """All single bytes in GPT-2's alphabet (first 33 to 126), three merges and one control token."""
    alphabet = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*alphabet, "ab", "abc", "Ġa", "<|end|>"],
        "tokenizer.ggml.token_type": [1] * (len(alphabet) + 3) + [3],
        "tokenizer.ggml.merges": ["a b", "ab c", "Ġ a"],
        "tokenizer.ggml.eos_token_id": len(alphabet) + 3,
        "tokenizer.ggml.bos_token_id": len(alphabet) + 3,
    }
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    return metadata


def build(metadata: dict[str, object]) -> Tokenizer:
    built = build_tokenizer(Path("model.gguf"), metadata)
    return Tokenizer(built.backend, built.named, built.chat_template)


def best_score_merges(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """SentencePiece BPE by its definition: join the neighbours with the best-scored union."""
    rank = dict(zip(tokens, scores, strict=True))
    pieces = list(text)
    while True:
        joined = [(rank[a + b], -index) for index, (a, b) in enumerate(pairwise(pieces)) if a + b in rank]
        if not joined:
            return pieces
        index = -max(joined)[1]
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]


def test_sentencepiece_merges_by_score() -> None:
    metadata = sentencepiece_metadata()
    tokenizer = build(metadata)
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("aabbcc d") for _ in range(draw.randint(1, 20)))
        expected = best_score_merges("▁" + text.replace(" ", "▁"), tokens, scores.tolist())  # type: ignore
        ids = tokenizer.encode(text)
        assert [tokenizer.id_to_token(index) for index in ids[1:]] == expected
        assert ids[0] == 1  # BOS by default
        assert tokenizer.decode(ids) == text


def test_sentencepiece_byte_fallback_and_added_tokens() -> None:
    tokenizer = build(sentencepiece_metadata())
    text = "a😀<mask>é</s>\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert {3 + byte for byte in "😀".encode()} <= set(ids)
    assert ids.count(tokenizer.backend.token_to_id("<mask>")) == 1 and ids.count(2) == 1
    assert tokenizer.special_ids == {1, 2}


def test_sentencepiece_without_a_space_prefix() -> None:
    metadata = {**sentencepiece_metadata(), "tokenizer.ggml.add_space_prefix": False}
    tokenizer = build(metadata)
    assert tokenizer.encode("abc", add_special_tokens=False) == [tokenizer.backend.token_to_id("abc")]
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


def test_bos_and_eos_follow_the_metadata() -> None:
    plain = build(byte_level_metadata()).encode("abc")
    end = len(byte_level_metadata()["tokenizer.ggml.tokens"]) - 1  # type: ignore[arg-type]
    assert build(byte_level_metadata(add_bos_token=True, add_eos_token=True)).encode("abc") == [
        end,
        *plain,
        end,
    ]
    with_bos = build(byte_level_metadata(pre="llama-bpe"))  # llama.cpp's default for this pre-tokenizer
    assert with_bos.encode("abc") == [end, *plain]
    assert with_bos.encode("abc", add_special_tokens=False) == plain


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab 123 45", ["ab", "Ġ123", "Ġ45"]),
        ("smollm", "ab 123 45", ["ab", "Ġ", "1", "2", "3", "Ġ", "4", "5"]),
        ("llama-bpe", "ab 12345", ["ab", "Ġ", "123", "45"]),
        ("qwen2", "it'S 12", ["it", "'S", "Ġ", "1", "2"]),
        ("tekken", "helloWorld 12", ["hello", "World", "Ġ", "1", "2"]),
        ("default", "a==b 1234", ["a", "==", "b", "Ġ", "123", "4"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(pre: str, text: str, pieces: list[str]) -> None:
    splitter = build(byte_level_metadata(pre=pre)).backend.pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str(text)] == pieces


RENAMED = {
    "llama-bpe": ["falcon3", "falcon-h1", "pixtral", "lfm2", "midm-2.0", "jina-v5-nano"],
    "smaug-bpe": ["dbrx", "glm4", "chatglm-bpe"],
    "gpt-2": ["phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "exaone4", "a.x-4.0", "trillion"],
    "smollm": ["refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
    "qwen2": ["megrez", "hunyuan", "kormo", "stablelm2", "solar-open", "grok-2", "f2llmv2"],
}


@pytest.mark.parametrize(("known", "name"), [(k, n) for k, names in RENAMED.items() for n in names])
def test_a_renamed_pre_tokenizer_is_the_one_it_renames(known: str, name: str) -> None:
    tokens = [build(byte_level_metadata(pre=pre)) for pre in (known, name)]
    text = "Abc 1234, it'S abc's défi  \n\n日本 don't\t==x  12"
    assert tokens[0].encode(text) == tokens[1].encode(text), "BOS included"
    pieces = [tokenizer.backend.pre_tokenizer.pre_tokenize_str(text) for tokenizer in tokens]
    assert pieces[0] == pieces[1]


def test_splits_are_those_of_the_models_own_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Qwen3.5 in transformers, and of GPT-4o in tiktoken."""
    from tiktoken_ext import openai_public
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: {})
    assert PRE_TOKENIZERS["qwen35"].splits == (PRETOKENIZE_REGEX,) and PRE_TOKENIZERS["qwen35"].nfc
    assert PRE_TOKENIZERS["gpt-4o"].splits == (openai_public.o200k_base()["pat_str"],)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("deepseek-v3", ["ab", " =", "x", "123", "45", "漢字かな", "!foo", " ?\n\n", " ", " end"]),
        (
            "seed-coder",
            ["ab", " =", "x", "1", "2", "3", "4", "5", "漢字かな", "!foo", " ?", "\n\n", " ", " end"],
        ),
    ],
)
def test_texts_are_split_as_by_the_models_authors(pre: str, expected: list[str]) -> None:
    backend = build(byte_level_metadata(pre=pre)).backend
    text = "ab =x12345漢字かな!foo ?\n\n  end"
    found = [text[slice(*span)] for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert found == expected


def test_every_pre_tokenizer_builds() -> None:
    for pre in PRE_TOKENIZERS:
        tokenizer = build(byte_level_metadata(pre=pre))
        text = "Abc 123, défi  \n\n日本 don't"
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"pre": "falcon9"}, "tokenizer.ggml.pre is 'falcon9'"),
        ({"pre": 3}, "tokenizer.ggml.pre is 3"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "tokenizer.ggml.tokens holds the same token twice"),
        ({"tokens": "text"}, "tokenizer.ggml.tokens is not an array"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries"),
        ({"merges": ["x yyy"]}, "tokenizer.ggml.merges does not fit"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"eos_token_id": "1"}, "tokenizer.ggml.eos_token_id must be a token id, got '1'"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_bad_metadata_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        build(byte_level_metadata(**changes))
    assert named in str(caught.value) and "model.gguf" in str(caught.value)


def test_padding_of_a_vocabulary_is_harmless() -> None:
    """Tokens without text, and more types than tokens; llama.cpp takes both."""
    metadata = byte_level_metadata()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    padded = {"tokens": [*tokens, "", ""], "token_type": [*types, 1, 1, 1, 5]}  # type: ignore[misc]
    plain, tokenizer = build(metadata), build(byte_level_metadata(**padded))
    assert tokenizer.vocab_size == plain.vocab_size + 2
    assert tokenizer.encode("abc abd") == plain.encode("abc abd")
    assert tokenizer.decode([*plain.encode("abc"), plain.vocab_size, plain.vocab_size + 1]) == "abc"


# --- Hugging Face folders ---


def folder(path: Path, config: object = None, **files: str) -> Path:
    """A model folder with the small byte-level tokenizer as tokenizer.json."""
    build(byte_level_metadata()).backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text, "utf-8")
    return path


def test_folder_gives_named_tokens_and_template(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<|end|>"},
        "eos_token": "<|end|>",
        "pad_token": None,
        "chat_template": "T",
    }
    tokenizer = Tokenizer.load(folder(tmp_path, config))
    assert tokenizer.special_tokens == {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.vocab_size - 1
    assert tokenizer.chat_template == "T"


def test_template_sources_in_order(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert Tokenizer.load(folder(tmp_path, {"chat_template": named})).chat_template == "plain"
    assert Tokenizer.load(folder(tmp_path, {"chat_template": named[:1]})).chat_template is None
    assert (
        Tokenizer.load(folder(tmp_path, {"chat_template": "x"}, chat_template__jinja="J")).chat_template
        == "J"
    )


def test_named_templates_are_those_that_transformers_finds(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for templates in ("T", named, named[:1], None):
        folder(tmp_path, {**config, "chat_template": templates})
        theirs = AutoTokenizer.from_pretrained(str(tmp_path)).chat_template
        theirs = {"default": theirs} if isinstance(theirs, str) else theirs or {}
        assert Tokenizer.load(tmp_path).chat_templates == theirs
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("from a file")
    folder(tmp_path, {**config, "chat_template": "T"})
    assert Tokenizer.load(tmp_path).chat_templates == {"tool_use": "from a file"}
    folder(tmp_path, chat_template__jinja="J")
    assert Tokenizer.load(tmp_path).chat_templates == {"tool_use": "from a file", "default": "J"}
    assert (
        AutoTokenizer.from_pretrained(str(tmp_path)).chat_template == Tokenizer.load(tmp_path).chat_templates
    )


def test_truncation_in_the_file_does_not_shorten_prompts(tmp_path: Path) -> None:
    backend = Backend.from_file(str(folder(tmp_path) / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("x" * 50)) == 50


def test_folder_tokenizes_as_transformers_does(tmp_path: Path, smollm2: Tokenizer) -> None:
    from transformers import AutoTokenizer

    smollm2.backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "add_bos_token": True,
        "added_tokens_decoder": {
            "49152": {"content": "<think>", "special": False},
            "0": {"content": "<|endoftext|>"},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    assert ours.vocab_size == len(theirs) == 49153
    assert ours.eos_token_id == theirs.eos_token_id == 2
    for text in [*TEXTS, "<think>a</think>"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_vocabulary_files_alone_are_converted_by_transformers(tmp_path: Path) -> None:
    metadata = byte_level_metadata()
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))  # type: ignore
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))  # type: ignore[arg-type]
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<|end|>",
        "bos_token": "<|end|>",
        "unk_token": "<|end|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).encode("abc a<|end|>") == build(metadata).encode("abc a<|end|>")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", "", "tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer.json", "[]", "tokenizer.json"),
        ("tokenizer.json", "<html>", "tokenizer.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be"),
        ("special_tokens_map.json", "x", "special_tokens_map.json"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, name: str, content: str, problem: str) -> None:
    folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(tmp_path)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def with_rules(path: Path, **rules: object) -> Path:
    """A model folder whose tokenizer.json has other rules."""
    file = folder(path) / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **rules}), "utf-8")
    return path


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
CHARSMAP = b64encode((0).to_bytes(4, "little") + b"short\0" + b"x" * 300 + b"\0").decode()


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "Precompiled"),
        ({"normalizer": {**REPLACE, "content": "x" * 257}}, "its normalizer makes 257 characters of one"),
        ({"normalizer": {**REPLACE, "pattern": {"Regex": "b*"}, "content": "x" * 256}}, "makes 257"),
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 9}}, "normalizer makes 512"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 1000}}, "normalizer makes 1001"),
        ({"decoder": {"type": "Sequence", "decoders": [REPLACE] * 9}}, "its decoder makes 512"),
        ({"model": {"type": "BPE", "vocab": {"x" * 20_000: 0}, "merges": []}}, "has 20000 characters"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_rules_that_fail_or_fill_the_memory_are_one_line(
    tmp_path: Path, rules: dict[str, object], problem: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"tokenizer\.json: is not a usable tokenizer.*{problem}"
    ) as caught:
        Tokenizer.load(with_rules(tmp_path, **rules))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_rules_of_real_models_make_no_text_much_longer() -> None:
    steps = [
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁"),
        normalizers.Replace(Regex(" {2,}"), "▁"),
    ]
    backend = Backend(BPE(vocab={"▁": 0, " " * 512: 1}, merges=[]))
    for rule in (*steps, normalizers.NFKC(), normalizers.BertNormalizer(), normalizers.Sequence(steps)):
        backend.normalizer = rule
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1)]
        )
        check_growth(backend, Path("x"))
    backend.normalizer = normalizers.Precompiled(b64decode(CHARSMAP.encode()))
    with pytest.raises(ModelFileError, match="300 characters of one"):
        check_growth(backend, Path("x"))


def test_a_text_that_the_library_cannot_cope_with_is_one_requests(tmp_path: Path) -> None:
    """Its panics are no `Exception`, and would end whatever handles these."""
    missing = {"single": [{"SpecialToken": {"id": "q", "type_id": 0}}], "pair": [], "special_tokens": {}}
    strip = {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}
    rules = {"post_processor": {"type": "TemplateProcessing", **missing}, "decoder": strip}
    tokenizer = Tokenizer.load(with_rules(tmp_path, **rules))
    with pytest.raises(InvalidRequestError, match="The model's tokenizer cannot read the text"):
        tokenizer.encode("abc")
    ids = [tokenizer.backend.token_to_id("a")]
    with pytest.raises(EngineError, match="the model's tokenizer cannot write the output"):
        tokenizer.decode(ids)


def test_folder_and_file_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"not a GGUF file")
    for file in ("model.gguf", "missing.gguf"):
        with pytest.raises(ConfigError, match=file):
            Tokenizer.load(tmp_path / file)


def test_ids_with_gaps_count_to_the_highest() -> None:
    backend = Backend(BPE(vocab={"a": 0, "b": 7}, merges=[]))
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size >= 8
    assert tokenizer.decode([3]) == "" and tokenizer.id_to_token(3) is None


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, microvllm.runtime.text.tokenizer, microvllm.runtime.text.detokenizer; "
        "import microvllm.runtime.text.chat_template, microvllm.runtime.text.gguf_tokenizer; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
