"""LangChain: a structured model, and an agent with a tool."""

from common import KEY, MODEL, ORDER, QUESTION, URL, Person, get_weather, report
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY)
person = model.with_structured_output(Person).invoke(ORDER)
agent = create_agent(model, [get_weather])
answer = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})
report(structured=person, tools=answer["messages"][-1].content)
