"""LlamaIndex: a structured model, and an agent with a tool."""

import asyncio

from common import KEY, MODEL, ORDER, QUESTION, URL, Person, get_weather, report
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model=MODEL,
    api_base=f"{URL}/v1",
    api_key=KEY,
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    context_window=8192,
)


async def agent():
    return str(await FunctionAgent(tools=[get_weather], llm=llm).run(QUESTION))


person = llm.as_structured_llm(Person).chat([ChatMessage(role="user", content=ORDER)]).raw
report(structured=person, tools=asyncio.run(agent()))
