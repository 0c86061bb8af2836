#!/usr/bin/env python3
"""Send the same requests to this server and to a vLLM, and print every difference between their answers.

    python scripts/compare_vllm.py http://127.0.0.1:8000 http://127.0.0.1:8001

Both should serve the same model in float32 under the same name with `--max-model-len 2048` (some requests are
about that number) and `--generation-config vllm`. Compared are the status, the media type, the shape of the
body (keys, their order, types), in a stream the kinds of events and their order, and the values that must
agree: finish reasons, counts, greedy text, token ids, log probabilities, an error's type, param and code.
Messages of errors are free.

Differences are grouped: one line an aspect with the requests that show it. Those that are meant carry their
explanation (the table at the end of `compare_cases.py`). Exit status: 0, or 1 if one is not explained.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
from compare_cases import KNOWN, Case, cases

TIMEOUT_S = 180.0
LOGPROB_TOLERANCE = 0.01
# Values that are each server's own.
FREE = {"id", "created", "system_fingerprint", "message", "root", "version", "detail"}
FREE_METRICS = {"queue_time_ms", "time_to_first_token_ms", "generation_time_ms", "mean_itl_ms"}
# Objects whose keys are data: token texts and ids.
KEYED_BY_DATA = {"top_logprobs", "prompt_logprobs"}
LOGPROBS = {"logprob", "token_logprobs", "top_logprobs"}
DRAWN = {
    "text",
    "content",
    "token",
    "tokens",
    "bytes",
    "token_ids",
    "text_offset",
    "finish_reason",
    "stop_reason",
}
DRAWN_COUNTS = {"completion_tokens", "total_tokens"}


@dataclass
class Answer:
    """What one server said."""

    status: int
    media_type: str
    headers: httpx.Headers
    content: bytes

    def body(self) -> Any:
        """Parsed JSON, a list of events, or text; None for no body."""
        if not self.content:
            return None
        text = self.content.decode("utf-8", "replace")
        if self.media_type == "text/event-stream":
            frames = [frame.removeprefix("data: ") for frame in text.split("\n\n") if frame]
            return {"events": [json.loads(frame) if frame != "[DONE]" else frame for frame in frames]}
        if self.media_type == "application/json":
            return json.loads(text)
        return text


def send(client: httpx.Client, case: Case) -> Answer:
    request = client.build_request(case.method, case.path, content=case.body, headers=case.headers)
    if "content-type" not in case.headers:
        request.headers.pop("content-type", None)
    answer = client.send(request)
    media_type = answer.headers.get("content-type", "").split(";")[0]
    return Answer(answer.status_code, media_type, answer.headers, answer.content)


def differences(case: Case, ours: Answer, theirs: Answer) -> Iterator[str]:
    """The aspects in which two answers differ, each a line that names no value of its own server."""
    if ours.status != theirs.status:
        yield f"status {ours.status} / {theirs.status}"
        return
    if ours.media_type != theirs.media_type:
        yield f"media type {ours.media_type!r} / {theirs.media_type!r}"
        return
    for name in ("allow", "www-authenticate"):
        if ours.headers.get(name) != theirs.headers.get(name):
            yield f"header {name}: {ours.headers.get(name)!r} / {theirs.headers.get(name)!r}"
    if case.path == "/metrics":
        yield from _metrics(ours.content.decode(), theirs.content.decode())
    elif case.path in ("/openapi.json", "/docs") or not (ours.content or theirs.content):
        return
    else:
        a, b = ours.body(), theirs.body()
        if isinstance(a, dict) and "events" in a and isinstance(b, dict):
            a, b = _joined(a["events"]), _joined(b["events"])
        yield from dict.fromkeys(_walk(a, b, "", case.random))


def _joined(events: list[Any]) -> dict[str, Any]:
    """A stream in a form that does not depend on which tokens shared a chunk.

    `kinds` is the sequence of event shapes without repetitions, `first` and `last` the outermost events,
    `texts` what each choice said in all, `ends` how it ended.
    """
    kinds: list[Any] = []
    texts: dict[str, str] = defaultdict(str)
    ends: dict[str, Any] = {}
    for event in events:
        kind = _kind(event)
        if not kinds or kinds[-1] != kind:
            kinds.append(kind)
        for choice in event["choices"] if isinstance(event, dict) and "choices" in event else ():
            index = str(choice["index"])
            texts[index] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            if choice["finish_reason"] is not None:
                ends[index] = {name: choice.get(name) for name in ("finish_reason", "stop_reason")}
    return {
        "chunks": len(events),
        "kinds": kinds if len(texts) <= 1 else sorted(set(kinds)),  # choices take turns as they like
        "text": [texts[index] for index in sorted(texts)],
        "ends": [ends[index] for index in sorted(ends)],
        "first": events[0],
        "usage": [event["usage"] for event in events[-2:] if isinstance(event, dict) and "usage" in event],
    }


def _kind(value: Any) -> str:
    """The shape of an event as text: keys in their order, and the type of each leaf."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_kind(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + " | ".join(dict.fromkeys(map(_kind, value))) + "]"
    return value if value == "[DONE]" else _type(value)


def _type(value: Any) -> str:
    return {
        bool: "bool", int: "number", float: "number", str: "string",
        type(None): "null", list: "list", dict: "object",
    }[type(value)]  # fmt: skip


def _walk(a: Any, b: Any, path: str, random: bool) -> Iterator[str]:
    """Differences below one place. The path leaves out indices of lists, so that equal ones fall together."""
    name = path.rsplit(".", 1)[-1]
    if name in FREE and isinstance(a, str) == isinstance(b, str):
        return
    if random and (name in DRAWN | LOGPROBS | DRAWN_COUNTS or name == "chunks"):
        return
    if _type(a) != _type(b):
        yield f"{path}: {_shown(a)} / {_shown(b)}"
    elif isinstance(a, dict):
        if name in KEYED_BY_DATA or path.endswith("prompt_logprobs"):
            if a.keys() != b.keys():
                yield f"{path}: other tokens"
        else:
            for key in (*(a.keys() - b.keys()), *(b.keys() - a.keys())):
                yield f"{path}.{key}: only {'ours' if key in a else 'theirs'}"
            common = [key for key in a if key in b]
            if common != [key for key in b if key in a]:
                yield f"{path}: order of the keys"
        for key in a.keys() & b.keys():
            # Keys that are data have no place in a path.
            below = path if name in KEYED_BY_DATA else f"{path}.{key}"
            yield from _walk(a[key], b[key], below, random)
    elif isinstance(a, list):
        if len(a) != len(b):
            yield f"{path}: {len(a)} / {len(b)} entries"
        for left, right in zip(a, b, strict=False):
            yield from _walk(left, right, path, random)
    elif isinstance(a, (int, float)) and not isinstance(a, bool) and name in LOGPROBS:
        if abs(a - b) > LOGPROB_TOLERANCE:
            yield f"{path}: another value"
    elif a != b and name not in FREE_METRICS:
        yield f"{path}: {_shown(a)} / {_shown(b)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:110]}...({len(text)})"


def _metrics(ours: str, theirs: str) -> Iterator[str]:
    """Metrics of vLLM's that we do not have, or with other labels; what only we have is ours to add."""
    mine, yours = _families(ours), _families(theirs)
    for name in sorted(yours):
        if name not in mine:
            yield f"metric {name}: only theirs"
        elif mine[name] != yours[name]:
            yield f"metric {name}: labels {sorted(mine[name])} / {sorted(yours[name])}"


def _families(text: str) -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for line in text.splitlines():
        match = re.match(r"(vllm:\w+)(?:\{(.*)\})? ", line)
        if match:
            labels = re.findall(r'(\w+)="', match[2] or "")
            found[match[1]] = found.get(match[1], frozenset()) | frozenset(labels)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("ours", help="base URL of this server")
    parser.add_argument("theirs", help="base URL of the vLLM")
    parser.add_argument("--only", default="", help="a pattern: only the requests whose name it is found in")
    parser.add_argument("--verbose", action="store_true", help="show both bodies of each answer that differs")
    args = parser.parse_args()
    groups: dict[str, list[str]] = defaultdict(list)
    explained: dict[str, list[str]] = defaultdict(list)
    sent = same = 0
    with (
        httpx.Client(base_url=args.ours, timeout=TIMEOUT_S) as first,
        httpx.Client(base_url=args.theirs, timeout=TIMEOUT_S) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        model = second.get("/v1/models").json()["data"][0]["id"]
        for case in cases(model):
            if not re.search(args.only, case.name):
                continue
            ours, theirs = pool.map(send, (first, second), (case, case))
            sent += 1
            found = list(differences(case, ours, theirs))
            same += not found
            for aspect in found:
                why = next((known.why for known in KNOWN if known.explains(case.name, aspect)), None)
                (groups[aspect] if why is None else explained[why]).append(case.name)
            if found and args.verbose:
                print(f"{case.name}\n  ours   {ours.content[:1500]!r}\n  theirs {theirs.content[:1500]!r}")
                print("".join(f"  {aspect}\n" for aspect in found))
    print(f"{sent} requests, {same} answered alike\n")
    print(f"{len(explained)} differences that are meant")
    for why, names in explained.items():
        print(f"  {why}\n      {_names(names)}")
    print(f"\n{len(groups)} differences that are not explained (ours / theirs)")
    for aspect, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"  {aspect}\n      {_names(names)}")
    return 1 if groups else 0


def _names(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - 12} more" if len(unique) > 12 else ""
    return f"{len(unique)}: {'; '.join(unique[:12])}{more}"


if __name__ == "__main__":
    sys.exit(main())
