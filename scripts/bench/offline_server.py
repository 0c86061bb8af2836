"""Serves `LLM.generate` of vLLM or of this engine, one call per request, over a minimal HTTP server.

    python scripts/bench/offline_server.py microvllm|vllm MODEL PORT [--kv-cache-memory-bytes N]

GET /health answers once the model is loaded. POST /generate with {"prompts": [[id, …], …], "lengths": [n, …]}
generates that many tokens after each prompt, greedy, end tokens ignored, and answers {"seconds": s, "tokens":
[n, …]}.
"""

from __future__ import annotations

import argparse
import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=("microvllm", "vllm"))
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    parser.add_argument("--max-model-len", type=int, default=4096)
    args = parser.parse_args()
    options: dict[str, Any] = {"max_model_len": args.max_model_len, "enable_prefix_caching": False}
    if args.kv_cache_memory_bytes:
        options["kv_cache_memory_bytes"] = args.kv_cache_memory_bytes
    if args.engine == "vllm":
        from vllm import LLM, SamplingParams

        if args.kv_cache_memory_bytes:
            options["gpu_memory_utilization"] = 0.3  # checked at the start only
    else:
        from microvllm import LLM, SamplingParams
    llm = LLM(args.model, **options)

    def generate(prompts: list[list[int]], lengths: list[int]) -> dict[str, Any]:
        params = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=n) for n in lengths]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": [len(output.outputs[0].token_ids) for output in outputs]}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(generate(body["prompts"], body["lengths"]))

        def log_message(self, *_: Any) -> None:
            """No line per request."""

    HTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
