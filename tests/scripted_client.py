"""An engine client that plays recorded turns: what a model would write, a character at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fake_client import EOS, FakeClient, score

from microvllm.runtime.request import EngineRequest
from microvllm.runtime.text.detokenizer import TextDelta


class ScriptedClient(FakeClient):
    """Answers request i with `turns[i]`; the prompts that it was asked are in `prompts`."""

    def __init__(self, *turns: str, max_model_len: int = 1 << 16, **options: Any) -> None:
        super().__init__(max_model_len=max_model_len, **options)
        self.turns = list(turns)
        self.prompts: list[str] = []

    def generate(self, request: EngineRequest, salt: str) -> list[TextDelta]:
        self.prompts.append(self.tokenizer.decode(request.prompt_token_ids, False))
        pieces = [(self.tokenizer.encode(char, False), char) for char in self.turns.pop(0)]
        limit = request.params.max_tokens or 1 << 20
        deltas: list[TextDelta] = []
        context = list(request.prompt_token_ids)
        for ids, text in [*pieces, ([EOS], "")]:
            end = "stop" if ids == [EOS] else "length" if len(deltas) + 1 == limit else None
            deltas.append(TextDelta(ids, text, end, None, self._scores(request, context, ids)))
            context += ids
            if end:
                break
        return deltas

    @staticmethod
    def _scores(request: EngineRequest, context: Sequence[int], ids: Sequence[int]) -> Any:
        count = request.params.logprobs
        return None if count is None else [score(context, token, count) for token in ids]
