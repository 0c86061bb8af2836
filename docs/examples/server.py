"""Start a server from a script, use it, and end it: `python docs/examples/server.py [MODEL]`."""

import socket
import subprocess
import sys
import time

import openai


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # a free one
    command = [sys.executable, "-m", "microvllm", "serve", model, "--port", str(port)]
    server = subprocess.Popen([*command, "--served-model-name", "mine", "--max-model-len", "256"])
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        while server.poll() is None:  # it listens once the model is loaded
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.2)
        answer = client.completions.create(model="mine", prompt="The sky is", max_tokens=10, temperature=0)
        print(answer.choices[0].text)
    finally:
        server.terminate()  # running requests may finish: --shutdown-timeout
        server.wait()


if __name__ == "__main__":
    main()
