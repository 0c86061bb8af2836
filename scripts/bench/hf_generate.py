#!/usr/bin/env python3
"""Serves Hugging Face `generate` over a minimal HTTP server, so that the same client can drive it.

    python scripts/bench/hf_generate.py FOLDER --dtype bfloat16 --max-batch 8 --port 8000

What it shows is the loop that people write around `model.generate`: whatever waits (at most `--max-batch`
requests) becomes one left-padded batch, runs to the end of its longest answer, and only then the next batch
begins. Greedy, answers of exactly `max_tokens` tokens. A streamer passes each step's tokens on, so that the
time of the first token is known; a request is answered when it has its own number of tokens.

Knows `POST /v1/completions` and `/v1/chat/completions` with `stream`, and of their fields what compare.py
sends. Needs torch and transformers, nothing else.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import BaseStreamer


@dataclass
class Job:
    """A request on its way; `tokens` gets each new token, then None, or the exception that ended it."""

    prompt: list[int]
    max_tokens: int
    tokens: queue.SimpleQueue[int | Exception | None] = field(default_factory=queue.SimpleQueue)
    given: int = 0


class Distributor(BaseStreamer):
    """Gives the tokens of each step of a batch to its jobs."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs
        self._prompts_seen = False

    def put(self, value: torch.Tensor) -> None:
        """`value` is first the prompts, [batch, length], then the tokens of each step, [batch], int64."""
        if not self._prompts_seen:
            self._prompts_seen = True
            return
        for job, token in zip(self._jobs, value.tolist(), strict=True):
            if job.given < job.max_tokens:
                job.given += 1
                job.tokens.put(token)
                if job.given == job.max_tokens:
                    job.tokens.put(None)

    def end(self) -> None:
        """Does nothing: the last token of each job has ended it."""


def run_batches(model: Any, waiting: queue.SimpleQueue[Job], max_batch: int) -> None:
    """Batch after batch, for ever."""
    while True:
        jobs = [waiting.get()]
        while len(jobs) < max_batch and not waiting.empty():
            jobs.append(waiting.get())
        width = max(len(job.prompt) for job in jobs)
        ids = torch.tensor([[0] * (width - len(job.prompt)) + job.prompt for job in jobs])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        try:
            model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max(job.max_tokens for job in jobs),
                do_sample=False,
                eos_token_id=-1,  # no token ends an answer
                pad_token_id=0,
                streamer=Distributor(jobs),
            )
        except Exception as error:  # such as too little memory for this batch: its requests get to know
            for job in jobs:
                job.tokens.put(error)


class Handler(BaseHTTPRequestHandler):
    """One request; set up by `main` with a tokenizer and the queue."""

    protocol_version = "HTTP/1.1"
    tokenizer: Any
    waiting: queue.SimpleQueue[Job]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        chat = self.path.endswith("/chat/completions")
        job = Job(self._prompt(body), int(body["max_tokens"]))
        self.waiting.put(job)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        count = 0
        while (token := job.tokens.get()) is not None:
            if isinstance(token, Exception):
                self._send({"error": {"message": f"{type(token).__name__}: {token}"}})
                break
            count += 1
            text = self.tokenizer.decode([token])
            choice: dict[str, Any] = {
                "index": 0,
                "finish_reason": "length" if count == job.max_tokens else None,
            }
            self._send({"choices": [choice | ({"delta": {"content": text}} if chat else {"text": text})]})
        usage = {"prompt_tokens": len(job.prompt), "completion_tokens": count}
        self._send({"choices": [], "usage": usage})
        self._write(b"data: [DONE]\n\n")
        self._write(b"")

    def _prompt(self, body: dict[str, Any]) -> list[int]:
        if "messages" in body:
            answer = self.tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, return_dict=True
            )
            ids: list[int] = answer["input_ids"]
            return ids
        prompt = body["prompt"]
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    def _send(self, event: dict[str, Any]) -> None:
        self._write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _write(self, data: bytes) -> None:
        """One chunk of the body; an empty one ends it."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, format: str, *args: Any) -> None:
        """No line per request."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    Handler.tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)
    model.eval()
    Handler.waiting = queue.SimpleQueue()
    threading.Thread(target=run_batches, args=(model, Handler.waiting, args.max_batch), daemon=True).start()
    ThreadingHTTPServer.request_queue_size = 512
    ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
