"""Finds outputs that repeat themselves. Imports no torch."""

from __future__ import annotations

from microvllm.runtime.core.plan import Request


def repeats(request: Request) -> bool:
    """Whether the output ends in `min_count` copies of one pattern of an allowed size."""
    pattern, tokens = request.params.repetition_detection, request.token_ids
    if pattern is None or request.num_output < request.params.min_tokens:
        return False
    for size in range(max(1, pattern.min_pattern_size), pattern.max_pattern_size + 1):
        first = len(tokens) - size * pattern.min_count
        if first < request.prompt_len:
            return False
        # Equal to itself moved by one pattern: all copies are equal.
        if tokens[first : len(tokens) - size] == tokens[first + size :]:
            return True
    return False
