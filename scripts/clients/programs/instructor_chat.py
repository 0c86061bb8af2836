"""Instructor: a response model by JSON schema and by a forced tool."""

import instructor
import openai
from common import KEY, MODEL, ORDER, URL, Person, report

found = []
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
    client = instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY), mode=mode)
    order = [{"role": "user", "content": ORDER}]
    found.append(
        client.chat.completions.create(model=MODEL, messages=order, response_model=Person, max_retries=0)
    )
report(structured=found[0])
