// Renders Markdown as DOM nodes. Every piece of a source becomes a text node or one of the elements made here, so
// markup in it stays text, and nothing in it is loaded: images become links. Time is linear in the source.

const MAX_DEPTH = 8; // of quotes and lists in each other; what is deeper is a paragraph
const MAX_OPEN = 16; // emphasis in emphasis
const FENCE = /^([ \t]*)(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*))?$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const SPECIAL = /\\[!-/:-@[-`{-~]|`+|\*{1,3}|_{1,3}|~~|!?\[|https?:\/\/|<br ?\/?>|\n/g;
const LABEL = /!?\[([^[\]\n]{0,500})\]\(/y;
const TARGET = /<?([^\s()<>]{1,2000}(?:\([^\s()]{0,500}\)[^\s()<>]{0,500})?)>?(?: "[^"\n]{0,500}")?\)/y;
const BARE_LINK = /https?:\/\/[^\s<>"`*]{1,2000}/y;
const WORD = /[\p{L}\p{N}]/u;

// Returns an element; children (also in an array) that are strings become text. Names of attributes never come from
// a source.
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined) node.setAttribute(name, value);
  }
  for (const child of children.flat()) node.append(child); // one by one: the arguments of a call are limited
  return node;
}

const chunksOf = new WeakMap();

// Shows `source` in `container`. Parts that have not changed since the last call keep their nodes, so that each
// frame of a stream renders the last part only.
export function render(container, source) {
  const before = chunksOf.get(container) || [], now = chunks(source);
  let same = 0;
  while (same < now.length && before[same] === now[same]) same++;
  while (container.childElementCount > same) container.lastElementChild.remove();
  for (const chunk of now.slice(same)) container.append(element("div", {}, blocks(chunk.split("\n"), 0)));
  chunksOf.set(container, now);
}

// The fence that is open behind a line.
function fenceAfter(line, fence) {
  if (fence) return closes(line, fence) ? null : fence;
  const match = FENCE.exec(line);
  return match && match[2];
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

// Cuts a source where an empty line or a fence ends a block at its outermost level.
function chunks(source) {
  const found = [];
  let lines = [], fence = null, blank = false, list = false;
  const cut = () => { if (lines.length) found.push(lines.join("\n")); lines = []; };
  for (const line of source.split("\n")) {
    if (!fence && !line.trim()) {
      blank = true;
      if (lines.length) lines.push("");
      continue;
    }
    const inside = fence !== null;
    if (!inside && !(list && /^[ \t]/.test(line)) && !(list && ITEM.test(line)) && (blank || FENCE.test(line))) cut();
    if (!lines.length) list = ITEM.test(line);
    blank = false;
    lines.push(line);
    fence = fenceAfter(line, fence);
    if (inside && !fence && !list) cut();
  }
  cut();
  return found;
}

function blocks(lines, depth) {
  const nodes = [];
  let at = 0, match;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      at++;
    } else if ((match = FENCE.exec(line))) {
      const [, indent, fence, info] = match, body = [];
      for (at++; at < lines.length && !closes(lines[at], fence); at++)
        body.push(lines[at].startsWith(indent) ? lines[at].slice(indent.length) : lines[at].trimStart());
      at++;
      nodes.push(codeBlock(info.trim().split(/\s/)[0].slice(0, 30), body.join("\n")));
    } else if ((match = HEADING.exec(line))) {
      nodes.push(element(`h${Math.min(match[1].length + 2, 6)}`, {}, inline(match[2].trim())));
      at++;
    } else if (RULE.test(line)) {
      nodes.push(element("hr"));
      at++;
    } else if (depth < MAX_DEPTH && QUOTE.test(line)) {
      const body = [];
      for (; at < lines.length && (match = QUOTE.exec(lines[at])); at++) body.push(match[1]);
      nodes.push(element("blockquote", {}, blocks(body, depth + 1)));
    } else if (depth < MAX_DEPTH && ITEM.test(line)) {
      at = list(lines, at, depth, nodes);
    } else if (isTable(lines, at)) {
      at = table(lines, at, nodes);
    } else {
      const start = at++;
      while (at < lines.length && lines[at].trim() && !beginsBlock(lines, at)) at++;
      nodes.push(element("p", {}, inline(lines.slice(start, at).join("\n").trim())));
    }
  }
  return nodes;
}

function beginsBlock(lines, at) {
  return [FENCE, HEADING, QUOTE, ITEM, RULE].some((kind) => kind.test(lines[at])) || isTable(lines, at);
}

// Appends a list to `nodes` and returns the line behind it.
function list(lines, at, depth, nodes) {
  const [, lead, mark] = ITEM.exec(lines[at]);
  const indent = lead.length, ordered = /\d/.test(mark);
  const node = element(ordered ? "ol" : "ul", ordered && parseInt(mark) !== 1 ? { start: parseInt(mark) } : {});
  for (let match; at < lines.length && (match = ITEM.exec(lines[at])); ) {
    if (match[1].length < indent || /\d/.test(match[2]) !== ordered || RULE.test(lines[at])) break;
    const body = [match[3] || ""], width = match[1].length + match[2].length + 1;
    let fence = fenceAfter(body[0], null), blank = false;
    for (at++; at < lines.length; at++) {
      const line = lines[at], column = line.search(/\S/);
      if (!fence && column >= 0 && column <= indent && (blank || beginsBlock(lines, at))) break;
      blank = column < 0;
      body.push(line.slice(Math.min(Math.max(column, 0), width)));
      fence = fenceAfter(line, fence);
    }
    node.append(element("li", {}, blocks(body, depth + 1)));
  }
  nodes.push(node);
  return at;
}

function cells(line) {
  const found = [];
  let whole = true;
  for (const part of line.trim().replace(/^\|/, "").split("|")) {
    if (whole) found.push(part);
    else found[found.length - 1] += `|${part}`; // a pipe behind a backslash belongs to its cell
    whole = !part.endsWith("\\");
    if (!whole) found[found.length - 1] = found[found.length - 1].slice(0, -1);
  }
  if (found.length > 1 && !found[found.length - 1].trim()) found.pop();
  return found.map((cell) => cell.trim());
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !/^[ \t|:-]+$/.test(lines[at + 1])) return false;
  const marks = cells(lines[at + 1]);
  return marks.length === cells(lines[at]).length && marks.every((mark) => /^:?-+:?$/.test(mark));
}

function table(lines, at, nodes) {
  const end = (mark) => (!mark.endsWith(":") ? "left" : mark.startsWith(":") ? "center" : "right");
  const ends = cells(lines[at + 1]).map(end);
  const row = (tag, line) => {
    const found = cells(line);
    return element("tr", {}, ends.map((end, i) => element(tag, { class: end }, inline(found[i] || ""))));
  };
  const head = element("thead", {}, row("th", lines[at])), body = element("tbody");
  for (at += 2; at < lines.length && lines[at].includes("|"); at++) body.append(row("td", lines[at]));
  nodes.push(element("div", { class: "wide", tabindex: 0 }, element("table", {}, head, body)));
  return at;
}

function codeBlock(language, text) {
  const bar = element("div", { class: "bar" }, element("span", {}, language), copyButton("Copy code", () => text));
  return element("div", { class: "code" }, bar, element("pre", { tabindex: 0 }, element("code", {}, text)));
}

export function copyButton(label, text) {
  const button = element("button", { type: "button", title: label, onclick: copy }, "Copy");
  async function copy() {
    button.textContent = (await toClipboard(text())) ? "Copied" : "Not allowed";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }
  return button;
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // not on HTTPS or localhost
    const field = element("textarea", { class: "unseen" });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

// Returns text and elements for a source without blocks; with `linked` it is the text of a link already.
function inline(text, linked = false) {
  const open = [{ mark: "", nodes: [] }], missing = new Set();
  const push = (node) => {
    const { nodes } = open[open.length - 1], last = nodes.length - 1;
    if (typeof node === "string" && typeof nodes[last] === "string") nodes[last] += node;
    else if (node !== "") nodes.push(node);
  };
  const drop = () => { // an opening mark that nothing closes is text
    const { mark, nodes } = open.pop();
    push(mark);
    for (const node of nodes) push(node);
  };
  let at = 0;
  for (let match; ; ) {
    SPECIAL.lastIndex = at;
    match = SPECIAL.exec(text);
    push(text.slice(at, match ? match.index : text.length));
    if (!match) break;
    const mark = match[0], start = match.index;
    at = start + mark.length;
    if (mark === "\n" || mark.startsWith("<")) {
      push(element("br"));
    } else if (mark[0] === "\\") {
      push(mark[1]);
    } else if (mark[0] === "`") {
      const end = missing.has(mark.length) ? -1 : closingRun(text, at, mark.length);
      if (end < 0) missing.add(mark.length);
      push(end < 0 ? mark : element("code", {}, text.slice(at, end).replace(/\n/g, " ").replace(/^ (.+) $/, "$1")));
      if (end >= 0) at = end + mark.length;
    } else if (mark.endsWith("[") || mark.endsWith("/")) {
      const found = linked ? null : link(text, start);
      push(found ? found.node : mark);
      if (found) at = found.end;
    } else {
      at = start + emphasis(text, start, mark, open, push, drop);
    }
  }
  while (open.length > 1) drop();
  return open[0].nodes;
}

// Opens or closes emphasis at a mark of * _ or ~; returns how many of its characters are used up.
function emphasis(text, start, mark, open, push, drop) {
  const before = text[start - 1] || " ", after = text[start + mark.length] || " ";
  const within = mark[0] === "_" && WORD.test(before) && WORD.test(after); // snake_case
  if (/\S/.test(before) && !within) {
    let depth = open.length - 1;
    while (depth > 0 && !(mark.startsWith(open[depth].mark) && open[depth].nodes.length)) depth--;
    if (depth > 0) {
      while (open.length - 1 > depth) drop();
      const { mark: opened, nodes } = open.pop();
      const tag = opened.length === 1 ? "em" : opened === "~~" ? "del" : "strong";
      push(element(tag, {}, opened.length === 3 ? element("em", {}, nodes) : nodes));
      return opened.length;
    }
  }
  if (/\S/.test(after) && !within && open.length <= MAX_OPEN) open.push({ mark, nodes: [] });
  else push(mark);
  return mark.length;
}

function closingRun(text, at, length) {
  for (;;) {
    const start = text.indexOf("`", at);
    if (start < 0) return -1;
    for (at = start; text[at] === "`"; ) at++;
    if (at - start === length) return start;
  }
}

function link(text, start) {
  return text[start] === "h" ? bareLink(text, start) : namedLink(text, start);
}

function bareLink(text, start) {
  BARE_LINK.lastIndex = start;
  let [address] = BARE_LINK.exec(text) || [""];
  while (/[.,;:!?'\])]$/.test(address) && !(address.endsWith(")") && address.includes("(")))
    address = address.slice(0, -1); // of the sentence, not of the address
  return anchor(address, [address], start + address.length);
}

function namedLink(text, start) {
  LABEL.lastIndex = start;
  const label = LABEL.exec(text);
  if (!label) return null;
  TARGET.lastIndex = LABEL.lastIndex;
  const target = TARGET.exec(text);
  if (!target) return null;
  const shown = inline(label[1] || target[1], true);
  return anchor(target[1], text[start] === "!" ? ["image: ", ...shown] : shown, TARGET.lastIndex);
}

// Anything but a link to the web or a mail address stays text: javascript:, data:, addresses of this server.
function anchor(target, shown, end) {
  if (!/^(https?:\/\/[^/]|mailto:)/i.test(target)) return null;
  const attributes = { href: target, title: target, target: "_blank", rel: "noopener noreferrer nofollow" };
  return { node: element("a", attributes, shown), end };
}
