"""The detokenizer: what is streamed is what one decode gives, cut at the stop string, however it arrives."""

import codecs
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel

from microvllm.runtime.text.detokenizer import Detokenizer, StopMatcher
from microvllm.runtime.text.gguf_tokenizer import build_tokenizer
from microvllm.runtime.text.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    """Every byte, a few merged tokens that hold parts of characters, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = dict(
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("😀日ab ")
    )
    text = "".join(spelled)
    merged = [text[0:2], text[2:4], text[3:5], text[6:8], "ab", "Ġa", "Ġb"]
    tokens = [*alphabet, *merged, "<s>", "<end>"]
    types = [1] * (len(tokens) - 2) + [3, 3]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{token[0]} {token[1]}" for token in merged],
    }
    return Tokenizer(build_tokenizer(Path("b.gguf"), metadata).backend)


def sentencepiece() -> Tokenizer:
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁a",
        "a",
        "b",
        "▁",
        "日",
        "▁the",
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return Tokenizer(build_tokenizer(Path("s.gguf"), metadata).backend)


def metaspace() -> Tokenizer:
    """A decoder that is no table of bytes, so the window is used."""
    backend = Backend(BPE(vocab={"▁a": 0, "b": 1, "▁": 2, "日": 3, "▁c": 4, "<s>": 5}, merges=[]))
    backend.add_special_tokens(["<s>"])
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


def wordpiece() -> Tokenizer:
    backend = Backend(WordLevel({"he": 0, "##llo": 1, "wor": 2, "##ld": 3, "[X]": 4}, unk_token="[X]"))
    backend.add_special_tokens(["[X]"])
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(backend)


BYTES, PIECES, META, WORDS = byte_level(), sentencepiece(), metaspace(), wordpiece()


def token_id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.backend.token_to_id(token)
    assert index is not None
    return index


def ids_of(tokenizer: Tokenizer, **sizes: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.vocab_size - 1), **sizes)  # type: ignore[arg-type]


def chunks(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    return [ids[low:high] for low, high in pairwise(edges)]


def stream(detokenizer: Detokenizer, parts: list[list[int]]) -> tuple[str, str | None]:
    text, hit = "", None
    for part in parts:
        piece, hit = detokenizer.push(part)
        text += piece
        if hit is not None:
            break
    return text + detokenizer.finish(), hit


def complete_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """The text of byte-level ids without a character that is still open."""
    assert tokenizer.token_bytes is not None
    table = tokenizer.token_bytes.visible if skip else tokenizer.token_bytes.all
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(table[index] for index in ids))


def one_shot(
    ids: list[int], stops: list[str], include: bool, min_tokens: int, skip: bool
) -> tuple[str, str | None, int]:
    """The definition: decode everything, try every end from the left, cut at the first stop."""
    text = BYTES.decode(ids, skip)
    final = [len(complete_text(BYTES, ids[:count], skip)) for count in range(len(ids) + 1)]
    for end in range(final[min(min_tokens, len(ids))] + 1, final[-1] + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                count = next(index for index, length in enumerate(final) if length >= end)
                return text[: end if include else end - len(stop)], stop, count
    return text, None, len(ids)


@given(ids=ids_of(BYTES), cuts=st.lists(st.integers(0, 30)), skip=st.booleans())
def test_byte_level_pieces_join_to_decode(ids: list[int], cuts: list[int], skip: bool) -> None:
    text, hit = stream(Detokenizer(BYTES, [], skip_special_tokens=skip), chunks(ids, cuts))
    assert (text, hit) == (BYTES.decode(ids, skip), None)


@given(text=st.text(alphabet=st.characters(codec="utf-8")), data=st.data())
def test_texts_survive(text: str, data: st.DataObject) -> None:
    ids = BYTES.encode(text, add_special_tokens=False)
    cuts = data.draw(st.lists(st.integers(0, len(ids))))
    assert stream(Detokenizer(BYTES, [], skip_special_tokens=False), chunks(ids, cuts))[0] == text


STOP_TEXT = st.text(alphabet="ab 😀日é", min_size=1, max_size=4)


@settings(max_examples=400)
@given(
    text=st.text(alphabet="aab 😀日é", max_size=25),
    noise=ids_of(BYTES, max_size=3),
    at=st.integers(0, 20),
    stops=st.lists(STOP_TEXT, min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 40)),
    include=st.booleans(),
    min_tokens=st.integers(0, 12),
    skip=st.booleans(),
)
def test_stop_strings_cut_where_the_definition_says(
    text: str,
    noise: list[int],
    at: int,
    stops: list[str],
    cuts: list[int],
    include: bool,
    min_tokens: int,
    skip: bool,
) -> None:
    ids = BYTES.encode(text, add_special_tokens=False)
    ids[at:at] = noise
    detokenizer = Detokenizer(
        BYTES, [], skip_special_tokens=skip, stop=stops, include_stop_str=include, min_tokens=min_tokens
    )
    shown, hit = stream(detokenizer, chunks(ids, cuts))
    assert (shown, hit, detokenizer.num_tokens) == one_shot(ids, stops, include, min_tokens, skip)


@settings(max_examples=400)
@given(
    text=st.text(alphabet="aab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=3, max_size=5), min_size=1, max_size=3),
)
def test_what_was_shown_is_never_taken_back_and_nothing_is_held_in_vain(text: str, stops: list[str]) -> None:
    """After each character: shown + held is the text so far, and held is the longest possible stop prefix."""
    matcher = StopMatcher(stops)
    shown = ""
    for index, char in enumerate(text):
        piece, hit = matcher.feed(char)
        shown += piece
        if hit is not None:
            assert text[: index + 1] == shown + hit
            return
        seen = text[: index + 1]
        held = max(
            size
            for size in range(6)
            if any(stop[:size] == seen[len(seen) - size :] for stop in stops if size < len(stop))
        )
        assert shown == seen[: len(seen) - held]


@given(prompt=ids_of(PIECES, max_size=6), ids=ids_of(PIECES, max_size=20))
def test_sentencepiece_text_goes_on_where_the_prompt_ended(prompt: list[int], ids: list[int]) -> None:
    byte_tokens = range(3, 259)
    kept = [index for index in ids if index not in byte_tokens]  # byte runs: see the next test
    prompt = [index for index in prompt if index not in byte_tokens]
    text, _ = stream(Detokenizer(PIECES, prompt), [[index] for index in kept])
    assert PIECES.decode(prompt) + text == PIECES.decode(prompt + kept)


@given(text=st.text(alphabet="ab 日😀é", max_size=20), data=st.data())
def test_sentencepiece_bytes_become_characters(text: str, data: st.DataObject) -> None:
    ids = PIECES.encode(text, add_special_tokens=False)
    parts = chunks(ids, data.draw(st.lists(st.integers(0, 60))))
    assert stream(Detokenizer(PIECES, [1]), parts)[0] == PIECES.decode(ids) == text


def test_sentencepiece_invalid_bytes_do_not_undo_what_was_shown() -> None:
    ids = [3 + byte for byte in "é".encode()] + [3 + 0xFF, token_id(PIECES, "b")]
    assert stream(Detokenizer(PIECES, []), [[index] for index in ids])[0] == "é\ufffdb"


@pytest.mark.parametrize("tokenizer", [META, WORDS], ids=["metaspace", "wordpiece"])
@given(data=st.data())
def test_other_decoders_stream_through_the_window(tokenizer: Tokenizer, data: st.DataObject) -> None:
    assert tokenizer.token_bytes is None
    prompt = data.draw(ids_of(tokenizer, max_size=5))
    ids = data.draw(ids_of(tokenizer, max_size=25))
    text, _ = stream(Detokenizer(tokenizer, prompt), [[index] for index in ids])
    assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + ids)


# --- all decoders of the library, alone and in sequence ---

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
ODD_PIECES = [
    *("<unk>", "<pad>", "<s>", "</s>", "▁", "▁▁", "▁a", "▁日", "a", "b", "ab", "日", "é", "😀", "\ufffd"),
    *("##x", "##y", "a</w>", "b</w>", "</w>", "|", ".", ",", " ", " .", "n't"),
]
ALL_PIECES = dict.fromkeys([*ODD_PIECES, *(f"<0x{byte:02X}>" for byte in range(256)), *ALPHABET])
DECODERS = {
    "ByteLevel": decoders.ByteLevel,
    "Metaspace": decoders.Metaspace,
    "Metaspace, no prefix": lambda: decoders.Metaspace(prepend_scheme="never"),
    "WordPiece": decoders.WordPiece,
    "WordPiece, no cleanup": lambda: decoders.WordPiece(cleanup=False),
    "BPEDecoder": decoders.BPEDecoder,
    "CTC": decoders.CTC,
    "ByteFallback": decoders.ByteFallback,
    "Fuse": decoders.Fuse,
    "Replace": lambda: decoders.Replace("▁", " "),
    "Strip": lambda: decoders.Strip(" ", 2, 0),
}


def spelt(text: str) -> list[str]:
    """A text in GPT-2's alphabet, one piece a byte."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [*"".join(piece for piece, _ in splitter.pre_tokenize_str(text))]


def byte_tokens(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


CHARACTERS = st.sampled_from(["é", "日本", "😀", "😀👍", " a"])
SOME_PIECES = st.one_of(
    st.sampled_from(ODD_PIECES).map(lambda piece: [piece]),
    st.tuples(st.sampled_from(["<s>", "</s>", "<pad>"]), st.integers(1, 10)).map(
        lambda run: [run[0]] * run[1]
    ),
    CHARACTERS.map(byte_tokens),
    CHARACTERS.map(spelt),
    st.sampled_from([*ALPHABET, *byte_tokens("é😀"), "<0xFF>"]).map(lambda piece: [piece]),
)
TEXTS_OF_PIECES = st.lists(SOME_PIECES, max_size=12).map(
    lambda parts: [piece for part in parts for piece in part]
)


def any_decoder(names: list[str]) -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate(ALL_PIECES)}
    backend = Backend(WordLevel(vocab, unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "</s>"])
    chain = [DECODERS[name]() for name in names]
    backend.decoder = chain[0] if len(chain) == 1 else decoders.Sequence(chain)
    return Tokenizer(backend)


def takes_nothing_back(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> bool:
    """Whether each longer text begins with the shorter ones, unfinished characters in them aside."""
    shorter = tokenizer.decode(prompt, skip).rstrip("\ufffd")
    for count in range(len(ids) + 1):
        text = tokenizer.decode(prompt + ids[:count], skip)
        if text.endswith("\ufffd") and count < len(ids):
            continue
        if not text.startswith(shorter):
            return False
        shorter = text
    return True


@settings(max_examples=800)
@given(
    names=st.lists(st.sampled_from(sorted(DECODERS)), min_size=1, max_size=4, unique=True),
    prompt=st.one_of(st.just([]), TEXTS_OF_PIECES),
    pieces=TEXTS_OF_PIECES,
    special_at=st.lists(st.integers(0, 30), max_size=3),
    cuts=st.one_of(st.none(), st.lists(st.integers(0, 60), max_size=9)),
    skip=st.booleans(),
)
def test_every_decoder_streams_what_it_decodes(
    names: list[str],
    prompt: list[str],
    pieces: list[str],
    special_at: list[int],
    cuts: list[int] | None,
    skip: bool,
) -> None:
    # Joined first, a text reads as bytes or not depending on all of its characters.
    assume("Fuse" not in names or "ByteLevel" not in names[names.index("Fuse") :])
    # CTC drops equal neighbours: after others it drops halves of characters.
    assume("CTC" not in names[1:])
    tokenizer = any_decoder(names)
    for index in special_at:
        pieces = [*pieces[:index], "<s>", *pieces[index:]]
    before, ids = ([token_id(tokenizer, piece) for piece in part] for part in (prompt, pieces))
    detokenizer = Detokenizer(tokenizer, before, skip_special_tokens=skip)
    parts = [[index] for index in ids] if cuts is None else chunks(ids, cuts)
    text, _ = stream(detokenizer, parts)
    if tokenizer.token_bytes is not None and "ByteLevel" not in names:
        return  # which has tests of its own, above
    if not takes_nothing_back(tokenizer, before, ids, skip):
        return
    whole, start = tokenizer.decode(before + ids, skip), tokenizer.decode(before, skip)
    # A character that the prompt began belongs to the output once it is complete.
    assert whole == start + text or (start.endswith("\ufffd") and whole == start.rstrip("\ufffd") + text)


@pytest.mark.parametrize("silent", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize(
    ("names", "pieces", "text"),
    [
        (["Replace", "ByteLevel"], spelt("日😀"), "日😀"),
        (["ByteFallback", "Metaspace"], ["▁", *byte_tokens("😀")], "😀"),
        (["ByteFallback", "WordPiece"], ["a", *byte_tokens("日"), "##x"], "a 日x"),
        (["CTC", "ByteFallback"], ["<pad>", *byte_tokens("é"), "<pad>"], "é"),
        (["BPEDecoder", "ByteFallback"], ["a</w>", *byte_tokens("😀👍")], "a 😀👍"),
        (["Fuse", "Strip"], [" ", " ", " ", "日"], " 日"),
    ],
)
def test_characters_after_and_around_skipped_tokens(
    silent: int, names: list[str], pieces: list[str], text: str
) -> None:
    tokenizer = any_decoder(names)
    assert tokenizer.token_bytes is None
    special = [token_id(tokenizer, "<s>")]
    ids = [token_id(tokenizer, piece) for piece in pieces]
    for at in range(len(ids) + 1):
        run = [*ids[:at], *special * silent, *ids[at:]]
        assert stream(Detokenizer(tokenizer, []), [[index] for index in run])[0] == text
        assert stream(Detokenizer(tokenizer, special * 20), [[index] for index in run])[0] == text
        assert stream(Detokenizer(tokenizer, []), [run])[0] == text


@pytest.mark.parametrize(
    "names", [["WordPiece"], ["Metaspace"], ["BPEDecoder"], ["ByteFallback", "Metaspace"]]
)
def test_text_comes_with_its_token(names: list[str]) -> None:
    tokenizer = any_decoder(names)
    ids = [token_id(tokenizer, piece) for piece in ("a", "▁日", "b", "▁a", "é")] * 30
    detokenizer = Detokenizer(tokenizer, [])
    pieces = [detokenizer.push([index])[0] for index in ids]
    assert all(pieces) and "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("piece", ["<0xFF>", "<0x80>", "<0xF0>"])
def test_endless_broken_bytes_are_shown_and_stay_cheap(piece: str) -> None:
    tokenizer = any_decoder(["ByteFallback", "Metaspace"])
    detokenizer = Detokenizer(tokenizer, [])
    broken = token_id(tokenizer, piece)
    started = time.process_time()
    texts = [detokenizer.push([broken])[0] for _ in range(3000)]
    assert (time.process_time() - started) / 3000 < 5e-3  # about 30 us
    end = [token_id(tokenizer, end) for end in (*byte_tokens("😀"), "a")]
    assert set("".join(texts)) == {"\ufffd"} and len("".join(texts)) > 2900
    assert stream(detokenizer, [end])[0].endswith("a")


@pytest.mark.parametrize("before", [0, 1, 5, 100])
def test_what_a_decoder_takes_back_stays(before: int) -> None:
    """One broken byte undoes a whole run of bytes, of which a part was shown."""
    tokenizer = any_decoder(["ByteFallback", "Metaspace"])
    pieces = [*["b"] * before, *byte_tokens("é"), "<0xFF>", "a", "▁日", *byte_tokens("😀")]
    ids = [token_id(tokenizer, piece) for piece in pieces]
    text, _ = stream(Detokenizer(tokenizer, []), [[index] for index in ids])
    assert text == "b" * before + "é\ufffda 日😀"


def test_a_byte_level_decoder_in_a_sequence_has_its_table() -> None:
    alone, within = any_decoder(["ByteLevel"]), any_decoder(["ByteLevel"])
    within.backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    assert Tokenizer(within.backend).token_bytes == alone.token_bytes != None  # noqa: E711


def test_a_piece_that_only_looks_like_a_byte() -> None:
    backend = Backend(WordLevel({"<0x  >": 0, "<0x4>": 1, "<0xG1>": 2, "<0x41>": 3}, unk_token="<0xG1>"))
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(chain)
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_bytes is not None
    assert stream(Detokenizer(tokenizer, []), [[0, 1, 2, 3]])[0] == tokenizer.decode([0, 1, 2, 3])


def test_a_character_of_four_tokens_appears_whole() -> None:
    ids = [token_id(BYTES, char) for char in "ðŁĺĢ"]
    detokenizer = Detokenizer(BYTES, [])
    assert [detokenizer.push([index])[0] for index in ids] == ["", "", "", "😀"]


def test_a_character_that_the_prompt_began_is_completed() -> None:
    ids = [token_id(BYTES, char) for char in "ðŁĺĢ"]
    assert stream(Detokenizer(BYTES, ids[:2]), [ids[2:]])[0] == "😀"
    letter = token_id(BYTES, "x")
    assert stream(Detokenizer(BYTES, ids[:2]), [[letter]])[0] == "x"
    assert Detokenizer(BYTES, ids[:2]).finish() == ""


def test_an_open_character_at_the_end_is_flushed() -> None:
    detokenizer = Detokenizer(BYTES, [], stop=["zz"])
    assert detokenizer.push([*BYTES.encode("az"), token_id(BYTES, "ð")]) == ("a", None)
    assert detokenizer.finish() == "z\ufffd"


def test_held_text_comes_with_the_end() -> None:
    detokenizer = Detokenizer(BYTES, [], stop=["ab!"])
    assert detokenizer.push(BYTES.encode("xab")) == ("x", None)
    assert detokenizer.finish() == "ab"


def test_nothing_after_a_stop_string() -> None:
    detokenizer = Detokenizer(BYTES, [], stop=["\n"])
    assert detokenizer.push([*BYTES.encode("a\nb"), *BYTES.encode("c")]) == ("a", "\n")
    assert detokenizer.num_tokens == 2
    assert detokenizer.push(BYTES.encode("d")) == ("", "\n")
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(("include", "shown"), [(False, "a"), (True, "a<end>")])
def test_the_stopping_token_shows_only_on_request(include: bool, shown: str) -> None:
    end = token_id(BYTES, "<end>")
    detokenizer = Detokenizer(BYTES, [], skip_special_tokens=False, include_stop_str=include)
    assert detokenizer.push([*BYTES.encode("a"), end], last_is_stop=True) == (shown, None)
    assert detokenizer.num_tokens == 2


def test_a_stop_string_before_the_stopping_token_wins() -> None:
    detokenizer = Detokenizer(BYTES, [], stop=["b"])
    assert detokenizer.push(BYTES.encode("xby"), last_is_stop=True) == ("x", "b")
    assert detokenizer.num_tokens == 2


def test_ids_that_do_not_exist_add_nothing() -> None:
    for tokenizer in (BYTES, META):
        assert stream(Detokenizer(tokenizer, [-5, 10**9]), [[-1, 10**6, 2**40]])[0] == ""


def test_stops_that_nearly_match_every_step_stay_cheap() -> None:
    stops = ["a" * 1023 + tail for tail in "bcde"]
    detokenizer = Detokenizer(BYTES, [], stop=stops)
    letter = token_id(BYTES, "a")
    started = time.process_time()
    for _ in range(5000):
        detokenizer.push([letter])
    assert (time.process_time() - started) / 5000 < 3e-3  # about 5 us
    assert detokenizer.finish() == "a" * 1023
