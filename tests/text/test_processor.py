"""Prompts and parameters on their way to the engine: what is checked, once, and how a request fans out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_client import EOS, VOCAB_SIZE, FakeTokenizer
from tiny_models import make_hf_folder

from microvllm.runtime.config import EngineArgs
from microvllm.runtime.errors import ContextLengthError, InvalidRequestError
from microvllm.runtime.request import INT64_MAX, SamplingParams
from microvllm.runtime.text.chat_template import ChatTemplate
from microvllm.runtime.text.input_processor import InputProcessor
from microvllm.runtime.text.template_sandbox import Sandbox

PARTS = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"


class Ids(list[int]):
    """Counts how often it is walked from end to end."""

    walks = 0

    def __iter__(self) -> Any:
        self.walks += 1
        return super().__iter__()


def make(template: ChatTemplate | None = None, **templates: str) -> InputProcessor:
    tokenizer: Any = FakeTokenizer()
    tokenizer.chat_template, tokenizer.chat_templates = templates.get("default"), templates
    config: Any = SimpleNamespace(
        max_model_len=64,
        spec=SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=[EOS, 5], pooling=None),
        generation_defaults={"temperature": 0.5, "max_new_tokens": 9},
        max_logprobs=20,
    )
    return InputProcessor(config, tokenizer, template)


@pytest.fixture
def processor() -> InputProcessor:
    return make()


@pytest.mark.parametrize(
    ("ids", "param"),
    [
        ([], "prompt"),
        ([1, -1, 2], "prompt"),
        ([1, VOCAB_SIZE], "prompt"),
        ([2**70, 0], "prompt"),
        ([1] * 64, "max_tokens"),
        ([1] * 65, "input_tokens"),
    ],
)
def test_wrong_prompts(processor: InputProcessor, ids: list[int], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        processor.check_prompt(ids)
    assert caught.value.param == param
    with pytest.raises(InvalidRequestError):
        processor.requests(ids, SamplingParams())


def test_the_edges_of_the_vocabulary_and_the_context_pass(processor: InputProcessor) -> None:
    processor.check_prompt([0, VOCAB_SIZE - 1])
    processor.check_prompt([0] * 63)


def test_a_prompt_is_walked_once(processor: InputProcessor) -> None:
    ids = Ids([1, 2, 3])
    assert len(processor.samples(ids, processor.prepare(SamplingParams(n=3)))) == 3
    assert ids.walks == 0
    processor.requests(ids, SamplingParams())
    assert ids.walks == 2  # min and max


def test_a_text_that_cannot_fit_is_not_tokenised(processor: InputProcessor) -> None:
    assert processor.tokenize_prompt("abc", False) == [97, 98, 99]
    with pytest.raises(ContextLengthError) as caught:
        processor.tokenize_prompt("a" * 10_000)
    assert caught.value.param == "input_text"


def test_requests(processor: InputProcessor) -> None:
    first, second = processor.requests([1, 2], SamplingParams(n=2, max_tokens=None, seed=INT64_MAX))
    assert first.request_id != second.request_id
    assert [request.seed for request in (first, second)] == [INT64_MAX, -INT64_MAX - 1]
    assert {request.params.max_tokens for request in (first, second)} == {62}
    assert (first.eos_token_id, first.stop_token_ids) == (EOS, [5])
    (free,) = processor.requests([1], SamplingParams(ignore_eos=True, stop_token_ids=[7], max_tokens=99))
    assert (free.eos_token_id, free.stop_token_ids, free.params.max_tokens) == (None, [7], 63)
    with pytest.raises(InvalidRequestError) as caught:
        processor.requests([1] * 60, SamplingParams(max_tokens=None, min_tokens=5))
    assert caught.value.param == "min_tokens"
    with pytest.raises(InvalidRequestError) as caught:
        processor.requests([1], SamplingParams(stop_token_ids=[VOCAB_SIZE]))
    assert caught.value.param == "stop_token_ids"


@pytest.mark.parametrize(("field", "what"), [("logprobs", "sample"), ("prompt_logprobs", "prompt")])
@pytest.mark.parametrize("count", [21, -1])
def test_too_many_log_probabilities(processor: InputProcessor, field: str, what: str, count: int) -> None:
    wish: dict[str, Any] = {field: count}
    text = f"Requested {what} logprobs of {count}, which is greater than max allowed: 20$"
    with pytest.raises(InvalidRequestError, match=text) as caught:
        processor.requests([1], SamplingParams(**wish))
    assert caught.value.param == field


def test_defaults_are_the_models(processor: InputProcessor) -> None:
    assert processor.default_params() == {"temperature": 0.5, "max_tokens": 9}


def test_bad_words_are_spelt_at_the_start_and_after_a_space(processor: InputProcessor) -> None:
    (request,) = processor.requests([1], SamplingParams(bad_words=["ab", " ab", " "]))
    a, b, space = b"ab "
    assert request.bad_word_ids == [[a, b], [space, a, b], [space]]


def test_an_end_beyond_the_logits_is_no_end(processor: InputProcessor) -> None:
    """The tokenizer may be larger than the model; a mask for `min_tokens` would be written past the row."""
    tokenizer: Any = FakeTokenizer()
    tokenizer.chat_template, tokenizer.eos_token_id = None, VOCAB_SIZE
    config: Any = SimpleNamespace(
        max_model_len=64,
        spec=SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=[], pooling=None),
        generation_defaults={"eos_token_id": [3, 4]},
        max_logprobs=20,
    )
    (request,) = InputProcessor(config, tokenizer).requests([1], SamplingParams(min_tokens=2, max_tokens=9))
    assert (request.eos_token_id, request.stop_token_ids) == (3, [4])


@pytest.mark.parametrize(
    ("ends", "kept", "ignored"),
    [(7, [7], ()), ([7, -1, 320, None, 9], [7, 9], (-1, 320)), (-1, [], (-1,)), (1 << 60, [], (1 << 60,))],
)
def test_ends_of_a_generation_config_outside_of_the_vocabulary_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ends: Any, kept: list[int], ignored: tuple[int, ...]
) -> None:
    model = make_hf_folder(tmp_path / "model", "llama")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), "utf-8")
    args = EngineArgs(model=str(model), device="cpu", attention_backend="torch")
    assert args.resolve().generation_defaults == {"eos_token_id": kept}
    for token in ignored:
        assert f"generation_config.json: eos_token_id {token} is ignored" in caplog.text


def test_an_overridden_end_outside_of_the_vocabulary_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = EngineArgs(
        model=str(make_hf_folder(tmp_path / "model", "llama")),
        device="cpu",
        attention_backend="torch",
        override_generation_config={"eos_token_id": [3, 320]},
    )
    assert args.resolve().generation_defaults == {"eos_token_id": [3]}
    assert "--override-generation-config: eos_token_id 320 is ignored" in caplog.text


def test_a_template_by_its_name() -> None:
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    user: Any = [{"role": "user", "content": "hi"}]
    own = {"default": "plain {{ messages[0].content }}", "tool_use": "tools", "parts": PARTS}
    processor = make(**own)
    assert processor.render_text(user) == "plain hi"
    assert processor.render_text(user, tools=tools) == "tools"
    assert processor.render_text(user, chat_template="parts", tools=tools) == "hi"
    assert processor.render_text(user, chat_template="{{ messages[0].role }}") == "user"
    given = make(ChatTemplate("given", {}, Sandbox()), **own)
    assert given.render_text(user) == given.render_text(user, tools=tools) == "given"


def test_without_a_default_template() -> None:
    user: Any = [{"role": "user", "content": "hi"}]
    processor = make(tool_use="tools", rag="rag")
    assert processor.render_text(user, tools=[]) == "tools"
    with pytest.raises(InvalidRequestError, match="Its templates are rag, tool_use; none is the default"):
        processor.render_text(user)
    with pytest.raises(InvalidRequestError, match="this model has none"):
        make().render_text(user)
