// Talks to this server: addresses are relative, so that they also work below the path prefix of a proxy.

import { access } from "./settings.js";

const REACH = "The server cannot be reached. Is it running?";
const LOST = "The connection was lost before the answer was complete.";
const FULL = "The conversation does not fit into the context: start a new chat, or edit an earlier message.";
const MEANINGS = { 401: "This server asks for an API key.", 413: "The message is too large for this server." };

// What went wrong, in words. `retryAfter` are seconds after which a 503 may be over.
export class Problem extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// Raises `Problem` for any answer but a 200.
export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (access.key) headers.Authorization = `Bearer ${access.key}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, credentials: "same-origin" });
  } catch (cause) {
    if (cause.name === "AbortError") throw cause;
    throw new Problem(REACH);
  }
  if (reply.ok) return reply;
  const said = await reply.json().catch(() => ({}));
  throw problemOf(said.error, reply.status, Number(reply.headers.get("retry-after")) || 0);
}

function problemOf(error, status, retryAfter = 0) {
  const { message = `The server answered with status ${status}.`, param } = Object(error);
  const field = param && status === 400 ? param.replace(/^body\./, "") : "";
  if (/maximum context length/.test(message)) return new Problem(`${FULL} (${message})`, status);
  const place = field && !message.includes(field) ? ` (field: ${field})` : "";
  return new Problem(MEANINGS[status] || message + place, status, status === 503 ? retryAfter || 1 : 0);
}

// Yields the parsed events of a streamed chat completion. Raises `Problem`, also for an error within the stream.
export async function* streamChat(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const reply = await call("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (cause) {
      throw cause.name === "AbortError" ? cause : new Problem(LOST);
    }
    if (part.done) throw new Problem(LOST);
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      if (!event.startsWith("data: ")) continue; // a comment that keeps the connection alive
      const data = JSON.parse(event.slice(6));
      if (data.error) throw problemOf(data.error, Number(data.error.code) || 500);
      yield data;
    }
  }
}

// Returns the engine's numbers from Prometheus' text: each of vLLM's metrics, summed over its labels.
export function readMetrics(text) {
  const numbers = {};
  for (const line of text.split("\n")) {
    const match = /^vllm:(\w+)(?:\{.*\})? (\S+)$/.exec(line);
    if (match) numbers[match[1]] = (numbers[match[1]] || 0) + Number(match[2]);
  }
  return numbers;
}
