"""`LLM` as users of vLLM call it: every name, beam search, metrics, sleep."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_case import GREEDY, OPTIONS, PROMPTS, texts
from model_tools import variant_folder
from tiny_models import CHAT_TEMPLATE, token_id

from microvllm import (
    LLM,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
    TokensPrompt,
)
from microvllm.runtime.beam_search import Beam
from microvllm.runtime.errors import ConfigError, EngineError, InvalidRequestError
from microvllm.runtime.metrics.metric_families import Counter, Gauge, Histogram
from microvllm.runtime.offline.beams import OfflineSearch
from microvllm.runtime.offline.llm_options import engine_options
from microvllm.runtime.offline.prompts import OfflinePrompt
from microvllm.runtime.offline.request_output import FlatLogprobs
from microvllm.runtime.worker.profiler import ProfilerStateError

MESSAGES = [{"role": "user", "content": "Who are you?"}]
# Every option of LLM() and EngineArgs in vLLM 0.33 with its default.
LLM_DEFAULTS = json.loads((Path(__file__).parent.parent / "data" / "vllm_llm_options.json").read_text())
# The arguments of LLM.generate and LLM.chat in vLLM 0.33 with values that ask for nothing.
COMMON: dict[str, tuple[Any, ...]] = {
    "sampling_params": (None,),
    "use_tqdm": (True, False),
    "lora_request": (None, [None]),
    "priority": (None, 0, [0]),
    "tokenization_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
}
GENERATE = {"prompts": ("x", ["x"]), **COMMON}
CHAT = {
    "messages": (MESSAGES, [MESSAGES]),
    **COMMON,
    "chat_template": (None,),
    "chat_template_content_format": ("auto",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "tools": (None, []),
    "chat_template_kwargs": (None, {}),
}


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.core.has_work() and llm.engine.core.kv.num_used == 0


# ---- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LLM_DEFAULTS))
def test_each_option_at_vllms_default_is_accepted(name: str) -> None:
    if name in ("chat_template", "fail_on_environ_validation", "profiler_config"):
        return  # `LLM` itself takes these, below
    for value in (None, LLM_DEFAULTS[name]):
        engine_options({name: value})


def test_all_options_at_vllms_defaults_change_nothing(llm: LLM) -> None:
    other = LLM(variant_folder("llama-tied"), **{**LLM_DEFAULTS, **OPTIONS})
    assert other.engine.config == llm.engine.config
    assert texts(other.generate(PROMPTS, GREEDY, use_tqdm=False)) == texts(llm.generate(PROMPTS, GREEDY))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kv_cache_dtype_skip_layers": ["0"]}, "kv_cache_dtype_skip_layers"),
        ({"quantization": "awq"}, "quantization"),
        ({"enable_lora": True}, "enable_lora"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"runner": "draft"}, "runner"),
        ({"convert": "classify"}, "convert"),
        ({"tokenizer_mode": "mistral"}, "tokenizer_mode"),
        ({"logits_processors": ["mine.Processor"]}, "logits_processors"),
        ({"speculative_config": {"method": "ngram"}}, "speculative_config"),
        ({"speculative_config": {}}, "speculative_config"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init"),
        ({"model_weights": "elsewhere"}, "model_weights"),
        ({"reasoning_parser": "qwen3"}, "reasoning_parser"),
        ({"max_modl_len": 64}, "max_modl_len"),
        ({"max_modl_len": None}, "max_modl_len"),
        ({"chat_template": "no-such-file.jinja"}, "chat_template"),
        ({"chat_template": "{% if %}"}, "chat_template"),
    ],
    ids=str,
)
def test_an_option_that_asks_for_something_missing_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        LLM(str(variant_folder("llama-tied")), **options)
    assert "\n" not in str(caught.value)


def test_spellings_of_options(caplog: pytest.LogCaptureFixture) -> None:
    read = engine_options({"dtype": torch.bfloat16, "max_model_len": "auto", "tokenizer": Path("a")})
    assert read == {"dtype": "bfloat16", "tokenizer": "a"}
    assert engine_options({"max_model_len": -1, "enable_prefix_caching": None, "seed": None}) == {}
    assert engine_options({"tokenizer_mode": "slow", "quantization": "gguf", "task": "generate"}) == {
        "quantization": "gguf"
    }
    assert (
        engine_options({"kv_transfer_config": {}, "logits_processors": [], "speculative_config": None}) == {}
    )
    with caplog.at_level(logging.WARNING):
        assert engine_options({"swap_space": 4, "trust_remote_code": True, "disable_log_stats": True}) == {}
    assert [record.args[0] for record in caplog.records if record.args] == ["swap_space", "trust_remote_code"]


@pytest.mark.parametrize(("method", "names"), [("generate", GENERATE), ("chat", CHAT)])
def test_each_argument_at_a_value_that_asks_for_nothing(
    llm: LLM, method: str, names: dict[str, tuple[Any, ...]]
) -> None:
    call: Callable[..., Any] = getattr(llm, method)
    assert set(inspect.signature(call).parameters) == set(names)
    first, *others = names
    base = {first: names[first][0], "sampling_params": GREEDY, "use_tqdm": False}
    expected = texts(call(**base))
    for name, value in [(each, value) for each in [first, *others] for value in names[each]]:
        got = call(**{**base, name: value})
        assert len(got) == 1
        if name != "sampling_params":
            assert texts(got) == expected, name


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"lora_request": object()}, "lora_request"),
        ({"lora_request": [None, object()]}, "lora_request"),
        ({"mm_processor_kwargs": {"crops": 4}}, "mm_processor_kwargs"),
        ({"tokenization_kwargs": {"truncation": True}}, "tokenization_kwargs"),
        ({"tokenization_kwargs": {"add_special_tokens": 1}}, "tokenization_kwargs"),
        ({"priority": [1, 2]}, "priority"),
        ({"sampling_params": [GREEDY, GREEDY]}, "sampling_params"),
        ({"sampling_params": {"temperature": 0}}, "sampling_params"),
    ],
)
def test_arguments_that_ask_for_something_missing(llm: LLM, arguments: dict[str, Any], param: str) -> None:
    for call, prompts in ((llm.generate, ["x"]), (llm.chat, MESSAGES)):
        with pytest.raises(InvalidRequestError) as caught:
            call(prompts, **{"use_tqdm": False, **arguments})  # type: ignore[operator]
        assert caught.value.param == param


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("multi_modal_data", {"image": object()}),
        ("multi_modal_uuids", {"image": ["a"]}),
        ("mm_processor_kwargs", {"crops": 4}),
        ("prompt_embeds", [[0.5]]),
        ("token_type_ids", [0]),
        ("encoder_prompt", "a"),
        ("cache_salt", ""),
    ],
)
def test_a_prompt_with_more_than_text_is_refused(llm: LLM, key: str, value: Any) -> None:
    """An image that was dropped would give an answer about nothing."""
    with pytest.raises(InvalidRequestError, match=key) as caught:
        llm.generate({"prompt": "What is this?", key: value}, GREEDY, use_tqdm=False)
    assert caught.value.param == key
    if key != "cache_salt":
        plain = {"prompt": "x", key: None}
        assert texts(llm.generate(plain, GREEDY, use_tqdm=False)) == texts(llm.generate("x", GREEDY))
        parts = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]
        with pytest.raises(InvalidRequestError, match="image_url"):
            llm.chat(parts, GREEDY, use_tqdm=False)


def test_arrays_and_typed_prompts(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    expected = texts(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False))
    forms: list[Any] = [
        torch.tensor(ids),
        [torch.tensor(ids).numpy()],
        TokensPrompt(prompt_token_ids=ids, prompt=PROMPTS[0], cache_salt="mine"),
    ]
    for form in forms:
        (result,) = llm.generate(form, GREEDY, use_tqdm=False)
        assert [result.outputs[0].text] == expected and result.prompt_token_ids == ids
    assert result.prompt == PROMPTS[0]


# ---- what comes back ------------------------------------------------------------------------------


def test_cached_tokens_and_times(llm: LLM) -> None:
    prompt = [list(range(100, 150))]
    llm.reset_prefix_cache()
    (first,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    (second,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)
    unread = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, skip_reading_prefix_cache=True)
    (third,) = llm.generate(prompt, unread, use_tqdm=False)
    assert third.num_cached_tokens == 0 and texts([third]) == texts([first]) == texts([second])
    (other,) = llm.generate({"prompt_token_ids": prompt[0], "cache_salt": "a"}, GREEDY, use_tqdm=False)
    assert other.num_cached_tokens == 0
    metrics = first.metrics
    assert metrics is not None and metrics.num_generation_tokens == 12 and metrics.num_preemptions == 0
    assert metrics.queued_ts <= metrics.scheduled_ts <= metrics.first_token_ts < metrics.last_token_ts
    assert metrics.first_token_latency == pytest.approx(metrics.first_token_ts - metrics.queued_ts)
    assert abs(metrics.arrival_time - __import__("time").time()) < 3600
    assert first.lora_request is None and first.outputs[0].lora_request is None


def test_chat_gives_the_rendered_prompt(llm: LLM) -> None:
    (result,) = llm.chat(MESSAGES, GREEDY, use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert result.prompt == rendered
    assert result.prompt_token_ids == tokenizer.encode(rendered, add_special_tokens=False)
    shouting = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    (other,) = llm.chat(MESSAGES, GREEDY, use_tqdm=False, chat_template=shouting)
    assert other.prompt == "WHO ARE YOU?"
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    shown = "{{ tools[0]['function']['name'] }}"
    (third,) = llm.chat(MESSAGES, GREEDY, use_tqdm=False, chat_template=shown, tools=tools)
    with pytest.raises(InvalidRequestError, match="does not show tools"):
        llm.chat(MESSAGES, GREEDY, use_tqdm=False, tools=tools)
    assert third.prompt == "clock"


def test_a_template_for_all_chats(tmp_path: Path) -> None:
    file = tmp_path / "shout.jinja"
    file.write_text("{{ messages[0]['content'] | upper }}")
    for template in (file, str(file), file.read_text()):
        llm = LLM(str(variant_folder("llama-tied")), chat_template=template, **OPTIONS)
        assert llm.chat(MESSAGES, GREEDY, use_tqdm=False)[0].prompt == "WHO ARE YOU?"


def test_without_detokenization_there_are_ids_alone(llm: LLM) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "logprobs": 1}
    (plain,) = llm.generate("x", SamplingParams(**options), use_tqdm=False)
    (bare,) = llm.generate("x", SamplingParams(detokenize=False, **options), use_tqdm=False)
    assert bare.outputs[0].text == "" and bare.outputs[0].token_ids == plain.outputs[0].token_ids
    assert {entry.decoded_token for each in bare.outputs[0].logprobs for entry in each.values()} == {None}


def test_flat_logprobs_read_the_same(llm: LLM) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 5, "logprobs": 2, "prompt_logprobs": 1}
    (plain,) = llm.generate(PROMPTS[0], SamplingParams(**options), use_tqdm=False)
    (flat,) = llm.generate(PROMPTS[0], SamplingParams(flat_logprobs=True, **options), use_tqdm=False)
    for found, wanted in (
        (flat.outputs[0].logprobs, plain.outputs[0].logprobs),
        (flat.prompt_logprobs, [{} if each is None else each for each in plain.prompt_logprobs]),
    ):
        assert isinstance(found, FlatLogprobs) and len(found) == len(wanted)
        assert list(found) == wanted and found[-1] == wanted[-1] and list(found[1:3]) == wanted[1:3]
        assert len(found.token_ids) == sum(map(len, wanted))


def test_outputs_have_their_form(llm: LLM) -> None:
    choice = StructuredOutputsParams(choice=["yes", "no"])
    several = [SamplingParams(structured_outputs=choice, seed=seed) for seed in range(3)]
    free = SamplingParams(temperature=0, max_tokens=5)
    results = llm.generate([PROMPTS[0]] * 4, [*several, free], use_tqdm=False)
    assert {result.outputs[0].text for result in results[:3]} <= {"yes", "no"}
    assert results[0].outputs[0].finish_reason == "stop"
    assert several[0].structured_outputs is choice and several[0].clone() == several[0]
    for wrong in ({"regex": "("}, {"json": {"not": {}}}):
        with pytest.raises(InvalidRequestError) as caught:
            llm.generate(PROMPTS[0], SamplingParams(structured_outputs=wrong), use_tqdm=False)
        assert caught.value.param == "structured_outputs"
    for wrong in ({}, {"regex": "a", "choice": ["a"]}, {"regex": 1}, {"pattern": "a"}, "a"):
        with pytest.raises(InvalidRequestError, match="structured_outputs"):
            SamplingParams(structured_outputs=wrong)


def test_default_parameters_may_be_changed(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    params.max_tokens, params.temperature, params.ignore_eos = 3, 0.0, True
    assert len(llm.generate("x", params, use_tqdm=False)[0].outputs[0].token_ids) == 3
    assert llm.get_default_sampling_params().max_tokens == 16


def test_the_callers_parameters_are_read_when_they_are_given(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    llm.enqueue("x", params)
    params.max_tokens, params.detokenize = 9, False
    (result,) = llm.wait_for_completion(use_tqdm=False)
    assert len(result.outputs[0].token_ids) == 5 and result.outputs[0].text


def test_a_progress_bar_of_the_callers(llm: LLM) -> None:
    seen: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            seen.append(options["total"])

        def update(self, number: int) -> None:
            seen.append(number)

        def close(self) -> None:
            seen.append("closed")

    llm.generate(PROMPTS, GREEDY, use_tqdm=Bar)
    assert seen == [3, 1, 1, 1, "closed"]


def test_progress_bars_of_several_threads(llm: LLM) -> None:
    with ThreadPoolExecutor(4) as threads:
        results = threads.map(lambda prompt: llm.generate(prompt, GREEDY), PROMPTS * 4)
        assert len(list(results)) == 12


# ---- the tokenizer --------------------------------------------------------------------------------


def test_the_tokenizer_is_one_of_transformers(llm: LLM) -> None:
    tokenizer, ours = llm.get_tokenizer(), llm.engine.tokenizer
    assert tokenizer is llm.llm_engine.get_tokenizer()
    text = "The quick 世界 <|im_end|> x"
    assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == ours.encode(text)
    assert tokenizer(["a", "b"], return_tensors="pt", padding=False)["input_ids"].shape == (2, 1)
    assert tokenizer.get_vocab() == ours.backend.get_vocab()
    ids = ours.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == [ours.id_to_token(token) for token in ids]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert "<|im_end|>" in tokenizer.decode(ids)
    assert tokenizer.eos_token_id == token_id("<|im_end|>") == ours.eos_token_id
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert ours.encode("x" * 5000, False) == tokenizer.encode("x" * 5000, add_special_tokens=False)


# ---- beam search ----------------------------------------------------------------------------------


def exhaustive(llm: LLM, ids: list[int], width: int, steps: int, penalty: float, ends: set[int]) -> list[Any]:
    """The same search, one request after the other: [(score, tokens)]."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for _ in range(steps):
        found = []
        for total, tokens in live:
            params = SamplingParams(temperature=0, max_tokens=1, logprobs=2 * width, ignore_eos=True)
            (output,) = llm.generate([[*ids, *tokens]], params, use_tqdm=False)[0].outputs
            found += [(total + one.logprob, [*tokens, token]) for token, one in output.logprobs[0].items()]
        found.sort(key=lambda beam: -beam[0])
        done += [beam for beam in found if beam[1][-1] in ends]
        live = [beam for beam in found if beam[1][-1] not in ends][:width]
    scored = [(total / len(tokens) ** penalty, tokens) for total, tokens in [*done, *live]]
    return sorted(scored, key=lambda beam: -beam[0])[:width]


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("limit", [None, 1])
def test_beam_search_finds_the_best(llm: LLM, penalty: float, limit: int | None) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=4, length_penalty=penalty)
    outputs = llm.beam_search(PROMPTS, params, concurrency_limit=limit)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = llm.get_tokenizer().encode(prompt)
        wanted = exhaustive(llm, ids, 3, 4, penalty, {token_id("<|im_end|>")})
        assert [beam.tokens for beam in output.sequences] == [[*ids, *tokens] for _, tokens in wanted]
        for beam, (score, tokens) in zip(output.sequences, wanted, strict=True):
            assert beam.cum_logprob / len(tokens) ** penalty == pytest.approx(score, abs=1e-4)
            assert len(beam.logprobs) == len(tokens)
            assert beam.text == llm.engine.tokenizer.decode(beam.tokens)
            assert beam.orig_prompt["prompt"] == prompt and beam.lora_request is None


def test_beams_end_and_the_context_bounds_them(llm: LLM) -> None:
    ids = [5] * (llm.engine.config.max_model_len - 3)
    (output,) = llm.beam_search([{"prompt_token_ids": ids}], BeamSearchParams(beam_width=2, max_tokens=50))
    assert {len(beam.tokens) for beam in output.sequences} <= {len(ids) + 1, len(ids) + 2, len(ids) + 3}
    wide = llm.beam_search("x", BeamSearchParams(beam_width=10, max_tokens=12))[0].sequences
    ended = [beam for beam in wide if beam.finish_reason == "stop"]
    assert all(beam.tokens[-1] == token_id("<|im_end|>") and beam.stop_reason is None for beam in ended)
    blind = llm.beam_search("x", BeamSearchParams(beam_width=10, max_tokens=12, ignore_eos=True))
    assert {beam.finish_reason for beam in blind[0].sequences} == {"length"}
    with pytest.raises(InvalidRequestError, match="logprobs"):
        llm.beam_search("x", BeamSearchParams(beam_width=11, max_tokens=2))


@pytest.mark.parametrize(("included", "text"), [(False, ""), (True, "<|im_end|>")])
def test_the_end_of_a_beam_is_shown_where_that_is_asked_for(llm: LLM, included: bool, text: str) -> None:
    params = BeamSearchParams(
        beam_width=2, max_tokens=4, include_stop_str_in_output=included, skip_special_tokens=False
    )
    search = OfflineSearch(llm.engine, OfflinePrompt(None, [5]), params, 0)
    search._done = [Beam(0.0, (6, token_id("<|im_end|>")), ended=True), Beam(-1.0, (6, 7))]
    ended, cut = search.output().sequences
    shown = llm.engine.tokenizer.decode([5, 6], skip_special_tokens=False)
    assert (ended.text, ended.tokens) == (shown + text, [5, 6, token_id("<|im_end|>")])
    assert cut.text == llm.engine.tokenizer.decode([5, 6, 7], skip_special_tokens=False)


# ---- metrics --------------------------------------------------------------------------------------


def test_metrics_count_what_was_done() -> None:
    llm = LLM(str(variant_folder("llama-tied")), disable_log_stats=False, **OPTIONS)

    def read() -> dict[str, Any]:
        return {metric.name: metric for metric in llm.get_metrics() if "finished_reason" not in metric.labels}

    def ended() -> dict[str, float]:
        return {
            metric.labels["finished_reason"]: metric.value  # type: ignore[attr-defined]
            for metric in llm.get_metrics()
            if metric.name == "vllm:request_success"
        }

    before = read()
    assert (
        isinstance(before["vllm:generation_tokens"], Counter) and before["vllm:generation_tokens"].value == 0
    )
    results = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    stop = next(char for char in results[0].outputs[0].text[2:] if char not in "\ufffd ")
    llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=12, stop=stop), use_tqdm=False)
    stream = llm.engine.stream_generate("x", 100, ignore_eos=True)
    next(stream)
    running = read()["vllm:num_requests_running"]
    assert isinstance(running, Gauge) and running.value == 1
    stream.close()  # type: ignore[attr-defined]
    now = read()
    assert now["vllm:num_requests_running"].value == now["vllm:kv_cache_usage_perc"].value == 0
    assert now["vllm:generation_tokens"].value > 36
    assert now["vllm:prompt_tokens"].value == sum(
        len(ids)
        for ids in [*(result.prompt_token_ids for result in results), results[0].prompt_token_ids, [1]]
    )
    assert ended() == {"length": 3, "stop": 1, "abort": 1, "error": 0, "repetition": 0}
    first = now["vllm:time_to_first_token_seconds"]
    assert isinstance(first, Histogram) and first.count == first.buckets["+Inf"] == 5 and first.sum > 0
    assert list(first.buckets.values()) == sorted(first.buckets.values())
    assert now["vllm:request_generation_tokens"].count == 4


def test_a_profile_of_the_engine(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="profiler_config"):
        llm.start_profile()
    config = {"profiler": "torch", "torch_profiler_dir": str(tmp_path), "torch_profiler_use_gzip": False}
    other = LLM(str(variant_folder("llama-tied")), profiler_config=config, **OPTIONS)
    with pytest.raises(ProfilerStateError):
        other.stop_profile()
    file = other.start_profile("mine")
    other.generate("x", GREEDY, use_tqdm=False)
    assert other.stop_profile() == file
    events = json.loads(Path(file).read_text())["traceEvents"]
    assert Path(file).name.startswith("mine") and any("aten::" in str(event.get("name")) for event in events)


def test_variables_that_do_nothing_may_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NO_SUCH_VARIABLE", "1")
    with pytest.raises(ConfigError, match="VLLM_NO_SUCH_VARIABLE"):
        LLM(str(variant_folder("llama-tied")), fail_on_environ_validation=True, **OPTIONS)


# ---- enqueue and sleep ----------------------------------------------------------------------------


def test_enqueued_prompts_are_computed_together_and_in_order(llm: LLM) -> None:
    expected = texts(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    chat = texts(llm.chat(MESSAGES, GREEDY, use_tqdm=False))
    steps = llm.engine.core.stats().steps
    ids = [*llm.enqueue(PROMPTS[:2], GREEDY), *llm.enqueue(PROMPTS[2], GREEDY)]
    ids += llm.enqueue_chat(MESSAGES, GREEDY, add_generation_prompt=True)
    assert llm.engine.core.stats().steps == steps
    results = llm.wait_for_completion(use_tqdm=False)
    assert [result.request_id for result in results] == ids and texts(results) == expected + chat
    assert llm.engine.core.stats().steps - steps < 20
    assert llm.wait_for_completion() == []
    with pytest.raises(InvalidRequestError, match="prompt"):
        llm.enqueue(["x", ""], GREEDY)
    assert llm.wait_for_completion() == [] or len(llm.wait_for_completion()) == 0


def test_a_sleeping_engine_generates_nothing(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    expected = texts(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate("x"),
        lambda: llm.chat(MESSAGES),
        lambda: llm.wait_for_completion(),
        lambda: llm.beam_search("x", BeamSearchParams(beam_width=2, max_tokens=2)),
    ]
    for level in (0, 1):
        llm.sleep(level=level)
        for call in calls:
            with pytest.raises(EngineError, match="wake_up"):
                call()
        assert llm.wake_up()
        assert texts(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert "stays reserved" in caplog.text
    llm.sleep(level=0)
    llm.enqueue(PROMPTS, GREEDY)  # which level 0 allows
    llm.wake_up(tags=["scheduling"])
    assert texts(llm.wait_for_completion(use_tqdm=False)) == expected
    llm.sleep()
    assert not llm.wake_up(tags=["weights"]) and llm.wake_up(tags=["kv_cache"])
    for wrong in ({"level": 2}, {"level": "all"}, {"mode": "now"}):
        with pytest.raises(InvalidRequestError, match="sleep"):
            llm.sleep(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="is no tag"):
        llm.wake_up(tags=["brain"])


def test_sleep_forgets_the_prefix_cache(llm: LLM) -> None:
    prompt = [list(range(200, 250))]
    llm.generate(prompt, GREEDY, use_tqdm=False)
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 48
    llm.sleep(level=1)
    llm.wake_up()
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
