"""Pydantic AI: native and tool output, and an agent with a tool."""

from common import KEY, MODEL, ORDER, QUESTION, URL, Person, get_weather, report
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))
person = Agent(model, output_type=NativeOutput(Person)).run_sync(ORDER).output
Agent(model, output_type=Person).run_sync(ORDER)
report(structured=person, tools=Agent(model, tools=[get_weather]).run_sync(QUESTION).output)
