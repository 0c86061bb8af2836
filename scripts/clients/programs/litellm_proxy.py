"""LiteLLM's proxy in front of the server, asked with the openai SDK."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
from common import KEY, MODEL, ORDER, PARAMETERS, QUESTION, URL, Person, get_weather, report

PORT, PROXY_KEY = int(sys.argv[3]), "sk-local"
CONFIG = {
    "model_list": [
        {
            "model_name": MODEL,
            "litellm_params": {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY},
        }
    ]
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}
]


def loop(client):
    messages = [{"role": "user", "content": QUESTION}]
    for _ in range(4):
        message = (
            client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
        )
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return None


def ready():
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/liveliness", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


with tempfile.TemporaryDirectory() as folder:
    config = Path(folder) / "config.yaml"
    config.write_text(json.dumps(CONFIG))
    program = Path(sys.executable).with_name("litellm")
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(PORT)]
    environment = {**os.environ, "LITELLM_MASTER_KEY": PROXY_KEY}
    proxy = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not ready():
            if proxy.poll() is not None or time.monotonic() > end:
                raise SystemExit("the proxy did not start")
            time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key=PROXY_KEY)
        order = [{"role": "user", "content": ORDER}]
        answer = client.chat.completions.parse(model=MODEL, messages=order, response_format=Person)
        person, tools = answer.choices[0].message.parsed, loop(client)
    finally:
        proxy.terminate()
        proxy.wait(30)
report(structured=person, tools=tools)  # behind what the proxy says last
