"""Embeddings, scores and rerankings over HTTP: forms of a request, refusals, and both kinds of server."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
import pytest
from fake_client import BOS, EOS, FakeClient, vector_of
from http_tools import eventually, in_process, real_server

from microvllm.adapters.pooling_spec import Pooling
from microvllm.openai_compat.api.vectors.texts import MAX_INPUTS
from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.errors import EngineError

EMBEDDINGS = "/v1/embeddings"


def make_client(**pooling: Any) -> FakeClient:
    return FakeClient(pooling=Pooling(**pooling))


def ids(text: str) -> list[int]:
    return [BOS, *text.encode()]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector.astype(np.float64))


async def ask(client: FakeClient, body: Any, path: str = EMBEDDINGS, **args: Any) -> Any:
    """The parsed answer, which is a good one."""
    async with in_process(client, **args) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_options_of_texts_warn_on_vectors(caplog: pytest.LogCaptureFixture) -> None:
    args = ServerArgs(reasoning_parser="qwen3", stream_interval=2, enable_prompt_tokens_details=True)
    create_app(make_client(), args)  # type: ignore[arg-type]
    flags = "--reasoning-parser, --stream-interval"
    assert caplog.messages == [f"{flags}: no effect on a model that makes vectors"]
    caplog.clear()
    create_app(FakeClient(), args)  # type: ignore[arg-type]
    assert not caplog.messages


async def refusal(client: FakeClient, body: Any, path: str = EMBEDDINGS) -> tuple[str, str]:
    """The message and the field of a 400; nothing was submitted."""
    async with in_process(client) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 400 and not client.submitted, answer.text
    error = answer.json()["error"]
    return error["message"], error["param"]


class TestForms:
    @pytest.mark.parametrize(
        ("given", "prompts"),
        [
            ("hi", [ids("hi")]),
            (["hi", "you"], [ids("hi"), ids("you")]),
            ([1, 2, 3], [[1, 2, 3]]),
            ([[1, 2], [3]], [[1, 2], [3]]),
            ("x" * 255, [ids("x" * 255)]),  # fills the context: no room is needed for a token
        ],
    )
    async def test_what_the_input_may_be(self, given: Any, prompts: list[list[int]]) -> None:
        client = make_client()
        answer = await ask(client, {"model": "fake-model", "input": given})
        assert [prompt for prompt, *_ in client.submitted] == prompts
        assert answer["object"] == "list" and answer["model"] == "fake-model"
        assert answer["id"].startswith("embd-") and answer["created"] > 0
        for index, (entry, prompt) in enumerate(zip(answer["data"], prompts, strict=True)):
            assert (entry["index"], entry["object"]) == (index, "embedding")
            assert np.allclose(entry["embedding"], unit(vector_of(prompt)), atol=1e-6)
        count = sum(map(len, prompts))
        assert answer["usage"] == {
            "prompt_tokens": count,
            "total_tokens": count,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }
        assert not client.running

    async def test_conversations(self) -> None:
        """In `messages`, or in `input`; one of them or a list of them."""
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        one, other = list(b"user: hi\nassistant: yes\n"), list(b"user: hi\nassistant: yes\nassistant: ")
        for body, prompts in (
            ({"messages": talk}, [one]),
            ({"input": talk}, [one]),
            ({"messages": [talk, talk[:1]]}, [one, list(b"user: hi\n")]),
            ({"input": [talk]}, [one]),
            ({"messages": talk, "add_generation_prompt": True}, [other]),
            ({"messages": talk, "continue_final_message": True}, [one[:-1]]),
            ({"messages": talk, "add_special_tokens": True}, [[BOS, *one]]),
            ({"messages": talk, "truncate_prompt_tokens": 4}, [one[:4]]),
        ):
            client = make_client()
            answer = await ask(client, body)
            assert [prompt for prompt, *_ in client.submitted] == prompts, body
            assert len(answer["data"]) == len(prompts)

    async def test_base64_holds_the_same_numbers(self) -> None:
        body = {"input": ["hi", "you"]}
        numbers = await ask(make_client(), body)
        encoded = await ask(make_client(), {**body, "encoding_format": "base64"})
        for one, other in zip(numbers["data"], encoded["data"], strict=True):
            vector = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
            assert np.array_equal(np.array(one["embedding"], np.float32), vector)

    async def test_length_one_is_the_models_choice_or_the_requests(self) -> None:
        raw = vector_of(ids("hi"))
        for stored, asked, normal in ((True, None, 1), (True, False, 0), (False, None, 0), (False, True, 1)):
            body = {"input": "hi", "use_activation": asked}
            (entry,) = (await ask(make_client(normalize=stored), body))["data"]
            assert np.allclose(entry["embedding"], unit(raw) if normal else raw, atol=1e-6)

    async def test_dimensions_cut_first(self) -> None:
        raw = vector_of(ids("hi"))
        for pooling, asked, size in (
            ({"matryoshka": ()}, 3, 3),
            ({"matryoshka": ()}, 8, 8),
            ({"matryoshka": (2, 4)}, 4, 4),
            ({"matryoshka": (), "size": 5}, None, 5),
            ({"matryoshka": (), "size": 5}, 6, 6),
        ):
            (entry,) = (await ask(make_client(**pooling), {"input": "hi", "dimensions": asked}))["data"]
            assert np.allclose(entry["embedding"], unit(raw[:size]), atol=1e-6)

    @pytest.mark.parametrize(
        ("options", "kept"),
        [
            ({"truncate_prompt_tokens": 3}, [BOS, *b"ab"]),
            ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [BOS, *b"ab"]),
            ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, list(b"fgh")),
            ({"truncate_prompt_tokens": 3, "add_special_tokens": False}, list(b"abc")),
            ({"truncate_prompt_tokens": 1}, [BOS]),
            ({"truncate_prompt_tokens": -1}, [BOS, *b"abcdefgh"]),
            ({"truncate_prompt_tokens": 100}, [BOS, *b"abcdefgh"]),
        ],
    )
    async def test_the_first_tokens_are_kept(self, options: dict[str, Any], kept: list[int]) -> None:
        client = make_client()
        await ask(client, {"input": "abcdefgh", **options})
        assert client.submitted[0][0] == kept

    async def test_a_special_token_at_the_end_survives(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The vector is the last token's: without its end token a text would have another."""
        client = make_client()
        encode = client.tokenizer.encode

        def with_end(text: str, add_special_tokens: bool = True) -> list[int]:
            return [*encode(text, False), *([EOS] if add_special_tokens else [])]

        monkeypatch.setattr(client.tokenizer, "encode", with_end)
        await ask(client, {"input": ["abcdefgh", "x" * 9999], "truncate_prompt_tokens": 4})
        assert [prompt for prompt, *_ in client.submitted] == [[*b"abc", EOS], [*b"xxx", EOS]]
        client.submitted.clear()
        await ask(client, {"input": "x" * 9999, "truncate_prompt_tokens": -1})
        assert client.submitted[0][0] == [*b"x" * 255, EOS]

    async def test_ids_are_cut_too(self) -> None:
        client = make_client()
        await ask(client, {"input": [[1, 2, 3], [4]], "truncate_prompt_tokens": 2})
        await ask(client, {"input": [*range(250)] * 9, "truncate_prompt_tokens": -1})
        assert [prompt for prompt, *_ in client.submitted] == [[1, 2], [4], [*range(250), *range(6)]]

    async def test_the_rest_of_a_request_is_passed_on(self) -> None:
        client = make_client()
        body = {"input": "hi", "priority": 3, "cache_salt": "s", "request_id": "mine", "user": "u"}
        answer = await ask(client, body, enable_prompt_tokens_details=True)
        assert client.submitted[0][2:] == (3, "s") and answer["id"] == "embd-mine"
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

    async def test_as_many_texts_as_openai_takes(self) -> None:
        answer = await ask(make_client(), {"input": ["a"] * MAX_INPUTS, "encoding_format": "base64"})
        assert [entry["index"] for entry in answer["data"]] == list(range(MAX_INPUTS))


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "param", "problem"),
        [
            ({}, "body.input", "Give either input or messages"),
            ({"input": None}, "body.input", "Give either input or messages"),
            ({"input": "x", "messages": [{"role": "user", "content": "x"}]}, "body.input", "Give either"),
            ({"input": ""}, "input", "input must not be empty"),
            ({"input": []}, "input", "input must not be empty"),
            ({"input": ["a", ""]}, "input", "input[1] must not be empty"),
            ({"input": [[]]}, "input", "input[0] must not be empty"),
            ({"input": [[1], []]}, "input", "input[1] must not be empty"),
            ({"input": 5}, "body.input", "Input should be a string"),
            ({"input": {"a": 1}}, "body.input", "Input should be a string"),
            ({"input": [True]}, "body.input", "Input should be a string"),
            ({"input": ["a", [1]]}, "body.input", "Input should be a string"),
            ({"input": [1, "a"]}, "body.input", "Token ids should be integers"),
            ({"input": [[1.5]]}, "body.input", "Token ids should be integers"),
            ({"input": [-1]}, "input", "Token id -1 is out of vocabulary"),
            ({"input": [[1], [258]]}, "input", "Token id 258 is out of vocabulary"),
            ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", f"the limit is {MAX_INPUTS}"),
            ({"input": "x" * 256}, "input_tokens", "257 input tokens"),
            ({"input": [1] * 257}, "input_tokens", "257 input tokens"),
            ({"input": "", "add_special_tokens": False}, "input", "must not be empty"),
            ({"input": "x" * 99999}, "input_text", "99999 characters"),
            ({"input": "x", "dimensions": 4}, "dimensions", "does not support Matryoshka"),
            ({"input": "x", "dimensions": 0}, "dimensions", "does not support Matryoshka"),
            ({"input": "x", "dimensions": "four"}, "body.dimensions", "valid integer"),
            ({"input": "x", "encoding_format": "bytes"}, "body.encoding_format", "'base64', 'float'"),
            ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
            ({"input": "x", "truncate_prompt_tokens": 257}, "truncate_prompt_tokens", "max_model_len"),
            ({"input": "x", "truncate_prompt_tokens": -2}, "body.truncate_prompt_tokens", "-1"),
            ({"input": "x", "normalize": True}, "normalize", "not supported"),
            ({"input": "x", "embed_dtype": "float16"}, "embed_dtype", "not supported"),
            ({"input": "x", "padding": "max_length"}, "padding", "not supported"),
            ({"messages": []}, "messages", "messages"),
            ({"messages": [[]]}, "messages", "messages"),
            ({"messages": [5]}, "messages", "messages"),
            ({"messages": [[{"role": "user", "content": "x"}], 5]}, "messages", "messages"),
            ({"input": [{"role": "user"}, "x"]}, "messages", "messages"),
        ],
    )
    async def test_a_wrong_request_is_named(self, body: dict[str, Any], param: str, problem: str) -> None:
        message, field = await refusal(make_client(), body)
        assert problem in message and field is not None and (field == param or field.startswith(param))

    @pytest.mark.parametrize(
        ("pooling", "size", "problem"),
        [
            ({"matryoshka": ()}, 0, "1 to 8 dimensions"),
            ({"matryoshka": ()}, 9, "1 to 8 dimensions"),
            ({"matryoshka": (2, 4)}, 3, "can be cut to 2, 4 dimensions"),
        ],
    )
    async def test_sizes_that_the_model_was_not_trained_for(
        self, pooling: dict[str, Any], size: int, problem: str
    ) -> None:
        message, param = await refusal(make_client(**pooling), {"input": "x", "dimensions": size})
        assert problem in message and param == "dimensions"

    async def test_an_unknown_model_is_404(self) -> None:
        async with in_process(make_client()) as http:
            answer = await http.post(EMBEDDINGS, json={"input": "x", "model": "other"})
        assert answer.status_code == 404 and answer.json()["error"]["param"] == "model"

    async def test_a_full_queue_is_503(self) -> None:
        client = make_client()
        client.busy = True
        async with in_process(client) as http:
            answer = await http.post(EMBEDDINGS, json={"input": "x"})
        assert answer.status_code == 503 and "retry-after" in answer.headers

    async def test_a_text_that_fails_ends_the_others(self) -> None:
        client = make_client()
        client.fail_after, client.failure = 0, EngineError("the model gave no finite logits")
        async with in_process(client) as http:
            answer = await http.post(EMBEDDINGS, json={"input": ["x", "y", "z"]})
        assert answer.status_code == 500 and "finite" in answer.text
        assert not client.running and client.aborted == 2

    async def test_a_vector_that_is_missing_is_no_nan(self) -> None:
        client = make_client()
        submit = client.submit_all

        async def without_vectors(*args: Any, **options: Any) -> Any:
            streams = await submit(*args, **options)
            streams[-1].pooled = None
            return streams

        client.submit_all = without_vectors  # type: ignore[method-assign]
        async with in_process(client) as http:
            answer = await http.post(EMBEDDINGS, json={"input": ["x", "y"]})
        assert answer.status_code == 500


def test_a_client_that_leaves_frees_its_texts() -> None:
    client = make_client()
    client.stall_after = 0
    with real_server(client) as port, httpx.Client(timeout=None) as http:

        async def leave() -> None:
            async with httpx.AsyncClient(timeout=None) as leaving:
                asked = asyncio.ensure_future(
                    leaving.post(f"http://127.0.0.1:{port}{EMBEDDINGS}", json={"input": ["x", "y"]})
                )
                while len(client.running) < 2:
                    await asyncio.sleep(0.005)
                asked.cancel()

        asyncio.run(leave())
        eventually(lambda: not client.running)
        assert client.aborted == 2 and http.get(f"http://127.0.0.1:{port}/health").status_code == 200


class TestScores:
    DOCUMENTS = ("a cat", "a dog", "a stone")

    @staticmethod
    def cosine(one: str, other: str) -> float:
        return float(unit(vector_of(ids(one))) @ unit(vector_of(ids(other))))

    @pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
    async def test_documents_in_their_order(self, path: str) -> None:
        client = make_client()
        answer = await ask(client, {"query": "cat?", "documents": [*self.DOCUMENTS], "model": ""}, path)
        expected = sorted(self.DOCUMENTS, key=lambda text: -self.cosine("cat?", text))
        assert [result["document"]["text"] for result in answer["results"]] == expected
        for result in answer["results"]:
            text = self.DOCUMENTS[result["index"]]
            assert result["document"]["text"] == text
            assert result["relevance_score"] == pytest.approx(self.cosine("cat?", text), abs=1e-6)
        tokens = sum(len(ids(text)) for text in ("cat?", *self.DOCUMENTS))
        assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert answer["id"].startswith("rerank-") and answer["model"] == "fake-model"

    async def test_the_best_of_them(self) -> None:
        body = {"query": "cat?", "documents": [*self.DOCUMENTS]}
        whole = await ask(make_client(), body, "/rerank")
        for top_n in (0, 1, 2, 9):
            best = await ask(make_client(), {**body, "top_n": top_n}, "/rerank")
            assert best["results"] == whole["results"][: top_n or None]

    @pytest.mark.parametrize("path", ["/score", "/v1/score"])
    @pytest.mark.parametrize(
        "names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
    )
    async def test_one_to_one_to_many_and_in_pairs(self, path: str, names: tuple[str, str]) -> None:
        many = [*self.DOCUMENTS]
        for first, second, pairs in (
            ("x", "y", [("x", "y")]),
            (["x"], many, [("x", text) for text in many]),
            (["x", "y", "z"], many, [*zip("xyz", many, strict=True)]),
        ):
            answer = await ask(make_client(), dict(zip(names, (first, second), strict=True)), path)
            scores = [entry["score"] for entry in answer["data"]]
            assert scores == pytest.approx([self.cosine(*pair) for pair in pairs], abs=1e-6)
            assert [entry["index"] for entry in answer["data"]] == list(range(len(pairs)))

    async def test_texts_are_cut_to_their_limits(self) -> None:
        client = make_client()
        body = {"query": "abcdef", "documents": ["ghijkl", "m"]}
        await ask(client, {**body, "max_tokens_per_query": 2, "max_tokens_per_doc": 3}, "/rerank")
        assert [prompt for prompt, *_ in client.submitted] == [ids("ab"), ids("ghi"), ids("m")]

    @pytest.mark.parametrize(
        ("path", "body", "problem"),
        [
            ("/rerank", {"query": "x"}, "documents"),
            ("/rerank", {"query": "", "documents": ["x"]}, "query"),
            ("/rerank", {"query": "x", "documents": []}, "documents must not be empty"),
            ("/rerank", {"query": "x", "documents": None}, "documents"),
            ("/rerank", {"query": "x", "documents": [[1]]}, "a list of strings"),
            ("/rerank", {"query": "x", "documents": [{"content": []}]}, "documents"),
            ("/rerank", {"query": "x", "documents": 5}, "documents: Input should be a string or a list of"),
            ("/rerank", {"query": "x", "documents": ["y"], "top_n": -1}, "top_n"),
            ("/rerank", {"query": "x", "documents": ["y"], "instruction": "be kind"}, "instruction"),
            ("/rerank", {"query": "x", "documents": ["y"], "max_tokens_per_doc": 256}, "max_tokens_per_doc"),
            ("/rerank", {"query": "x", "documents": ["y" * 300]}, "301 input tokens"),
            ("/score", {"queries": "x"}, "Give queries and documents"),
            ("/score", {"queries": ["x", "y"], "documents": ["z"]}, "1:1, 1:N or N:N"),
            ("/score", {"queries": "x", "documents": "y", "text_1": "z"}, "and no other of them"),
            ("/score", {"text_1": "x", "text_2": [1]}, "a list of strings"),
        ],
    )
    async def test_a_wrong_request_is_named(self, path: str, body: dict[str, Any], problem: str) -> None:
        message, _ = await refusal(make_client(), body, path)
        assert problem in message


class TestKinds:
    POOLING = (EMBEDDINGS, "/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score")
    GENERATE = ("/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream")

    @pytest.mark.parametrize("pooling", [True, False])
    async def test_a_server_has_the_endpoints_of_its_model(self, pooling: bool) -> None:
        client = make_client() if pooling else FakeClient()
        absent, present = (self.GENERATE, self.POOLING) if pooling else (self.POOLING, self.GENERATE)
        async with in_process(client) as http:
            for path in absent:
                answer = await http.post(path, json={"input": "x", "prompt": "x"})
                error = answer.json()["error"]
                assert (answer.status_code, error["type"]) == (400, "NotImplementedError")
                assert path in error["message"] and "--runner " in error["message"]
            paths = (await http.get("/openapi.json")).json()["paths"]
            assert paths.keys() >= {*present, "/tokenize", "/v1/models"} and not paths.keys() & {*absent}
            models = (await http.get("/v1/models")).json()
        assert [card["id"] for card in models["data"]] == ["fake-model"]
