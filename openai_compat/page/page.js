// The chat page: a list of turns, the request of the last one, and the server's state.

import { call, readMetrics, streamChat } from "./api.js";
import { copyButton, element, render } from "./markdown.js";
import { NUMBERS, askForKey, load, save, setUp, settings } from "./settings.js";

const EXAMPLES = ["What is the capital of Australia?", "Explain in two sentences why the sky is blue.",
  "Write a Python function that reverses a string.", "Write a short poem about the sea."];
const METRICS = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
  "prefix_cache_queries_total", "prefix_cache_hits_total"].map((name) => `name[]=vllm:${name}`).join("&");
const SOON_MS = 300, BUSY_POLL_MS = 1500, IDLE_POLL_MS = 5000, ATTEMPTS = 6, SPOKEN_CHARACTERS = 400;
const $ = (id) => document.getElementById(id);

let turns = []; // {role: user | assistant | tool, content, ...}; an answer also has reasoning, calls, stats, problem
let running = null; // the AbortController of the answer in progress
let replaced = null; // the turns before the last edit or retry
let limit = 0; // the model's context, in tokens

// ---- the conversation ----------------------------------------------------------------------------------------

const views = []; // of each turn: its element and the parts that a stream changes

function button(label, action, attributes = {}) {
  return element("button", { type: "button", onclick: action, ...attributes }, label);
}

function show() { // the turns that have changed; a stream only calls `update` for the last
  $("empty").hidden = turns.length > 0;
  const same = turns.findIndex((turn, index) => views[index]?.turn !== turn);
  for (const view of views.splice(same < 0 ? turns.length : same)) view.node.remove();
  for (const turn of turns.slice(views.length)) {
    views.push(viewOf(turn, views.length));
    $("turns").append(views[views.length - 1].node);
  }
  for (const view of views) if (!view.editing) update(view);
  keep();
}

function keep() {
  showContext();
  save("sessionStorage", "turns", turns); // for a reload
}

function viewOf(turn, index) {
  const name = { user: "You", assistant: "Answer", tool: `Result of ${turn.name}` }[turn.role];
  const view = { turn, body: element("div", { class: "body" }), tools: element("div", { class: "tools" }) };
  const parts = [element("h2", { class: "unseen" }, name), view.body, view.tools];
  if (turn.role === "user") {
    view.tools.append(...userTools(index));
  } else if (turn.role === "assistant") {
    view.summary = element("summary");
    view.thoughts = element("div");
    view.reasoning = element("details", { class: "reasoning", hidden: true }, view.summary, view.thoughts);
    view.calls = element("div");
    view.results = element("div", { class: "results" });
    view.note = element("p", { class: "note", hidden: true });
    view.stats = element("span", { class: "stats" });
    view.actions = element("span");
    parts.splice(1, 2, view.reasoning, view.body, view.calls, view.results, view.note, view.tools);
    view.tools.append(view.stats, view.actions);
  }
  view.node = element("li", { class: turn.role }, ...parts);
  return view;
}

function userTools(index) {
  return [button("Edit", () => edit(index)), button("Retry", () => retry(index))];
}

function update(view) {
  const { turn } = view, live = running !== null && turn === turns[turns.length - 1];
  if (turn.role !== "assistant") {
    if (view.body.textContent !== turn.content || view.body.firstElementChild) view.body.textContent = turn.content;
    return;
  }
  render(view.body, turn.content);
  view.node.setAttribute("aria-busy", live);
  view.node.classList.toggle("waiting", live && !turn.tokens);
  view.reasoning.hidden = !turn.reasoning;
  if (view.thoughts.textContent !== turn.reasoning) view.thoughts.textContent = turn.reasoning;
  const thinking = live && !turn.content && !turn.calls.length;
  const seconds = turn.thought ? `, ${turn.thought.toFixed(1)} s` : "";
  view.summary.textContent = thinking ? "Thinking…" : `Reasoning${seconds}`;
  showCalls(view, turn);
  view.note.hidden = !turn.problem;
  view.note.textContent = turn.problem || "";
  view.note.classList.toggle("failed", Boolean(turn.failed));
  view.stats.textContent = statsOf(turn);
  if (live) view.actions.replaceChildren();
  else view.actions.replaceChildren(...actionsOf(turn));
}

function actionsOf(turn) {
  const last = turn === turns[turns.length - 1];
  return [turn.content && copyButton("Copy answer", () => turn.content),
    last && turn.problem && button("Try again", () => retry(turns.length - 1)),
    last && turn.unfinished && button("Continue", goOn)].filter(Boolean);
}

function statsOf({ tokens, before, first, last, firstAfter }) {
  if (!tokens) return "";
  const more = tokens - before - 1; // after the first one of this request
  const rate = more > 0 && last > first ? ` · ${(more / ((last - first) / 1000)).toFixed(1)} tokens/s` : "";
  return `${tokens} ${tokens === 1 ? "token" : "tokens"}${rate} · first token ${(firstAfter / 1000).toFixed(2)} s`;
}

function showCalls(view, turn) {
  while (view.calls.childElementCount > turn.calls.length) view.calls.lastElementChild.remove();
  turn.calls.forEach((call, index) => {
    let node = view.calls.children[index];
    if (!node) {
      node = element("details", { class: "call", open: true }, element("summary"), element("pre", { tabindex: 0 }));
      view.calls.append(node);
    }
    node.firstChild.textContent = `Tool call: ${call.name}`;
    if (node.lastChild.textContent !== call.arguments) node.lastChild.textContent = call.arguments;
  });
  const wanted = turn.calls.length > 0 && turn.done && turn === turns[turns.length - 1];
  if (wanted === view.results.childElementCount > 0) return;
  view.results.replaceChildren(...(wanted ? resultsForm(turn) : []));
}

function resultsForm(turn) { // a person plays the tools
  const fields = turn.calls.map(({ name }) =>
    element("textarea", { rows: 2, "aria-label": `Result of ${name}`, placeholder: `What ${name} returns` }));
  const send = () => {
    turn.calls.forEach(({ id, name }, index) => turns.push({ role: "tool", id, name, content: fields[index].value }));
    answer();
    $("prompt").focus();
  };
  return [...fields, button(fields.length > 1 ? "Send results" : "Send result", send, { class: "strong" })];
}

function count(number) {
  return number.toLocaleString("en");
}

function showContext() {
  const used = [...turns].reverse().find((turn) => turn.total)?.total || 0;
  $("context").textContent = used && limit ? `${count(used)} of ${count(limit)} tokens of context` : "";
  $("context").classList.toggle("warn", limit > 0 && used >= 0.9 * limit);
}

function say(text) { // for a screen reader: the start and the end of an answer, not each token
  $("live").textContent = text;
}

// ---- what a person does --------------------------------------------------------------------------------------

function ask(text) {
  $("undo").hidden = true;
  turns.push({ role: "user", content: text });
  answer();
}

function replaceFrom(index, ...more) { // with a way back to what is cut off
  stop();
  const lost = turns.slice(index).filter((turn) => turn.role !== "assistant" || turn.content).length;
  replaced = turns;
  turns = [...turns.slice(0, index), ...more];
  $("undo").hidden = !lost;
  $("undo").firstElementChild.textContent = `Removed ${lost === 1 ? "one message" : `${lost} messages`}.`;
}

function retry(index) { // of a question, or of an answer
  replaceFrom(turns[index].role === "user" ? index + 1 : index);
  answer();
}

function edit(index) {
  const view = views[index], { body, tools } = view;
  const field = element("textarea", { "aria-label": "Edit the message" });
  const save = () => {
    if (!field.value.trim()) return;
    replaceFrom(index, { role: "user", content: field.value.trim() });
    answer();
    $("prompt").focus();
  };
  const cancel = () => {
    view.editing = false;
    update(view);
    tools.replaceChildren(...userTools(index));
    tools.firstChild.focus();
  };
  view.editing = true;
  field.value = turns[index].content;
  field.addEventListener("input", () => grow(field));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    if (isEnter(event)) { event.preventDefault(); save(); }
  });
  body.replaceChildren(field);
  tools.replaceChildren(button("Send", save, { class: "strong" }), button("Cancel", cancel));
  grow(field);
  field.focus();
}

function undo() {
  stop();
  turns = replaced;
  $("undo").hidden = true;
  show();
  $("prompt").focus();
}

function stop() {
  running?.abort();
  running = null;
  setBusy(false);
}

function isEnter(event) { // not the Enter that accepts a word of an input method
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.4)}px`;
}

function setBusy(busy) {
  $("send").setAttribute("aria-label", busy ? "Stop" : "Send");
  $("send").classList.toggle("stop", busy);
}

// ---- an answer -----------------------------------------------------------------------------------------------

function requestOf(history) {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const { role, content, calls, id, problem } of history) {
    if (role === "assistant" && calls.length) {
      const tool_calls = calls.map(({ id, ...called }) => ({ id, type: "function", function: called }));
      messages.push({ role, content: content || null, tool_calls });
    } else if (role !== "assistant" || content || !problem) {
      messages.push(role === "tool" ? { role, content, tool_call_id: id } : { role, content });
    }
  }
  const body = { model: $("model").value, messages, stream: true };
  body.stream_options = { include_usage: true, continuous_usage_stats: true };
  for (const name of NUMBERS) if (settings[name] !== undefined) body[name] = settings[name];
  if (settings.tools) body.tools = JSON.parse(settings.tools);
  return body;
}

function answer() {
  const turn = { role: "assistant", content: "", reasoning: "", calls: [] };
  const body = requestOf(turns);
  turns.push(turn);
  return write(turn, body);
}

function goOn() { // an answer that max_tokens cut short
  $("undo").hidden = true;
  const turn = turns[turns.length - 1];
  turn.unfinished = false;
  turn.problem = "";
  return write(turn, { ...requestOf(turns), add_generation_prompt: false, continue_final_message: true });
}

async function write(turn, body) {
  const controller = (running = new AbortController());
  let frame = 0;
  const current = () => running === controller;
  const draw = () => {
    frame = 0;
    if (current()) keepEnd(() => update(views[views.length - 1]));
  };
  setBusy(true);
  show();
  toEnd();
  say("Answering");
  pollIn(SOON_MS);
  try {
    for (let attempt = 1; ; attempt++) {
      try {
        await receive(turn, body, controller.signal, () => { frame ||= requestAnimationFrame(draw); });
        break;
      } catch (problem) {
        if (!problem.retryAfter || turn.tokens || attempt === ATTEMPTS) throw problem;
        await pause(turn, problem, Math.max(problem.retryAfter, 2 ** attempt / 2), controller.signal, draw);
      }
    }
  } catch (problem) {
    turn.failed = problem.name !== "AbortError";
    turn.unfinished = Boolean(turn.content);
    turn.problem = turn.failed ? problem.message : "Stopped.";
    if (problem.status === 401) askForKey();
  }
  turn.done = true;
  cancelAnimationFrame(frame);
  if (!current()) return; // the turns are others by now
  running = null;
  setBusy(false);
  keepEnd(() => update(views[views.length - 1]));
  keep();
  say(turn.problem || `Answer: ${turn.content.slice(0, SPOKEN_CHARACTERS)}`);
  pollIn(SOON_MS);
}

async function receive(turn, body, signal, changed) {
  const sent = performance.now(), before = turn.tokens || 0;
  Object.assign(turn, { before, first: 0, last: 0, problem: "", failed: false });
  for await (const event of streamChat(body, signal)) {
    const { delta = {}, finish_reason: reason } = event.choices?.[0] || {}, now = performance.now();
    const thought = delta.reasoning ?? delta.reasoning_content;
    if (event.usage) {
      turn.tokens = before + event.usage.completion_tokens;
      turn.total = event.usage.total_tokens;
    }
    if (thought) turn.reasoning += thought;
    if (delta.content) turn.content += delta.content;
    if (turn.reasoning && (delta.content || delta.tool_calls)) turn.thought ||= (now - sent) / 1000;
    for (const { index, id, function: piece } of delta.tool_calls || []) {
      const call = (turn.calls[index] ||= { id: "", name: "", arguments: "" });
      call.id ||= id || "";
      call.name += piece?.name || "";
      call.arguments += piece?.arguments || "";
    }
    if (thought || delta.content || delta.tool_calls) {
      turn.firstAfter ||= now - sent;
      turn.first ||= now;
      turn.last = now;
    }
    if (reason === "length") {
      const full = limit && turn.total >= limit;
      turn.unfinished = !full;
      turn.problem = full
        ? `The context of ${count(limit)} tokens is full: start a new chat, or edit an earlier message.`
        : "Cut off at the largest number of tokens.";
    }
    changed();
  }
}

async function pause(turn, problem, seconds, signal, draw) { // until a busy server may have room
  for (let left = Math.ceil(seconds); left > 0; left--) {
    turn.problem = `${problem.message} Trying again in ${left} s.`;
    draw();
    await new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, 1000);
      signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
    });
  }
}

// Draws, and stays at the end of the conversation if that is in sight.
function keepEnd(draw) {
  const chat = $("chat"), atEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;
  draw();
  if (atEnd) toEnd();
}

function toEnd() {
  $("chat").scrollTop = $("chat").scrollHeight;
}

// ---- the server ----------------------------------------------------------------------------------------------

async function readModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    limit = data[0].max_model_len || 0;
    const chosen = $("model").value;
    const options = data.map(({ id }) => element("option", { value: id }, id.split("/").pop() || id));
    $("model").replaceChildren(...options);
    if (data.some(({ id }) => id === chosen)) $("model").value = chosen;
    $("model").title = $("model").value;
    $("model").disabled = options.length === 1;
    $("who").textContent = options[0].textContent;
    showContext();
  } catch (problem) {
    if (problem.status === 401) askForKey();
  }
}

let poll = 0;
function pollIn(milliseconds) {
  clearTimeout(poll);
  if (!document.hidden) poll = setTimeout(readState, milliseconds);
}

async function readState() {
  let state = "down", text = "not reachable";
  try {
    await call("health");
    state = "up";
    const now = readMetrics(await (await call(`metrics?${METRICS}`)).text());
    text = "ready";
    if ("num_requests_running" in now) {
      const hits = now.prefix_cache_hits_total / (now.prefix_cache_queries_total || 1);
      text = `${now.num_requests_running} running · ${now.num_requests_waiting} waiting`
        + ` · KV ${percent(now.kv_cache_usage_perc)} · hits ${percent(hits)}`;
    }
    if ($("dot").className !== "up") await readModels(); // the server may be another one by now
  } catch (problem) {
    if (problem.status === 503) [state, text] = ["starting", "starting again, or shutting down"];
  }
  $("dot").className = state;
  $("load").textContent = text;
  pollIn(running ? BUSY_POLL_MS : IDLE_POLL_MS);
}

function percent(share) {
  return `${share < 0.1 ? Number((100 * share).toFixed(1)) : Math.round(100 * share)}%`;
}

// ---- start ---------------------------------------------------------------------------------------------------

turns = load("sessionStorage", "turns", []);
for (const turn of turns)
  if (turn.role === "assistant" && !turn.done)
    Object.assign(turn, { done: true, problem: "Interrupted.", unfinished: Boolean(turn.content) });
setUp(readModels);
for (const text of EXAMPLES)
  $("examples").append(element("li", {}, button(text, () => { ask(text); $("prompt").focus(); })));

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (running) return running.abort();
  if (!text) return;
  $("prompt").value = "";
  grow($("prompt"));
  ask(text);
});
$("prompt").addEventListener("input", () => grow($("prompt")));
$("prompt").addEventListener("keydown", (event) => {
  if (!isEnter(event)) return;
  event.preventDefault();
  if (running) say("Still answering. Escape stops.");
  else $("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("settings").open) running.abort();
});
document.addEventListener("visibilitychange", () => pollIn(0));
addEventListener("pagehide", keep);
$("undo").lastElementChild.addEventListener("click", undo);
$("new").addEventListener("click", () => { if (turns.length) replaceFrom(0); show(); $("prompt").focus(); });
$("model").addEventListener("change", () => { $("model").title = $("model").value; });
$("chat").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = $("chat");
  $("latest").hidden = scrollHeight - scrollTop - clientHeight < 120;
}, { passive: true });
$("latest").addEventListener("click", toEnd);

show();
toEnd();
readState();
call("version").then((reply) => reply.json())
  .then(({ version }) => { $("version").textContent = `microvllm ${version}`; })
  .catch(() => {});
call("docs", { method: "HEAD" }).then(() => { $("docs").hidden = false; }).catch(() => {});
