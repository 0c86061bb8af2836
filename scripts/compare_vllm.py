#!/usr/bin/env python3
"""Send the same requests to this server and to a vLLM, and print every difference between their answers.

    python scripts/compare_vllm.py http://127.0.0.1:8000 http://127.0.0.1:8001 --record vllm.json
    python scripts/compare_vllm.py http://127.0.0.1:8000 vllm.json

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
from pathlib import Path
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
LOGPROBS = {"logprob", "token_logprobs", "top_logprobs", "prompt_logprobs"}
DRAWN = {
    *(
        "text",
        "content",
        "token",
        "tokens",
        "bytes",
        "token_ids",
        "text_offset",
        "finish_reason",
        "stop_reason",
    ),
    *("completion_tokens", "total_tokens", "chunks"),
}


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
    try:
        answer = client.send(request)
    except httpx.TransportError as error:
        raise SystemExit(f"{client.base_url}: {error or type(error).__name__} ({case.name})") from None
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

    `order` is the sequence of the kinds of events without repetitions, `chunks` their number, `events` the
    first event of each kind, `text` what each choice said in all, `ends` how it ended.
    """
    order: list[str] = []
    firsts: dict[str, Any] = {}
    texts: dict[str, str] = defaultdict(str)
    ends: dict[str, Any] = {}
    for event in events:
        kind = _kind(event)
        firsts.setdefault(kind, event)
        if not order or order[-1] != kind:
            order.append(kind)
        for choice in event["choices"] if isinstance(event, dict) and "choices" in event else ():
            index = str(choice["index"])
            texts[index] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            if choice["finish_reason"] is not None:
                ends[index] = {name: choice.get(name) for name in ("finish_reason", "stop_reason")}
    return {
        "chunks": len(events),
        "order": " ".join(
            order if len(texts) <= 1 else sorted(set(order))
        ),  # choices take turns as they like
        "text": [texts[index] for index in sorted(texts)],
        "ends": [ends[index] for index in sorted(ends)],
        "events": {kind: event for kind, event in firsts.items() if kind != "[DONE]"},
    }


def _kind(event: Any) -> str:
    if not isinstance(event, dict):
        return str(event)
    if not event.get("choices"):
        return "usage" if "usage" in event else "error" if "error" in event else "empty"
    choice = event["choices"][0]
    if choice["finish_reason"] is not None:
        return "last"
    return "role" if "role" in choice.get("delta", {}) else "token"


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
    if random and name in DRAWN | LOGPROBS:
        return
    if _type(a) != _type(b):
        yield f"{path}: {_shown(a)} / {_shown(b)}"
    elif isinstance(a, dict):
        by_data = name in KEYED_BY_DATA and "token" not in a
        if by_data:
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
            yield from _walk(a[key], b[key], path if by_data else f"{path}.{key}", random)
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


class Recording:
    """The answers of a server, by the names of the requests, in a file for later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = ""
        self.answers: dict[str, Answer] = {}

    def load(self) -> Recording:
        known = json.loads(self.path.read_text())
        self.model = known["model"]
        for name, (status, media_type, headers, content) in known["answers"].items():
            self.answers[name] = Answer(status, media_type, httpx.Headers(headers), content.encode("latin-1"))
        return self

    def save(self) -> None:
        answers = {
            name: (answer.status, answer.media_type, dict(answer.headers), answer.content.decode("latin-1"))
            for name, answer in self.answers.items()
        }
        self.path.write_text(json.dumps({"model": self.model, "answers": answers}))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("ours", help="base URL of this server")
    parser.add_argument("theirs", help="base URL of the vLLM, or a file that --record wrote")
    parser.add_argument("--record", type=Path, help="write the answers of the vLLM here")
    parser.add_argument("--only", default="", help="a pattern: only the requests whose name it is found in")
    parser.add_argument("--names", type=int, default=12, help="requests to name for each difference")
    parser.add_argument("--verbose", action="store_true", help="show both bodies of each answer that differs")
    args = parser.parse_args()
    groups: dict[str, list[str]] = defaultdict(list)
    explained: dict[str, list[str]] = defaultdict(list)
    sent = same = meant = 0
    live = args.theirs.startswith("http")
    recording = Recording(args.record or Path("-")) if live else Recording(Path(args.theirs)).load()
    with (
        httpx.Client(base_url=args.ours, timeout=TIMEOUT_S) as first,
        httpx.Client(base_url=args.theirs if live else "", timeout=TIMEOUT_S) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        if live:
            recording.model = second.get("/v1/models").json()["data"][0]["id"]
        for case in cases(recording.model):
            if not re.search(args.only, case.name) or not (live or case.name in recording.answers):
                continue
            if live:
                asked = pool.submit(send, second, case)
                ours = send(first, case)
                recording.answers[case.name] = asked.result()
            else:
                ours = send(first, case)
            theirs = recording.answers[case.name]
            sent += 1
            found = list(differences(case, ours, theirs))
            reasons = [_reason(case.name, aspect) for aspect in found]
            same += not found
            meant += bool(found) and None not in reasons
            for aspect, why in zip(found, reasons, strict=True):
                (groups[aspect] if why is None else explained[why]).append(case.name)
            if found and args.verbose:
                print(f"{case.name}\n  ours   {ours.content[:1500]!r}\n  theirs {theirs.content[:1500]!r}")
                print("".join(f"  {aspect}\n" for aspect in found))
    if args.record is not None:
        recording.save()
    print(f"{sent} requests: {same} answered alike, {meant} with differences that are meant\n")
    print(f"{len(explained)} differences that are meant")
    for why, names in explained.items():
        print(f"  {why}\n      {_names(names, args.names)}")
    print(f"\n{len(groups)} differences that are not explained (ours / theirs)")
    for aspect, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"  {aspect}\n      {_names(names, args.names)}")
    return 1 if groups else 0


def _reason(case: str, aspect: str) -> str | None:
    return next((known.why for known in KNOWN if known.explains(case, aspect)), None)


def _names(names: list[str], most: int) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - most} more" if len(unique) > most else ""
    return f"{len(unique)}: {'; '.join(unique[:most])}{more}"


if __name__ == "__main__":
    sys.exit(main())
