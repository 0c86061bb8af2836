"""The chats: several applications, each with a system prompt of its own and several users."""

from __future__ import annotations

import json
import random
import re
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

APPLICATIONS, USERS, TURNS = 6, 2, 4
SYSTEM_WORDS, USER_WORDS, ANSWER_TOKENS = 180, 20, 8
CLIENTS = 3  # chats at a time
TIMEOUT_S = 180.0
WORDS = "the of red blue house tree river stone glass paper garden window light cloud rain wind".split()


@dataclass(frozen=True)
class Outcome:
    """What a run gave. hit_rate: of the prompt tokens, over all replicas; shares: of requests."""

    requests: int
    events: int
    hit_rate: float
    shares: tuple[float, ...]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def counts(url: str) -> tuple[float, float, float]:
    """A replica's counters: tokens found in the prefix cache, tokens looked up, requests."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
        exposition = answer.read().decode()

    def total(name: str) -> float:
        found = re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", exposition, re.MULTILINE)
        if not found:
            raise ValueError(f"vllm:{name} is missing at {url}")
        return sum(map(float, found))

    return (
        total("prefix_cache_hits_total"),
        total("prefix_cache_queries_total"),
        total("request_success_total"),
    )


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def ask(url: str, model: str, messages: list[dict[str, str]]) -> str:
    """The answer to a chat. Raises `ValueError` if it is none."""
    body = {"model": model, "messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    with post(url, body) as response:
        answer = json.load(response)
    content = answer["choices"][0]["message"]["content"]
    if not isinstance(content, str) or not answer["usage"]["completion_tokens"]:
        raise ValueError(f"no answer: {answer}")
    return content


def stream(url: str, model: str) -> int:
    """The number of events of a streamed answer. Raises `ValueError` unless it is whole and in parts."""
    messages = [{"role": "user", "content": "Count to ten."}]
    body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with post(url, body) as response:
        lines = [line.decode().strip() for line in response]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    chunks = [json.loads(each) for each in data[:-1]]
    pieces = [choice["delta"].get("content") for chunk in chunks for choice in chunk["choices"]]
    usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    whole = ask_whole(url, model, messages)
    if data[-1] != "[DONE]" or not usage or "".join(filter(None, pieces)) != whole or len(chunks) < 5:
        raise ValueError(f"the stream is not whole: {lines[-4:]}, {whole!r}")
    return len(chunks)


def ask_whole(url: str, model: str, messages: Sequence[dict[str, str]]) -> str:
    body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
    with post(url, body) as response:
        content: str = json.load(response)["choices"][0]["message"]["content"]
    return content


def run(url: str, model: str, replicas: Sequence[str]) -> Outcome:
    """Send all chats through a router. Raises `OSError` or `ValueError` for the first that fails."""
    rng = random.Random(0)
    systems = [text(rng, SYSTEM_WORDS) for _ in range(APPLICATIONS)]
    chats = [[{"role": "system", "content": system}] for system in systems for _ in range(USERS)]
    before = [counts(replica) for replica in replicas]

    def turn(chat: list[dict[str, str]], words: str) -> None:
        chat.append({"role": "user", "content": words})
        chat.append({"role": "assistant", "content": ask(url, model, chat)})

    with ThreadPoolExecutor(CLIENTS) as clients:
        for _ in range(TURNS):
            rng.shuffle(chats)
            list(clients.map(turn, chats, [text(rng, USER_WORDS) for _ in chats]))
    after = [counts(replica) for replica in replicas]
    hits, queries, requests = (
        [late[index] - early[index] for late, early in zip(after, before, strict=True)] for index in range(3)
    )
    shares = tuple(number / sum(requests) for number in requests)
    return Outcome(round(sum(requests)), stream(url, model), sum(hits) / sum(queries), shares)
