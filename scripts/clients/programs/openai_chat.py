"""The openai SDK: chat completions, parsed and with tools, whole and streamed."""

import asyncio
import json

import openai
from common import KEY, MODEL, ORDER, PARAMETERS, QUESTION, URL, Person, get_weather, report

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": PARAMETERS,
            "strict": True,
        },
    }
]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)


def loop(stream):
    messages = [{"role": "user", "content": QUESTION}]
    for _ in range(4):
        if stream:
            with client.chat.completions.stream(model=MODEL, messages=messages, tools=TOOLS) as events:
                for _event in events:
                    pass
                message = events.get_final_completion().choices[0].message
        else:
            message = (
                client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
            )
        messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            result = get_weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return None


async def parsed():
    order = [{"role": "user", "content": ORDER}]
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY) as client:
        answer = await client.chat.completions.parse(model=MODEL, messages=order, response_format=Person)
    return answer.choices[0].message.parsed


def main():
    person, whole, streamed = asyncio.run(parsed()), loop(False), loop(True)
    forced = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], tools=TOOLS, tool_choice="required"
    )
    json.loads(forced.choices[0].message.tool_calls[0].function.arguments)
    report(structured=person, tools=whole if whole == streamed else f"{whole!r} is not {streamed!r}")


main()
