"""Vectors through the HTTP surface and the openai SDK from a real engine, against transformers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import pytest_asyncio
import torch
from model_tools import make_prompts
from tiny_models import TOKENIZER_SIZE, make_hf_folder, reference

from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.process.client import EngineClient

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXTS = ["The quick brown fox", "The cache keeps the keys and values.", "x", "Naïve café, 世界. " * 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_folder(tmp_path_factory.mktemp("models") / "llama", "llama", is_matryoshka=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[EngineClient]:
    config = EngineArgs(
        model=str(folder),
        runner="pooling",
        dtype="float32",
        cpu_threads=1,
        num_gpu_blocks_override=256,
        max_num_batched_tokens=32,  # so that texts are computed in several pieces
        max_num_seqs=8,
        max_model_len=256,
    ).resolve()
    client = await EngineClient.start(config)
    yield client
    await client.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(engine: EngineClient) -> AsyncIterator[httpx.AsyncClient]:
    args = ServerArgs(served_model_names=("m",), enable_prompt_tokens_details=True)
    app = create_app(engine, args)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sdk(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="-", http_client=http)


def expected(folder: Path, prompts: list[list[int]], size: int | None = None) -> np.ndarray:
    """The last hidden states of transformers at length 1, cut first: [prompts, size]."""
    model = reference(folder)
    with torch.no_grad():
        last = [model.model(torch.tensor([ids])).last_hidden_state[0, -1, :size] for ids in prompts]
    return torch.nn.functional.normalize(torch.stack(last), dim=-1).numpy()


async def test_what_the_sdk_gets(folder: Path, engine: EngineClient, sdk: openai.AsyncOpenAI) -> None:
    """It asks for base64 unless it is told otherwise."""
    prompts = [engine.tokenizer.encode(text) for text in TEXTS]
    answer = await sdk.embeddings.create(model="m", input=TEXTS)
    vectors = np.array([entry.embedding for entry in answer.data])
    assert np.allclose(vectors, expected(folder, prompts), atol=1e-5)
    assert [entry.index for entry in answer.data] == [0, 1, 2, 3] and answer.model == "m"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, prompts))
    numbers = await sdk.embeddings.create(model="m", input=TEXTS, encoding_format="float")
    assert np.allclose([entry.embedding for entry in numbers.data], vectors, atol=1e-6)
    short = await sdk.embeddings.create(model="m", input=prompts, dimensions=16)
    assert np.allclose([entry.embedding for entry in short.data], expected(folder, prompts, 16), atol=1e-5)


async def test_many_at_once_and_again_from_the_cache(
    folder: Path, http: httpx.AsyncClient, sdk: openai.AsyncOpenAI
) -> None:
    prompts = make_prompts(12, TOKENIZER_SIZE, longest=256)  # the longest fills the context
    wanted = expected(folder, prompts)
    found = await asyncio.gather(*(sdk.embeddings.create(model="m", input=[ids]) for ids in prompts))
    assert np.allclose([answer.data[0].embedding for answer in found], wanted, atol=1e-5)
    again = await http.post("/v1/embeddings", json={"input": prompts})
    vectors = [entry["embedding"] for entry in again.json()["data"]]
    assert np.allclose(vectors, wanted, atol=1e-5)
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


async def test_a_request_that_is_given_up_frees_the_engine(
    engine: EngineClient, http: httpx.AsyncClient
) -> None:
    prompts = make_prompts(64, TOKENIZER_SIZE, seed=1, longest=250)
    asked = asyncio.ensure_future(http.post("/v1/embeddings", json={"input": prompts}))
    while engine.stats.num_running == 0:
        await asyncio.sleep(0.001)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    while engine.stats.num_running or engine.stats.num_waiting:
        await asyncio.sleep(0.001)
        await http.post("/v1/embeddings", json={"input": "x"})  # the counts come with steps
    assert engine.stats.kv_blocks_used == 0


async def test_texts_are_counted(http: httpx.AsyncClient) -> None:
    def value(text: str, name: str) -> float:
        line = next(line for line in text.splitlines() if line.startswith(name))
        return float(line.split()[-1])

    names = ('vllm:request_success_total{engine="0",finished_reason="stop"', "vllm:prompt_tokens_total{")
    before = (await http.get("/metrics")).text
    await http.post("/v1/embeddings", json={"input": [[1, 2, 3], [4, 5]]})
    after = (await http.get("/metrics")).text
    assert [value(after, name) - value(before, name) for name in names] == [2, 5]
    assert value(after, "vllm:generation_tokens_total") == 0


async def test_scores(engine: EngineClient, folder: Path, http: httpx.AsyncClient) -> None:
    vectors = expected(folder, [engine.tokenizer.encode(text) for text in TEXTS])
    answer = await http.post("/rerank", json={"query": TEXTS[0], "documents": TEXTS[1:]})
    results = {result["index"]: result["relevance_score"] for result in answer.json()["results"]}
    assert [results[i] for i in range(3)] == pytest.approx(list(vectors[1:] @ vectors[0]), abs=1e-5)
    assert list(results.values()) == sorted(results.values(), reverse=True)
