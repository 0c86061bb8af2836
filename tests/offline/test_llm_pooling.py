"""`LLM.embed`, `encode` and `score`, as users of vLLM call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import variant_folder
from tiny_models import TOKENIZER_SIZE, make_hf_folder, reference

from microvllm import LLM, PoolingParams, SamplingParams
from microvllm.runtime.errors import ConfigError, InvalidRequestError

TEXTS = ["The quick brown fox", "The cache keeps", "x", "The quick brown fox jumps"]
OPTIONS: dict[str, Any] = {"dtype": "float32", "cpu_threads": 1, "num_gpu_blocks_override": 64}
SIZES = [16, 64]


def as_sentence_transformer(folder: Path, mode: str, *, normalize: bool = True, **settings: Any) -> Path:
    """Add the files by which sentence-transformers says how a folder's model makes vectors."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens", "lasttoken"), False) | {mode: True}
    pooling = {f"pooling_mode_{name}": value for name, value in modes.items()}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"include_prompt": True, **pooling}), "utf-8"
    )
    if settings:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_hf_folder(tmp_path_factory.mktemp("models") / "m", "qwen3", matryoshka_dimensions=SIZES)
    return as_sentence_transformer(path, "mean_tokens", max_seq_length=100)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    """Its files alone say that it makes vectors."""
    return LLM(str(folder), **OPTIONS)


@pytest.fixture(scope="module")
def expected(folder: Path, llm: LLM) -> list[np.ndarray]:
    """The mean of transformers' hidden states, not of length 1."""
    model, tokenizer = reference(folder), llm.get_tokenizer()
    with torch.no_grad():
        states = [model.model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0] for text in TEXTS]
    return [each.mean(0).numpy() for each in states]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_embed(llm: LLM, expected: list[np.ndarray]) -> None:
    outputs = llm.embed(TEXTS, use_tqdm=False)
    for text, output, vector in zip(TEXTS, outputs, expected, strict=True):
        assert np.allclose(output.outputs.embedding, unit(vector), atol=1e-5)
        assert output.outputs.hidden_size == len(vector) and output.finished
        assert output.prompt_token_ids == llm.get_tokenizer().encode(text)
    assert llm.model_config.runner_type == "pooling" and llm.model_config.max_model_len == 100
    (alone,) = llm.embed({"prompt_token_ids": outputs[0].prompt_token_ids}, use_tqdm=False)
    assert np.allclose(alone.outputs.embedding, outputs[0].outputs.embedding, atol=1e-6)


def test_encode_gives_tensors_in_the_requested_form(llm: LLM, expected: list[np.ndarray]) -> None:
    params = [PoolingParams(use_activation=False), PoolingParams(dimensions=16)]
    raw, cut = llm.encode(TEXTS[:2], params, pooling_task="embed", use_tqdm=False)
    assert isinstance(raw.outputs.data, torch.Tensor)
    assert np.allclose(raw.outputs.data.numpy(), expected[0], atol=1e-5)
    assert np.allclose(cut.outputs.data.numpy(), unit(expected[1][:16]), atol=1e-5)


def test_score(llm: LLM, expected: list[np.ndarray]) -> None:
    def cosine(i: int, j: int) -> float:
        return float(unit(expected[i]) @ unit(expected[j]))

    for first, second, pairs in (
        (TEXTS[0], TEXTS[3], [(0, 3)]),
        (TEXTS[0], TEXTS[1:], [(0, 1), (0, 2), (0, 3)]),
        (TEXTS[:2], TEXTS[2:], [(0, 2), (1, 3)]),
    ):
        scores = [output.outputs.score for output in llm.score(first, second, use_tqdm=False)]
        assert scores == pytest.approx([cosine(*pair) for pair in pairs], abs=1e-5)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda llm: llm.generate("x", use_tqdm=False), "--runner generate"),
        (lambda llm: llm.chat([{"role": "user", "content": "x"}], use_tqdm=False), "--runner generate"),
        (lambda llm: llm.engine.generate("x"), "--runner generate"),
        (lambda llm: llm.classify("x"), "no model here is a classifier"),
        (lambda llm: llm.encode("x", use_tqdm=False), "pooling_task must be 'embed'"),
        (lambda llm: llm.embed("x", pooling_params=PoolingParams(dimensions=17)), "cut to 16, 64"),
        (lambda llm: llm.embed("x", pooling_params=PoolingParams(task="classify")), "task must be"),
        (lambda llm: llm.embed("x", pooling_params=PoolingParams(step_tag_id=1)), "step_tag_id"),
        (lambda llm: llm.embed("x", pooling_params=SamplingParams()), "must be PoolingParams"),
        (lambda llm: llm.embed(["x", [TOKENIZER_SIZE]]), "out of vocabulary"),
        (lambda llm: llm.embed(""), "non-empty"),
        (lambda llm: llm.embed([[1] * 101]), "101 input tokens"),
        (lambda llm: llm.score(["x", "y"], ["z"]), "1:1, 1:N or N:N"),
        (lambda llm: llm.score("x", [], use_tqdm=False), "1:1, 1:N or N:N"),
    ],
)
def test_what_is_refused(llm: LLM, call: Any, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        call(llm)
    assert not llm.engine.core.has_work()


def test_a_model_that_generates_makes_no_vectors() -> None:
    llm = LLM(str(variant_folder("llama-tied")), **OPTIONS)
    for call in (llm.embed, lambda text: llm.score(text, text)):
        with pytest.raises(InvalidRequestError, match="--runner pooling"):
            call("x")


class TestOptions:
    """What --runner, --convert and --pooler-config make of a model's files."""

    def method(self, folder: Path, **options: Any) -> Any:
        from microvllm.runtime.config import EngineArgs

        pooling = EngineArgs(model=str(folder), **OPTIONS, **options).resolve().spec.pooling
        return None if pooling is None else (pooling.method, pooling.normalize)

    def config_of(self, folder: Path, **changes: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")

    @pytest.fixture
    def plain(self, tmp_path: Path) -> Path:
        return make_hf_folder(tmp_path / "plain", "llama", num_hidden_layers=1)

    def test_the_files_decide_unless_an_option_does(self, plain: Path) -> None:
        assert self.method(plain) is None
        assert self.method(plain, convert="none") is None
        for options in ({"runner": "pooling"}, {"convert": "embed"}):
            assert self.method(plain, **options) == ("last", True)
        mean = {"pooling_type": "MEAN", "use_activation": False}
        assert self.method(plain, runner="pooling", pooler_config=mean) == ("mean", False)
        as_sentence_transformer(plain, "mean_tokens", normalize=False)
        assert self.method(plain) == ("mean", False)
        assert self.method(plain, runner="generate") is None
        cls = {"seq_pooling_type": "CLS", "task": "embed", "tok_pooling_type": None}
        assert self.method(plain, pooler_config=cls) == ("first", False)
        as_sentence_transformer(plain, "lasttoken")
        assert self.method(plain) == ("last", True)

    def test_a_class_without_a_head_makes_vectors(self, plain: Path) -> None:
        self.config_of(plain, architectures=["LlamaModel"])
        assert self.method(plain) == ("last", True)
        with pytest.raises(ConfigError, match="architectures names a model without a head"):
            self.method(plain, runner="generate")

    @pytest.mark.parametrize("mode", ["max_tokens", "weightedmean_tokens"])
    def test_another_pooling_is_refused_by_name(self, plain: Path, mode: str) -> None:
        as_sentence_transformer(plain, mode)
        with pytest.raises(ConfigError, match=rf"1_Pooling/config.json: pooling_mode '{mode}' is not"):
            self.method(plain)
        assert self.method(plain, runner="generate") is None

    def test_the_newer_form_of_the_pooling(self, plain: Path) -> None:
        as_sentence_transformer(plain, "lasttoken")
        path = plain / "1_Pooling" / "config.json"
        for given, expected in (("lasttoken", "last"), (["mean"], "mean"), ("cls", "first")):
            path.write_text(json.dumps({"embedding_dimension": 144, "pooling_mode": given}), "utf-8")
            assert self.method(plain) == (expected, True)
        path.write_text(json.dumps({"pooling_mode": ["mean", "cls"]}), "utf-8")
        with pytest.raises(ConfigError, match="pooling_mode 'mean, cls' is not supported"):
            self.method(plain)

    def test_modules_that_are_not_computed_are_refused(self, plain: Path) -> None:
        as_sentence_transformer(plain, "mean_tokens")
        path = plain / "modules.json"
        modules = json.loads(path.read_text("utf-8"))
        dense = {"idx": 3, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
        path.write_text(json.dumps([*modules, dense]), "utf-8")
        with pytest.raises(ConfigError, match=r"modules\.json: lists a module 'Dense'"):
            self.method(plain)
        outside = [{**module, "path": "../1_Pooling"} for module in modules]
        path.write_text(json.dumps(outside), "utf-8")
        with pytest.raises(ConfigError, match="must be a folder's name"):
            self.method(plain)
        for broken in ("{}", "[1]", "[", ""):
            path.write_text(broken, "utf-8")
            with pytest.raises(ConfigError, match=r"modules\.json"):
                self.method(plain)
        path.write_text(json.dumps(modules[:1]), "utf-8")
        assert self.method(plain) is None  # a transformer alone

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"is_causal": False}, "is_causal is false"),
            ({"matryoshka_dimensions": "all"}, "matryoshka_dimensions must be a list"),
            ({"is_matryoshka": 1}, "is_matryoshka must be true or false"),
        ],
    )
    def test_a_configuration_that_does_not_fit(
        self, plain: Path, changes: dict[str, Any], problem: str
    ) -> None:
        self.config_of(plain, **changes)
        with pytest.raises(ConfigError, match=problem):
            self.method(plain, runner="pooling")

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"runner": "draft"}, "--runner must be one of"),
            ({"convert": "classify"}, "--convert must be one of"),
            ({"convert": "embed", "runner": "generate"}, "does not fit --runner generate"),
            ({"convert": "none", "runner": "pooling"}, "--convert none"),
            ({"pooler_config": {"pooling_type": "MEAN"}}, "the model generates texts"),
            ({"pooler_config": {}, "runner": "generate"}, "does not fit --runner generate"),
            ({"pooler_config": {"pooling_type": "MAX"}}, "pooling_type must be one of LAST, MEAN, CLS"),
            ({"pooler_config": {"pooling_type": ["MEAN"]}}, "pooling_type must be one of"),
            ({"pooler_config": {"pooling_type": "LAST", "seq_pooling_type": "LAST"}}, "are one setting"),
            ({"pooler_config": {"use_activation": "yes"}}, "use_activation must be true or false"),
            ({"pooler_config": {"normalize": True}}, "normalize is not supported"),
            ({"pooler_config": {"max_embed_len": 5}}, "max_embed_len is not supported"),
            ({"pooler_config": {"enable_chunked_processing": True}}, "enable_chunked_processing is not"),
            ({"pooler_config": {"task": "classify"}}, "task is not supported"),
            ({"pooler_config": {"poolng_type": "LAST"}}, "poolng_type is no key"),
            ({"pooler_config": {"dimensions": 64}}, "does not support Matryoshka"),
            ({"pooler_config": {"dimensions": "64"}}, "dimensions must be an integer"),
        ],
    )
    def test_options_that_do_not_fit(self, plain: Path, options: dict[str, Any], problem: str) -> None:
        if "pooler_config" in options and problem != "the model generates texts":
            options = {"runner": "pooling", **options}
        with pytest.raises(ConfigError, match=problem):
            self.method(plain, **options)

    def test_overrides_make_a_model_matryoshka(self, plain: Path) -> None:
        from microvllm.runtime.config import EngineArgs

        options = {**OPTIONS, "hf_overrides": {"is_matryoshka": True}, "pooler_config": {"dimensions": 8}}
        pooling = EngineArgs(model=str(plain), runner="pooling", **options).resolve().spec.pooling
        assert pooling is not None and (pooling.matryoshka, pooling.size) == ((), 8)
