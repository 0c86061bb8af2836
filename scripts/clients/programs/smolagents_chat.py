"""smolagents: a response format, and an agent that calls tools."""

import json

from common import KEY, MODEL, ORDER, QUESTION, URL, Person, get_weather, report
from smolagents import OpenAIModel, ToolCallingAgent, tool

model = OpenAIModel(model_id=MODEL, api_base=f"{URL}/v1", api_key=KEY)
schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema()}}
person = model.generate(
    [{"role": "user", "content": [{"type": "text", "text": ORDER}]}], response_format=schema
)
agent = ToolCallingAgent(tools=[tool(get_weather)], model=model, max_steps=3)
report(
    structured=json.loads(person.content),
    tools=str(agent.run(QUESTION)),
    result=str(agent.memory.get_full_steps()),
)
