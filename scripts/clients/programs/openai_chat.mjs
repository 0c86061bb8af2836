// The openai SDK of npm: a parsed completion, and its own tool runner.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const Person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(120) });
const parsed = await client.chat.completions.parse({
  model,
  messages: [{ role: "user", content: "Describe a person." }],
  response_format: zodResponseFormat(Person, "person"),
});
const runner = client.chat.completions.runTools({
  model,
  stream: true,
  messages: [{ role: "user", content: "What is the weather in Paris?" }],
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        description: "The weather.",
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
        parse: JSON.parse,
        function: ({ city }) => `sunny in ${city}`,
      },
    },
  ],
});
console.log(JSON.stringify({ structured: parsed.choices[0].message.parsed, tools: await runner.finalContent() }));
