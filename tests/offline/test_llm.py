"""vLLM's offline API: `LLM`, `SamplingParams`, `RequestOutput`."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import Any

import pytest
from llm_case import GREEDY, PROMPTS
from model_tools import variant_folder
from tiny_models import CHAT_TEMPLATE, token_id

import microvllm
from microvllm import LLM, SamplingParams
from microvllm.runtime.errors import ConfigError, InvalidRequestError


def test_the_package_offers_it() -> None:
    assert microvllm.LLM is LLM and microvllm.SamplingParams is SamplingParams


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_looked_for_while_torch_is_imported(
    collects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile: list[bool] = []

    def import_module(name: str) -> Any:
        meanwhile.append(gc.isenabled())
        raise ImportError(name)

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(os, "environ", {})
    try:
        if not collects:
            gc.disable()
        with pytest.raises(ImportError):
            _ = microvllm.LLM
        assert gc.isenabled() == collects and meanwhile == [False]
    finally:
        gc.enable()


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    results = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [result.prompt for result in results] == PROMPTS
    assert len({result.request_id for result in results}) == 3
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.finished and result.prompt_token_ids == llm.get_tokenizer().encode(prompt)
        (output,) = result.outputs
        assert output.index == 0 and len(output.token_ids) == 12 and output.finished()
        assert output.finish_reason == "length" and output.stop_reason is None
        assert output.text == llm.get_tokenizer().decode(output.token_ids)
        assert output.text == llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].text


def test_all_forms_of_a_prompt(llm: LLM) -> None:
    text = PROMPTS[0]
    ids = llm.get_tokenizer().encode(text)
    forms: list[Any] = [
        text,
        ids,
        [ids],
        [text],
        {"prompt": text},
        {"prompt_token_ids": ids},
        [{"prompt": text}],
        (text,),
    ]
    results = [llm.generate(form, GREEDY, use_tqdm=False) for form in forms]
    assert all(len(result) == 1 for result in results)
    assert len({result[0].outputs[0].text for result in results}) == 1
    assert [result[0].prompt for result in results] == [text, None, None, text, text, None, text, text]


def test_equal_prompts_are_answered_each(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    results = llm.generate(["x"] * 4, params, use_tqdm=False)
    assert len(results) == 4 and len({result.outputs[0].text for result in results}) > 1


def test_parameters_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in (3, 9, 5)]
    results = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [len(result.outputs[0].token_ids) for result in results] == [3, 9, 5]
    with pytest.raises(InvalidRequestError, match="sampling_params has 2 entries for 3 prompts"):
        llm.generate(PROMPTS, params[:2], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="priority"):
        llm.generate(PROMPTS, params, use_tqdm=False, priority=[1])


def test_n_answers_differ_and_the_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=7, max_tokens=10, ignore_eos=True)
    (first,), (second,) = (llm.generate("x", params, use_tqdm=False) for _ in range(2))
    texts = [output.text for output in first.outputs]
    assert [output.index for output in first.outputs] == [0, 1, 2, 3]
    assert len(set(texts)) == 4 and texts == [output.text for output in second.outputs]
    assert all(output.finish_reason == "length" for output in first.outputs)
    (single,) = llm.generate("x", SamplingParams(seed=7, max_tokens=10, ignore_eos=True), use_tqdm=False)
    assert single.outputs[0].text == texts[0]


def test_stop_reasons(llm: LLM) -> None:
    (free,) = llm.generate("x", GREEDY, use_tqdm=False)
    text, ids = free.outputs[0].text, free.outputs[0].token_ids
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[ids[4]])
    (result,) = llm.generate("x", params, use_tqdm=False)
    output = result.outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", ids[4])
    assert output.token_ids == ids[: ids.index(ids[4]) + 1]

    stop = next(text[i : i + 2] for i in range(2, len(text)) if "\ufffd" not in text[i : i + 2])
    for wish in (stop, [stop]):
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=wish)  # type: ignore[arg-type]
        output = llm.generate("x", params, use_tqdm=False)[0].outputs[0]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.text == text[: text.index(stop)]


def test_the_end_token_ends_without_a_stop_reason(llm: LLM) -> None:
    """One draw in 320 or so at this temperature: some of 16 requests meet it, and it is not shown."""
    params = SamplingParams(temperature=2.0, max_tokens=100, seed=1)
    outputs = [r.outputs[0] for r in llm.generate(["x"] * 3, [params] * 3, use_tqdm=False)]
    many = llm.generate("x", SamplingParams(temperature=2.0, n=16, max_tokens=200, seed=1), use_tqdm=False)
    ended = [output for output in [*outputs, *many[0].outputs] if output.finish_reason == "stop"]
    assert ended
    for output in ended:
        assert output.stop_reason is None and output.token_ids[-1] == token_id("<|im_end|>")
        assert "<|im_end|>" not in output.text


def test_chat_renders_the_template(llm: LLM) -> None:
    import jinja2

    messages = [{"role": "user", "content": "Who are you?"}]
    (result,) = llm.chat(messages, GREEDY, use_tqdm=False)
    text = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)
    assert result.prompt_token_ids == llm.get_tokenizer().encode(text, add_special_tokens=False)
    assert len(result.outputs[0].token_ids) == 12
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [r.outputs[0].text for r in two] == [result.outputs[0].text] * 2
    (plain,) = llm.chat(messages, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert len(plain.prompt_token_ids) < len(result.prompt_token_ids)
    for form in ("auto", "string"):
        (same,) = llm.chat(messages, GREEDY, use_tqdm=False, chat_template_content_format=form)
        assert same.prompt_token_ids == result.prompt_token_ids
    with pytest.raises(InvalidRequestError, match="template failed"):  # it adds texts, and parts are a list
        llm.chat(messages, GREEDY, use_tqdm=False, chat_template_content_format="openai")
    with pytest.raises(InvalidRequestError, match="chat_template_content_format must be one of"):
        llm.chat(messages, GREEDY, use_tqdm=False, chat_template_content_format="parts")


def test_the_prefix_cache_can_be_reset(llm: LLM) -> None:
    prompt = [list(range(50))]
    llm.generate(prompt, GREEDY, use_tqdm=False)
    before = llm.engine.core.stats().prefix_hits
    llm.generate(prompt, GREEDY, use_tqdm=False)
    assert llm.engine.core.stats().prefix_hits == before + 48
    assert llm.reset_prefix_cache()
    llm.generate(prompt, GREEDY, use_tqdm=False)
    assert llm.engine.core.stats().prefix_hits == before + 48


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


@pytest.mark.parametrize(
    "prompt",
    ["", [[]], None, 3, {"text": "x"}, [1.5], [True], 3.5, [10**6], [-1], ["fine", ""], {"prompt": None}],
    ids=str,
)
def test_wrong_prompts_name_the_field(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(prompt, GREEDY, use_tqdm=False)
    assert caught.value.param == "prompt"
    assert not llm.engine.core.has_work()


def test_default_parameters_are_vllms_under_the_models(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.max_tokens, params.n) == (1.0, 1.0, 16, 1)
    (result,) = llm.generate("x", use_tqdm=False)
    assert 1 <= len(result.outputs[0].token_ids) <= 16


def test_options_of_vllm(caplog: pytest.LogCaptureFixture) -> None:
    folder = variant_folder("llama-tied")
    ignored = {"swap_space": 4, "pipeline_parallel_size": 1}
    llm = LLM(str(folder), max_model_len=64, gpu_memory_utilization=0.9, enforce_eager=True, **ignored)
    assert llm.engine.config.max_model_len == 64
    without_effect = {"swap_space", "--gpu-memory-utilization, --enforce-eager"}
    assert {record.args[0] for record in caplog.records if record.args} == without_effect
    with pytest.raises(ConfigError, match="pipeline_parallel_size=2 is not supported"):
        LLM(str(folder), pipeline_parallel_size=2)
    with pytest.raises(ConfigError, match="no option max_modl_len"):
        LLM(str(folder), max_modl_len=64)
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM(str(folder), max_num_seqs=2.5)


def test_log_probabilities(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1, presence_penalty=2.0
    )
    (result,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    (output,) = result.outputs
    assert output.logprobs is not None and len(output.logprobs) == 4
    assert [next(iter(position)) for position in output.logprobs] == output.token_ids
    for position in output.logprobs:
        assert 2 <= len(position) <= 3
        by_rank = sorted(position.values(), key=lambda one: one.rank or 0)
        assert by_rank[0].rank == 1 and by_rank[0].logprob == max(one.logprob for one in by_rank)
    sampled = [
        position[token].logprob for position, token in zip(output.logprobs, output.token_ids, strict=True)
    ]
    assert output.cumulative_logprob == pytest.approx(sum(sampled))
    assert result.prompt_logprobs is not None and result.prompt_logprobs[0] is None
    pairs = zip(result.prompt_logprobs, result.prompt_token_ids, strict=True)
    assert all(position is None or token in position for position, token in pairs)
    decoded = output.logprobs[0][output.token_ids[0]].decoded_token
    assert decoded == llm.get_tokenizer().decode(output.token_ids[:1])
    chosen = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, logprob_token_ids=[3, 4])
    (other,) = llm.generate(PROMPTS[0], chosen, use_tqdm=False)[0].outputs
    assert other.logprobs is not None and list(other.logprobs[0])[-2:] == [3, 4]
    assert other.logprobs[0][4].rank is None
