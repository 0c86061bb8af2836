"""`InferenceEngine` on a small real model: what its docstrings promise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_tools import (
    drain,
    generate_ids,
    make_engine,
    make_prompts,
    make_request,
    run_requests,
    variant_folder,
)
from tiny_models import TOKENIZER_SIZE, token_id

import microvllm
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.engine import InferenceEngine
from microvllm.runtime.errors import ConfigError, ContextLengthError, InvalidRequestError
from microvllm.runtime.request import FinishReason

PROMPT = "The quick brown fox"
SALTED = {"ignore_eos": True}


@pytest.fixture(scope="module")
def engine() -> InferenceEngine:
    return make_engine(variant_folder("llama-tied"), max_num_seqs=8)


@pytest.fixture(autouse=True)
def nothing_is_left(engine: InferenceEngine) -> Iterator[None]:
    yield
    assert not engine.core.has_work()
    engine.core.kv.check()
    assert engine.core.kv.num_used == 0


def greedy_text(engine: InferenceEngine, prompt: str, max_tokens: int, **options: Any) -> str:
    return engine.generate(prompt, max_tokens, temperature=0.0, **{**SALTED, **options})[prompt]


# ---- generate -------------------------------------------------------------------------------------


def test_it_is_constructed_as_documented() -> None:
    made = microvllm.InferenceEngine(
        model_path=str(variant_folder("qwen3")), max_batch_size=3, dtype="float32", cpu_threads=1
    )
    assert made.config.max_num_seqs == 3
    texts = made.generate(["Hello", "AI is"], max_tokens=5)
    assert list(texts) == ["Hello", "AI is"] and all(isinstance(text, str) for text in texts.values())


def test_each_prompt_gets_its_own_text(engine: InferenceEngine) -> None:
    prompts = [PROMPT, "The cache keeps", "0 1 2 3", "世界", "x"]
    together = engine.generate(prompts, 20, temperature=0.0, **SALTED)
    assert list(together) == prompts
    assert together == {prompt: greedy_text(engine, prompt, 20) for prompt in prompts}
    assert len(set(together.values())) == len(prompts)


def test_equal_prompts_are_one_key_computed_once_and_said_so(engine: InferenceEngine) -> None:
    before = engine.core.stats().generation_tokens
    with pytest.warns(UserWarning, match="1 of 3 prompts repeat an earlier one"):
        texts = engine.generate([PROMPT, "x", PROMPT], 7, **SALTED)
    assert list(texts) == [PROMPT, "x"]
    assert engine.core.stats().generation_tokens - before == 14


def test_no_prompts_no_texts(engine: InferenceEngine) -> None:
    assert engine.generate([]) == {}


def test_defaults_are_sixteen_tokens_and_the_end_token_ends(engine: InferenceEngine) -> None:
    ids = [token for token, _ in engine.stream_generate(PROMPT, temperature=0.0, **SALTED)]
    assert len(ids) == 16
    full = [token for token, _ in engine.stream_generate(PROMPT, None, temperature=0.0, **SALTED)]
    assert full[:16] == ids
    assert len(full) == engine.config.max_model_len - len(engine.tokenizer.encode(PROMPT))


def test_a_text_longer_than_the_batch_of_rows(engine: InferenceEngine) -> None:
    prompts = [f"{i} words" for i in range(30)]
    texts = engine.generate(prompts, 6, temperature=0.0, **SALTED)
    assert texts["17 words"] == greedy_text(engine, "17 words", 6)


# ---- stream_generate ------------------------------------------------------------------------------


def test_a_stream_gives_every_token_with_its_text(engine: InferenceEngine) -> None:
    pairs = list(engine.stream_generate(PROMPT, 50, temperature=0.0, **SALTED))
    assert len(pairs) == 50
    text = "".join(text for _, text in pairs)
    assert text == greedy_text(engine, PROMPT, 50)
    prompt = engine.tokenizer.encode(PROMPT)
    (expected,) = generate_ids(engine, [prompt], 50)
    assert [token for token, _ in pairs] == expected
    # A random model speaks in bytes that are mostly no UTF-8: what is valid comes whole, the rest as U+FFFD.
    assert text == engine.tokenizer.decode(expected)


def test_multi_byte_text_comes_whole(engine: InferenceEngine) -> None:
    """Every possible cut: characters of 1 to 4 bytes, each byte a token."""
    from microvllm.runtime.request import StepOutput
    from microvllm.runtime.text.detokenizer import OutputProcessor

    text = "aé€🙂世界"
    ids = engine.tokenizer.encode(text)
    assert len(ids) > len(text)
    request = make_request(1, engine.tokenizer.encode(PROMPT))
    output = OutputProcessor(engine.tokenizer, request)
    pieces = [output.process(StepOutput(1, [token])).text for token in ids[:-1]]
    pieces.append(output.process(StepOutput(1, [ids[-1]], FinishReason.LENGTH)).text)
    assert "".join(pieces) == text
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("how", ["close", "break", "error"])
def test_leaving_a_stream_frees_its_blocks(how: str, asynchronous: bool) -> None:
    engine = make_engine(variant_folder("llama-tied"), async_scheduling=asynchronous)
    stream = engine.stream_generate(PROMPT, 400, **SALTED)
    taken = list(itertools.islice(stream, 5))
    assert len(taken) == 5 and engine.core.stats().num_running == 1 and engine.core.kv.num_used > 0
    if how == "close":
        stream.close()  # type: ignore[attr-defined]
    elif how == "break":
        del stream
    else:
        with pytest.raises(KeyError):
            stream.throw(KeyError)  # type: ignore[attr-defined]
    assert not engine.core.has_work() and engine.core.kv.num_used == 0
    assert engine.core.stats().generation_tokens <= 6, "it went on generating for nobody"
    engine.core.kv.check()
    assert len(list(engine.stream_generate(PROMPT, 5, **SALTED))) == 5


def test_two_streams_taken_in_turns(engine: InferenceEngine) -> None:
    """Neither loses what a step gave while the other was asked, and one may be left while the other runs."""
    expected = {prompt: greedy_text(engine, prompt, 12) for prompt in (PROMPT, "x")}
    one = engine.stream_generate(PROMPT, 12, temperature=0.0, **SALTED)
    two = engine.stream_generate("x", 12, temperature=0.0, **SALTED)
    pairs = list(zip(one, two, strict=True))
    assert "".join(a for (_, a), _ in pairs) == expected[PROMPT]
    assert "".join(b for _, (_, b) in pairs) == expected["x"]

    one = engine.stream_generate(PROMPT, 400, temperature=0.0, **SALTED)
    two = engine.stream_generate("x", 12, temperature=0.0, **SALTED)
    texts = [text for (_, _), (_, text) in itertools.islice(zip(one, two, strict=False), 4)]
    one.close()  # type: ignore[attr-defined]
    assert "".join(texts + [text for _, text in two]) == expected["x"]


# ---- how texts end --------------------------------------------------------------------------------


def test_stop_strings_end_the_text_before_them(engine: InferenceEngine) -> None:
    full = greedy_text(engine, PROMPT, 60)
    stop = next(
        full[i : i + 2] for i in range(20, 60) if "\ufffd" not in full[i : i + 2] and full[i : i + 2].strip()
    )
    before = full[: full.index(stop)]
    assert greedy_text(engine, PROMPT, 60, stop=[stop]) == before
    assert greedy_text(engine, PROMPT, 60, stop=stop) == before
    assert greedy_text(engine, PROMPT, 60, stop=["never seen", stop]) == before
    assert greedy_text(engine, PROMPT, 60, stop=stop, include_stop_str_in_output=True) == before + stop
    steps = engine.core.stats().steps
    assert greedy_text(engine, PROMPT, 60, stop=stop) == before
    assert engine.core.stats().steps - steps < 60, "the engine went on after the stop string"


def test_stop_tokens_and_min_tokens(engine: InferenceEngine) -> None:
    ids = [token for token, _ in engine.stream_generate(PROMPT, 30, temperature=0.0, **SALTED)]
    stop = ids[9]
    first = ids.index(stop)
    stopped = [
        t for t, _ in engine.stream_generate(PROMPT, 30, temperature=0.0, stop_token_ids=[stop], **SALTED)
    ]
    assert stopped == ids[: first + 1]
    later = [
        token
        for token, _ in engine.stream_generate(
            PROMPT, 30, temperature=0.0, stop_token_ids=[stop], min_tokens=first + 3, **SALTED
        )
    ]
    assert later[:first] == ids[:first] and later[first] != stop
    assert len(later) >= first + 3 and stop not in later[: first + 3]
    # The stop token may not even be the last of these tokens.
    for count, token in ((1, ids[0]), (first + 1, stop)):
        options = {"temperature": 0.0, "stop_token_ids": [token], "min_tokens": count, **SALTED}
        forced = [token for token, _ in engine.stream_generate(PROMPT, 30, **options)]
        assert forced[: count - 1] == ids[: count - 1] and forced[count - 1] != token


def test_the_end_token_is_forbidden_until_min_tokens_and_ends_the_text(engine: InferenceEngine) -> None:
    """At a high temperature one token in 320 is the end token: many requests meet it early."""
    ends = token_id("<|im_end|>")
    prompt = engine.tokenizer.encode(PROMPT)
    base = [make_request(i, prompt, 120, temperature=2.0, seed=i) for i in range(24)]

    def with_end(min_tokens: int) -> list[list[int]]:
        import msgspec

        requests = [
            msgspec.structs.replace(
                request,
                eos_token_id=ends,
                params=msgspec.structs.replace(request.params, min_tokens=min_tokens),
            )
            for request in base
        ]
        return run_requests(engine, requests)

    early = with_end(0)
    stopped = [tokens for tokens in early if tokens[-1] == ends]
    assert len(stopped) >= 3 and all(ends not in tokens[:-1] for tokens in early)
    late = with_end(60)
    assert all(len(tokens) >= 60 and ends not in tokens[:60] for tokens in late)


# ---- sampling in the engine -----------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_seeded_request_is_the_same_alone_in_a_batch_and_after_preemption(asynchronous: bool) -> None:
    folder = variant_folder("qwen2")
    prompts = make_prompts(10, TOKENIZER_SIZE, seed=8, longest=30)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 50}
    requests = [make_request(i, prompt, 40, seed=1000 + i, **options) for i, prompt in enumerate(prompts)]
    roomy = make_engine(folder, async_scheduling=asynchronous)
    alone = [run_requests(roomy, [request])[0] for request in requests]
    assert run_requests(roomy, requests) == alone
    tight = make_engine(
        folder, max_model_len=80, block_size=4, num_gpu_blocks_override=24, async_scheduling=asynchronous
    )
    assert run_requests(tight, requests) == alone
    assert tight.core.stats().preemptions > 0
    other_seed = [make_request(i, prompt, 40, seed=i, **options) for i, prompt in enumerate(prompts)]
    assert all(a != b for a, b in zip(run_requests(roomy, other_seed), alone, strict=True))


def test_without_a_seed_the_engine_seed_decides() -> None:
    folder = variant_folder("llama-tied")
    texts = [make_engine(folder, seed=seed).generate(["a", "b"], 20, **SALTED) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    engine = make_engine(folder)
    assert engine.generate("a", 20, **SALTED) != engine.generate("a", 20, **SALTED)


def test_a_broken_request_ends_alone(engine: InferenceEngine) -> None:
    """Logits that are NaN for one request are that request's error, whatever it samples with."""
    runner: Any = engine.core._runner
    model, logits = runner.model, runner.model.logits
    prompts = make_prompts(3, TOKENIZER_SIZE)
    expected = generate_ids(engine, prompts, 12)
    calls = 0

    def broken(hidden: Any) -> Any:
        nonlocal calls
        result = logits(hidden)
        calls += 1
        if calls == 4:
            result[1] = float("nan")
        return result

    model.logits = broken
    try:
        for options in ({}, {"temperature": 1.0, "top_p": 0.9, "top_k": 7, "seed": 1}):
            calls = 0
            requests = [make_request(i, prompt, 12) for i, prompt in enumerate(prompts)]
            requests[1] = make_request(1, prompts[1], 12, **options)
            for request in requests:
                assert engine.core.add(request) is None
            outputs = list(drain(engine))
            (error,) = [output for output in outputs if output.error is not None]
            assert error.request_id == 1 and "no finite logits" in str(error.error)
            for index in (0, 2):
                tokens = [t for output in outputs if output.request_id == index for t in output.token_ids]
                assert tokens == expected[index]
    finally:
        model.logits = logits


# ---- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"beam_width": 2}, "beam_width"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(engine: InferenceEngine, options: dict[str, Any], field: str) -> None:
    for call in (engine.generate, lambda prompt, **o: list(engine.stream_generate(prompt, **o))):
        with pytest.raises(InvalidRequestError) as caught:
            call(PROMPT, **options)
        assert caught.value.param == field and field in str(caught.value)
        assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("", InvalidRequestError),
        ("x " * 2000, ContextLengthError),
        (None, InvalidRequestError),
        (5, InvalidRequestError),
        (["unhashable"], InvalidRequestError),
    ],
    ids=str,
)
def test_a_wrong_prompt_is_refused_before_any_other_runs(
    engine: InferenceEngine, prompt: Any, kind: type
) -> None:
    steps = engine.core.stats().steps
    with pytest.raises(kind):
        engine.generate(["fine", prompt])
    assert engine.core.stats().steps == steps


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"model_path": "/nonexistent/model"}, "/nonexistent/model"),
        ({"dtype": "int7"}, "--dtype"),
        ({"max_batch_size": 0}, "--max-num-seqs"),
        ({"max_model_len": 10**9}, "--max-model-len"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_one_line(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        InferenceEngine(**{"model_path": str(variant_folder("llama-tied")), **options})
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_bound_of_the_queue_has_no_effect_and_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(*_: object) -> None:
        raise ConfigError("stop")

    monkeypatch.setattr(EngineArgs, "prepare", stop)
    for options in ({}, {"max_num_queued_reqs": 3}):
        with pytest.raises(ConfigError, match="stop"):
            InferenceEngine("m", **options)
    assert caplog.messages == ["--max-num-queued-reqs: no effect without a server: the queue has no bound"]


def test_a_model_without_its_weights_is_a_configuration_error(tmp_path: Path) -> None:
    for file in variant_folder("llama-tied").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="safetensors"):
        InferenceEngine(str(tmp_path))
