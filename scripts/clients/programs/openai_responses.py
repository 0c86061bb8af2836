"""The openai SDK: responses, parsed and with tools, whole and streamed."""

import json

import openai
from common import KEY, MODEL, ORDER, PARAMETERS, QUESTION, URL, Person, get_weather, report

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "d",
    "parameters": PARAMETERS,
    "strict": True,
}
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)


def loop(stream):
    items, previous = [{"role": "user", "content": QUESTION}], None
    for _ in range(4):
        options = {"model": MODEL, "input": items, "tools": [TOOL], "previous_response_id": previous}
        if previous is None:
            del options["previous_response_id"]
        if stream:
            with client.responses.stream(**options) as events:
                for _event in events:
                    pass
                response = events.get_final_response()
        else:
            response = client.responses.create(**options)
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return response.output_text
        previous = response.id
        items = [
            {
                "type": "function_call_output",
                "call_id": call.call_id,
                "output": get_weather(**json.loads(call.arguments)),
            }
            for call in calls
        ]
    return None


person = client.responses.parse(model=MODEL, input=ORDER, text_format=Person).output_parsed
whole, streamed = loop(False), loop(True)
report(structured=person, tools=whole if whole == streamed else f"{whole!r} is not {streamed!r}")
