"""Outlines: a type and a choice, through its vLLM model."""

import json
from typing import Literal

import openai
import outlines
from common import KEY, MODEL, ORDER, URL, Person, report

model = outlines.from_vllm(openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY), MODEL)
person = model(ORDER, Person, max_tokens=200)
choice = model("Red or blue?", Literal["red", "blue"])
if choice not in ("red", "blue"):
    raise SystemExit(f"{choice!r} is none of the choices")
report(structured=json.loads(person))
