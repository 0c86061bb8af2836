"""The anthropic SDK: messages, parsed and with tools; whole, streamed, async, and by its own tool runner."""

import asyncio

import anthropic
from common import KEY, MODEL, ORDER, PARAMETERS, QUESTION, URL, Person, get_weather, report

TOOLS = [{"name": "get_weather", "description": "The weather.", "input_schema": PARAMETERS}]
OPTIONS = {"model": MODEL, "max_tokens": 256}
client = anthropic.Anthropic(base_url=URL, api_key=KEY)


async def loop(stream):
    messages = [{"role": "user", "content": QUESTION}]
    async with anthropic.AsyncAnthropic(base_url=URL, api_key=KEY) as client:
        for _ in range(4):
            options = {**OPTIONS, "messages": messages, "tools": TOOLS, "thinking": {"type": "adaptive"}}
            if stream:
                async with client.messages.stream(**options) as events:
                    async for _event in events:
                        pass
                    message = await events.get_final_message()
            else:
                message = await client.messages.create(**options)
            messages.append({"role": "assistant", "content": message.content})
            calls = [block for block in message.content if block.type == "tool_use"]
            if not calls:
                return "".join(block.text for block in message.content if block.type == "text")
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": get_weather(**call.input)}
                for call in calls
            ]
            messages.append({"role": "user", "content": results})
    return None


def main():
    order = [{"role": "user", "content": ORDER}]
    person = client.messages.parse(**OPTIONS, messages=order, output_format=Person).parsed_output
    question = [{"role": "user", "content": QUESTION}]
    counted = client.messages.count_tokens(model=MODEL, messages=question, tools=TOOLS).input_tokens
    first = client.messages.create(**OPTIONS, messages=question, tools=TOOLS)
    whole, streamed = asyncio.run(loop(False)), asyncio.run(loop(True))
    runner = client.beta.messages.tool_runner(
        **OPTIONS, messages=question, tools=[anthropic.beta_tool(get_weather)]
    )
    ran = runner.until_done().content[-1].text
    texts = {whole, streamed, ran}
    usage = first.usage
    read = usage.input_tokens + (usage.cache_read_input_tokens or 0)
    if read != counted:
        raise SystemExit(f"{read} tokens were read, {counted} were counted")
    report(structured=person, tools=texts.pop() if len(texts) == 1 else f"they differ: {texts}")


main()
