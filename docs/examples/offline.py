"""Generate texts in this process, without a server: `python docs/examples/offline.py [MODEL]`."""

import sys

from microvllm import LLM, SamplingParams


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    llm = LLM(model, max_model_len=256)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    # All prompts run in one batch; the outputs come in their order.
    for output in llm.generate(["The capital of France is", "2 + 2 ="], params):
        print(f"{output.prompt}{output.outputs[0].text}")


if __name__ == "__main__":
    main()
