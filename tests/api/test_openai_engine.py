"""The fields that steer and score tokens, through the HTTP surface and the openai SDK to a real engine."""

from __future__ import annotations

import collections
import itertools
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from model_tools import variant_folder

from microvllm.openai_compat.app import create_app
from microvllm.openai_compat.config import ServerArgs
from microvllm.runtime.config import EngineArgs
from microvllm.runtime.process.client import EngineClient

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 70, 200, 31, 8]
PLAIN: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
EXTRA: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
CLOSE = 1e-3  # float32 sums in another order


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EngineClient]:
    config = EngineArgs(
        model=str(variant_folder("llama-tied")),
        dtype="float32",
        cpu_threads=1,
        num_gpu_blocks_override=256,
        max_num_batched_tokens=32,  # so that prompts are scored in several pieces
        max_num_seqs=8,
        max_logprobs=-1,
    ).resolve()
    client = await EngineClient.start(config)
    yield client
    await client.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sdk(engine: EngineClient) -> AsyncIterator[openai.AsyncOpenAI]:
    app = create_app(engine, ServerArgs(served_model_names=("m",), enable_per_request_metrics=True))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), timeout=300)
    async with openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="-", http_client=http) as client:
        yield client


async def complete(sdk: openai.AsyncOpenAI, **options: Any) -> Any:
    extra = {**EXTRA, **options.pop("extra", {})}
    answer = await sdk.completions.create(model="m", **{**PLAIN, **options}, extra_body=extra)
    return answer.choices[0]


async def tokens(sdk: openai.AsyncOpenAI, **options: Any) -> list[int]:
    return list((await complete(sdk, **options)).token_ids)


async def test_greedy_tokens_are_the_likeliest(sdk: openai.AsyncOpenAI) -> None:
    choice = await complete(sdk, logprobs=3)
    for value, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert value == max(top.values()) <= 0
    readable = "".join(choice.logprobs.tokens).replace("\ufffd", "")
    assert readable == choice.text.replace("\ufffd", "")


async def test_the_prompt_is_scored_as_it_was_made(sdk: openai.AsyncOpenAI) -> None:
    """What generating says about a token, reading it as a prompt says, too."""
    made = await complete(sdk, logprobs=3, max_tokens=60)
    whole = [*PROMPT, *made.token_ids]
    read = await complete(sdk, prompt=whole, echo=True, max_tokens=0, logprobs=3)
    assert read.logprobs.tokens[-60:] == made.logprobs.tokens
    assert read.logprobs.token_logprobs[0] is None and len(read.logprobs.tokens) == len(whole)
    assert read.logprobs.token_logprobs[-60:] == pytest.approx(made.logprobs.token_logprobs, abs=CLOSE)
    asked = await complete(sdk, prompt=whole, max_tokens=1, extra={"prompt_logprobs": 2})
    values = [entry[str(token)] for token, entry in zip(whole[1:], asked.prompt_logprobs[1:], strict=True)]
    assert [value["logprob"] for value in values[-60:]] == pytest.approx(
        made.logprobs.token_logprobs, abs=CLOSE
    )
    assert {value["rank"] for value in values[-60:]} == {1}


async def test_the_whole_vocabulary_sums_to_one(sdk: openai.AsyncOpenAI, engine: EngineClient) -> None:
    answer = await sdk.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=2,
        logprobs=True,
        extra_body={"top_logprobs": -1},
    )
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    for item in answer.choices[0].logprobs.content:
        assert len(item.top_logprobs) == engine.config.spec.vocab_size
        assert sum(2.718281828459045**other.logprob for other in item.top_logprobs) == pytest.approx(
            1, abs=CLOSE
        )


async def test_streamed_as_whole(sdk: openai.AsyncOpenAI) -> None:
    whole = await complete(sdk, logprobs=2, echo=True)
    stream = await sdk.completions.create(
        model="m", **PLAIN, logprobs=2, echo=True, stream=True, extra_body={**EXTRA, "stream_interval": 5}
    )
    parts = [chunk.choices[0] async for chunk in stream]
    assert "".join(part.text for part in parts) == whole.text
    for name in ("tokens", "text_offset"):
        assert [item for part in parts for item in getattr(part.logprobs, name)] == getattr(
            whole.logprobs, name
        )


async def test_words_that_may_not_come(sdk: openai.AsyncOpenAI, engine: EngineClient) -> None:
    plain = await tokens(sdk)
    table = engine.tokenizer
    words = [text for text in (table.decode([token], False) for token in plain) if text.strip().isalnum()][:3]
    assert words, "choose a prompt that is answered with words"
    kept_out = await complete(sdk, extra={"bad_words": words})
    banned = {
        i
        for word in words
        for text in (word.lstrip(), " " + word.lstrip())
        for i in [table.encode(text, False)]
        if len(i) == 1
        for i in i
    }
    assert banned & set(plain) and not banned & set(kept_out.token_ids)


async def test_bias_and_allowed_tokens(sdk: openai.AsyncOpenAI) -> None:
    plain = await tokens(sdk)
    assert await tokens(sdk, logit_bias={"77": 100}) == [77] * 24
    assert plain[0] not in await tokens(sdk, logit_bias={str(plain[0]): -100})
    allowed = {11, 12, 13}
    assert set(await tokens(sdk, temperature=1.5, extra={"allowed_token_ids": [*allowed]})) <= allowed
    # Reported are the model's own values, whatever steered the choice.
    steered = await complete(sdk, logit_bias={"77": 100}, logprobs=0, max_tokens=1)
    read = await complete(sdk, prompt=[*PROMPT, 77], echo=True, max_tokens=0, logprobs=0)
    assert steered.logprobs.token_logprobs[0] == pytest.approx(read.logprobs.token_logprobs[-1], abs=CLOSE)


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 5.0}]
)
async def test_penalties_make_tokens_rarer(sdk: openai.AsyncOpenAI, penalty: dict[str, float]) -> None:
    def most(ids: list[int]) -> int:
        return max(collections.Counter(ids).values())

    loop = {"logit_bias": {"77": 2, "78": 2}, "max_tokens": 40}
    assert most(await tokens(sdk, **loop)) > most(await tokens(sdk, extra=penalty, **loop))


async def test_repetition_is_noticed(sdk: openai.AsyncOpenAI) -> None:
    wish = {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 4}
    choice = await complete(sdk, logit_bias={"77": 100}, extra={"repetition_detection": wish})
    assert (choice.finish_reason, choice.token_ids) == ("repetition", [77] * 4)
    assert choice.stop_reason == "repetition_detected"


async def test_chosen_tokens_are_reported(sdk: openai.AsyncOpenAI) -> None:
    choice = await complete(
        sdk, logprobs=1, extra={"logprob_token_ids": [1, 2, 3], "return_tokens_as_token_ids": True}
    )
    for token, top in zip(choice.token_ids, choice.logprobs.top_logprobs, strict=True):
        assert list(top) == list(dict.fromkeys(f"token_id:{i}" for i in [token, 1, 2, 3]))


async def test_truncation_and_metrics(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(
        model="m", prompt=[*range(5, 300)], max_tokens=3, extra_body={**EXTRA, "truncate_prompt_tokens": 4}
    )
    assert answer.choices[0].prompt_token_ids == [296, 297, 298, 299]  # type: ignore[attr-defined]
    metrics: dict[str, float] = answer.metrics  # type: ignore[attr-defined]
    assert all(metrics[name] >= 0 for name in metrics if name != "speculative_decoding")
    assert metrics["time_to_first_token_ms"] > 0 and metrics["tokens_per_second"] > 0


async def test_beams(sdk: openai.AsyncOpenAI) -> None:
    def likelihood(read: Any) -> float:
        return float(sum(read.logprobs.token_logprobs[len(PROMPT) :]))

    greedy = await tokens(sdk)
    assert await tokens(sdk, extra={"use_beam_search": True}) == greedy
    answer = await sdk.completions.create(
        model="m", **PLAIN, n=4, extra_body={**EXTRA, "use_beam_search": True}
    )
    beams = [choice.token_ids for choice in answer.choices]  # type: ignore[attr-defined]
    read = [
        await complete(sdk, prompt=[*PROMPT, *ids], echo=True, max_tokens=0, logprobs=0)
        for ids in (*beams, greedy)
    ]
    *found, of_greedy = map(likelihood, read)
    assert len({*map(tuple, beams)}) == 4 and found == sorted(found, reverse=True)
    assert found[0] >= of_greedy - CLOSE


async def test_a_request_that_leaves_itself_no_token_is_refused(
    sdk: openai.AsyncOpenAI, engine: EngineClient
) -> None:
    plain = await tokens(sdk)
    extra = {"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 2}
    with pytest.raises(openai.BadRequestError, match="no token to choose from") as refused:
        await complete(sdk, extra=extra)
    assert refused.value.param == "allowed_token_ids"
    stream = await sdk.completions.create(model="m", stream=True, **PLAIN, extra_body=extra)
    with pytest.raises(openai.APIError, match="no token to choose from") as failed:
        async for _ in stream:
            pass
    assert (failed.value.code, failed.value.param) == ("400", "allowed_token_ids")
    assert await tokens(sdk) == plain and not engine.replicas[0].streams


async def test_wrong_wishes_leave_the_engine_well(sdk: openai.AsyncOpenAI, engine: EngineClient) -> None:
    plain = await tokens(sdk)
    vocab = engine.config.spec.vocab_size
    wrong: list[dict[str, Any]] = [
        {"logit_bias": {str(vocab): 1}},
        {"logit_bias": {"x": 1}},
        {"extra": {"allowed_token_ids": [vocab]}},
        {"extra": {"logprob_token_ids": [vocab]}, "logprobs": 1},
        {"extra": {"bad_words": [""]}},
        {"extra": {"repetition_penalty": 0}},
        {"extra": {"stop_token_ids": [vocab]}},
    ]
    for options, stream in itertools.product(wrong, (False, True)):
        with pytest.raises(openai.BadRequestError):
            await complete(sdk, stream=stream, **options)
    assert await tokens(sdk) == plain and not engine.replicas[0].streams


@pytest.mark.parametrize("beyond", [0, 40])
async def test_a_conversation_that_fills_the_context_is_refused_as_such(
    engine: EngineClient, sdk: openai.AsyncOpenAI, beyond: int
) -> None:
    limit = engine.config.max_model_len
    text = engine.processor.render_text([{"role": "user", "content": ""}], add_generation_prompt=True)
    empty = engine.processor.tokenize_prompt(text, False)
    text = "x" * (limit + beyond - len(empty))
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": text}])
    assert caught.value.param == ("input_tokens" if beyond else "max_tokens")
