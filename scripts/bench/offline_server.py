"""`LLM.generate` of vLLM or of this engine on nano-vllm's benchmark, once for each request to a small server.

    python scripts/bench/offline_server.py microvllm|vllm MODEL PORT [--kv-cache-memory-bytes N]

The work: 256 prompts of U(100, 1024) random tokens, U(100, 1024) tokens of each to be generated, greedy, end
tokens ignored, drawn as nano-vllm's bench.py does from the seed. GET /health answers once the model is
loaded; POST /run with {"seed": n} runs it and tells the seconds and the lengths; {"tiny": true} warms up.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

SEQUENCES, SHORTEST, LONGEST = 256, 100, 1024


def work(seed: int, tiny: bool) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens each gets."""
    draw = random.Random(seed)
    prompts = [
        [draw.randint(0, 10000) for _ in range(draw.randint(SHORTEST, LONGEST))] for _ in range(SEQUENCES)
    ]
    outputs = [draw.randint(SHORTEST, LONGEST) for _ in range(SEQUENCES)]
    return prompts, [16] * SEQUENCES if tiny else outputs


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

        options["gpu_memory_utilization"] = 0.3  # asked for at the start only, as the cache's size is given
    else:
        from microvllm import LLM, SamplingParams
    llm = LLM(args.model, **options)

    def generate(seed: int, tiny: bool) -> dict[str, Any]:
        prompts, outputs = work(seed, tiny)
        wishes = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=n) for n in outputs]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        answers = llm.generate(asked, wishes, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        return {
            "seconds": seconds,
            "tokens": tokens,
            "asked": sum(outputs),
            "failed": 0,
            "tok_s": tokens / seconds,
            "inputs": [len(prompt) for prompt in prompts],
            "outputs": outputs,
        }

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
            wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(generate(wish.get("seed", 0), wish.get("tiny", False)))

        def log_message(self, *_: Any) -> None:
            pass

    HTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
