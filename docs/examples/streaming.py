"""Print a text token by token, without a server: `python docs/examples/streaming.py [MODEL]`."""

import sys

from microvllm import InferenceEngine


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    engine = InferenceEngine(model, max_model_len=256)
    # A token that ends inside a character has the text "": it comes with the next one.
    for _token, text in engine.stream_generate("Once upon a time", max_tokens=40, temperature=0.0):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
