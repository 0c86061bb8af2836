"""Talk to a running server with the openai package: `python docs/examples/chat.py [URL]`."""

import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = []
    for question in ("What is the capital of France?", "And of Italy?"):
        print(f"> {question}")
        messages.append({"role": "user", "content": question})
        stream = client.chat.completions.create(model=model, messages=messages, max_tokens=40, stream=True)
        answer = ""
        for chunk in stream:
            piece = chunk.choices[0].delta.content or ""
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
