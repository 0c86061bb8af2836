// The Vercel AI SDK: an object, and a loop with a tool, streamed.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "local", baseURL: `${url}/v1`, supportsStructuredOutputs: true });
const model = provider(name);
const schema = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(120) });
const { output } = await generateText({ model, prompt: "Describe a person.", output: Output.object({ schema }) });
const stream = streamText({
  model,
  prompt: "What is the weather in Paris?",
  tools: {
    get_weather: tool({
      description: "The weather.",
      inputSchema: z.object({ city: z.string() }),
      execute: async ({ city }) => `sunny in ${city}`,
    }),
  },
  stopWhen: stepCountIs(4),
});
console.log(JSON.stringify({ structured: output, tools: await stream.text }));
