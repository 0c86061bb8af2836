"""Ask several servers the same, such as this one and vLLM: `python docs/examples/compare.py URL URL`."""

import sys
import time

from openai import OpenAI


def main() -> None:
    texts = []
    for url in sys.argv[1:]:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id
        client.completions.create(model=model, prompt="warm-up", max_tokens=1)
        started, text, tokens = time.perf_counter(), "", 0
        for chunk in client.completions.create(
            model=model,
            prompt="The quick brown fox",
            max_tokens=64,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        ):
            text += chunk.choices[0].text if chunk.choices else ""
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        print(f"{url}: {tokens} tokens, {tokens / (time.perf_counter() - started):.1f} per second")
        texts.append(text)
    print("the texts are equal" if len(set(texts)) == 1 else "the texts differ")


if __name__ == "__main__":
    main()
