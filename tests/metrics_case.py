"""Reads what /metrics says."""

from __future__ import annotations

from typing import Any

import httpx
import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

GENERATE = "/v1/completions"


class Numbers:
    """A parsed exposition."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    @property
    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}

    def __call__(self, name: str, **labels: str) -> float:
        """The value of the one sample that has this name and these labels."""
        found = [s for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        assert len(found) == 1, (name, labels, found)
        return found[0].value

    def engine(self, name: str, **labels: str) -> float:
        return self(f"vllm:{name}", **labels)


async def scrape(http: httpx.AsyncClient, path: str = "/metrics") -> Numbers:
    answer = await http.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == prometheus_client.CONTENT_TYPE_LATEST
    return Numbers(answer.text)


def wish(prompt: Any, max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "alias", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **more}
