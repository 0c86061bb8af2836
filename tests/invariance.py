"""The ways in which `--batch-invariant` has to give a greedy request the same tokens and the same bits."""

from __future__ import annotations

from collections.abc import Callable

from model_tools import drain, make_prompts, make_request
from tiny_models import TOKENIZER_SIZE

from microvllm.runtime.engine import InferenceEngine

# Some longer than a chunk of attention's, one with the beginning of another.
PROMPTS = make_prompts(6, TOKENIZER_SIZE, longest=150)
PROMPTS.append(PROMPTS[-1][:100] + PROMPTS[-2][:20])
TOKENS = 12

Answer = list[tuple[int, list[int], list[float], int]]


def answers(engine: InferenceEngine, ids: list[int], tokens: int = TOKENS) -> dict[int, Answer]:
    """Of these prompts, generated together: each token, its log probability and those of three others."""
    found: dict[int, Answer] = {i: [] for i in ids}
    for i in ids:
        assert engine.core.add(make_request(i, PROMPTS[i], tokens, logprobs=3)) is None
    for output in drain(engine):
        assert output.error is None and output.logprobs is not None
        for token, entry in zip(output.token_ids, output.logprobs, strict=True):
            found[output.request_id].append((token, entry.token_ids, entry.logprobs, entry.rank))
    return found


def check_ways(engine: Callable[..., InferenceEngine]) -> dict[int, Answer]:
    """Alone, together, on a prefix hit, in chunks, few at a time, preempted -> the answers, alone.

    engine: makes one of the model, with options of `EngineArgs`.
    """
    everyone = list(range(len(PROMPTS)))
    first = engine()
    alone = {i: answers(first, [i])[i] for i in everyone}
    assert answers(first, everyone) == alone, "together, and on the cached blocks of prompts"
    assert answers(first, everyone[::-2]) == {i: alone[i] for i in everyone[::-2]}
    assert first.core.stats().prefix_hits > 0
    for size in (1, 5, 16, 23, 90):
        assert answers(engine(long_prefill_token_threshold=size), everyone) == alone, f"in chunks of {size}"
    assert (
        answers(engine(enable_prefix_caching=False, max_num_batched_tokens=32, max_num_seqs=4), everyone)
        == alone
    )
    blocks = 24 * first.core.config.num_groups
    tight = engine(num_gpu_blocks_override=blocks, max_model_len=256, enable_prefix_caching=False)
    longer = answers(tight, everyone, 4 * TOKENS)  # so that they lack blocks for what comes
    assert {i: answer[:TOKENS] for i, answer in longer.items()} == alone
    # With a window in all layers requests are admitted with all blocks that they will hold.
    assert (tight.core.stats().preemptions > 0) == (None in first.core.config.spec.cache_plan.windows)
    return alone
