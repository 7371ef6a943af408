"use strict";
// Everything that a model says becomes text nodes of elements made here, never HTML.

const $ = (id) => document.getElementById(id);
const KEPT = "metal-marlin";

/** An element with attributes and children. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---- Markdown ----

const INLINE =
  /(`+)(.+?)\1|\*\*(?=\S)(.+?\S|\S)\*\*|__(?=\S)(.+?\S|\S)__|\*(?=\S)(.+?\S|\S)\*|(?<!\w)_(?=\S)(.+?\S|\S)_(?!\w)|~~(.+?)~~|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?])/s;

function inline(text) {
  const out = [];
  for (let match; (match = INLINE.exec(text)); ) {
    if (match.index > 0) out.push(text.slice(0, match.index));
    const [whole, , code, strong, strong2, soft, soft2, struck, name, target, bare] = match;
    if (code !== undefined) out.push(make("code", {}, code));
    else if (strong ?? strong2) out.push(make("strong", {}, ...inline(strong ?? strong2)));
    else if (soft ?? soft2) out.push(make("em", {}, ...inline(soft ?? soft2)));
    else if (struck) out.push(make("s", {}, ...inline(struck)));
    else {
      const link = { href: target ?? bare, rel: "noopener noreferrer", target: "_blank" };
      out.push(make("a", link, ...(name ? inline(name) : [bare])));
    }
    text = text.slice(match.index + whole.length);
  }
  if (text) out.push(text);
  return out;
}

function codeBlock(lines, language) {
  const text = lines.join("\n");
  const copy = make("button", { type: "button", "aria-label": "Copy code" }, "Copy");
  copy.onclick = async () => {
    await navigator.clipboard?.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  };
  return make("div", { class: "code" }, make("pre", { tabindex: "0" }, make("code", language ? { "data-language": language } : {}, text)), copy);
}

const LIST = /^(\s*)([-*+]|\d+[.)])\s+(.*)$/;

/** A list and what is nested in it; `lines` is consumed. */
function list(lines) {
  const [, indent, mark] = LIST.exec(lines[0]);
  const isNumbered = /\d/.test(mark);
  const out = make(isNumbered ? "ol" : "ul", isNumbered && parseInt(mark, 10) !== 1 ? { start: parseInt(mark, 10) } : {});
  while (lines.length) {
    const item = LIST.exec(lines[0]);
    if (!item || item[1].length < indent.length || (item[1].length === indent.length && /\d/.test(item[2]) !== isNumbered)) break;
    if (item[1].length > indent.length + 1) {
      (out.lastElementChild ?? out).append(list(lines));
      continue;
    }
    lines.shift();
    const inside = [item[3]];
    while (lines.length && /^\s+\S/.test(lines[0]) && !LIST.test(lines[0])) inside.push(lines.shift().trim());
    out.append(make("li", {}, ...inline(inside.join("\n"))));
  }
  return out;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const isRule = (line) => /^\s*\|?[\s:|-]*-[\s:|-]*\|?\s*$/.test(line ?? "") && line.includes("|");

/** Markdown as elements. */
function markdown(text) {
  const lines = text.split("\n");
  const out = document.createDocumentFragment();
  while (lines.length) {
    const line = lines[0];
    const fence = /^\s*(```+|~~~+)\s*([\w+#.-]*)/.exec(line);
    const heading = /^(#{1,6})\s+(.*?)\s*#*$/.exec(line);
    if (!line.trim()) {
      lines.shift();
    } else if (fence) {
      lines.shift();
      const inside = [];
      while (lines.length && !lines[0].trim().startsWith(fence[1])) inside.push(lines.shift());
      lines.shift();
      out.append(codeBlock(inside, fence[2]));
    } else if (heading) {
      lines.shift();
      out.append(make(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2])));
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      lines.shift();
      out.append(make("hr"));
    } else if (LIST.test(line)) {
      out.append(list(lines));
    } else if (/^\s*>/.test(line)) {
      const inside = [];
      while (lines.length && /^\s*>/.test(lines[0])) inside.push(lines.shift().replace(/^\s*> ?/, ""));
      out.append(make("blockquote", {}, markdown(inside.join("\n"))));
    } else if (line.includes("|") && isRule(lines[1])) {
      const head = make("tr", {}, ...cells(lines.shift()).map((cell) => make("th", { scope: "col" }, ...inline(cell))));
      lines.shift();
      const rows = [];
      while (lines.length && lines[0].includes("|")) {
        rows.push(make("tr", {}, ...cells(lines.shift()).map((cell) => make("td", {}, ...inline(cell)))));
      }
      out.append(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
    } else {
      const inside = [lines.shift()];
      while (lines.length && lines[0].trim() && !/^\s*(```|~~~|>|#{1,6}\s)/.test(lines[0]) && !LIST.test(lines[0])) inside.push(lines.shift());
      const parts = inside.flatMap((part, index) => (index ? [make("br"), ...inline(part)] : inline(part)));
      out.append(make("p", {}, ...parts));
    }
  }
  return out;
}

// ---- What is kept in the browser ----

const kept = (() => {
  const empty = { conversations: [], current: null, settings: {} };
  try {
    return { ...empty, ...JSON.parse(localStorage.getItem(KEPT) ?? "{}") };
  } catch {
    return empty;
  }
})();

function keep() {
  try {
    localStorage.setItem(KEPT, JSON.stringify(kept));
  } catch {
    say("The browser has no room to keep this conversation.", true);
  }
}

const current = () => kept.conversations.find((conversation) => conversation.id === kept.current);

function begin() {
  kept.current = crypto.randomUUID?.() ?? String(Date.now());
  kept.conversations.unshift({ id: kept.current, title: "New conversation", messages: [] });
}

// ---- What is shown ----

let asking = null;

function say(text, isWrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", isWrong);
}

function showConversations() {
  const items = kept.conversations.map((conversation) => {
    const open = make("button", { type: "button" }, conversation.title);
    if (conversation.id === kept.current) open.setAttribute("aria-current", "true");
    open.onclick = () => {
      stop();
      kept.current = conversation.id;
      showMenu(false);
      show();
    };
    const remove = make("button", { type: "button", "aria-label": `Delete ${conversation.title}` }, "×");
    remove.onclick = () => {
      if (conversation.id === kept.current) stop();
      kept.conversations = kept.conversations.filter((other) => other !== conversation);
      if (conversation.id === kept.current) kept.current = kept.conversations[0]?.id ?? null;
      show();
    };
    return make("li", {}, open, remove);
  });
  $("conversations").querySelector("ul").replaceChildren(...items);
}

/** Fills an element with what a message says. */
function fill(element, message) {
  const isOwn = message.role === "user";
  const parts = [make("h2", {}, isOwn ? "You" : "Model")];
  if (message.reasoning) {
    const folded = make("details", {}, make("summary", {}, message.content ? "Thoughts" : "Thinking …"), make("div", {}, message.reasoning));
    folded.open = element.querySelector("details")?.open ?? false;
    parts.push(folded);
  }
  parts.push(isOwn ? message.content : markdown(message.content));
  if (message.error) parts.push(make("p", { class: "wrong" }, message.error));
  element.replaceChildren(...parts);
  if (isOwn || asking?.message === message) return;
  const tools = make("div", { class: "tools" });
  const copy = make("button", { type: "button" }, "Copy");
  copy.onclick = () => navigator.clipboard?.writeText(message.content);
  tools.append(copy);
  if (message === current()?.messages.at(-1)) {
    const again = make("button", { type: "button", id: "again" }, "Regenerate");
    again.onclick = regenerate;
    tools.append(again);
  }
  if (message.speed) tools.append(make("span", {}, message.speed));
  element.append(tools);
}

function show() {
  showConversations();
  const articles = (current()?.messages ?? []).map((message) => {
    const article = make("article", { class: message.role });
    fill(article, message);
    return article;
  });
  $("log").replaceChildren(...articles);
  $("log").scrollTop = $("log").scrollHeight;
  document.title = current() ? `${current().title} – Metal Marlin` : "Metal Marlin";
  keep();
}

function showMenu(isOpen) {
  $("conversations").classList.toggle("open", isOpen);
  $("menu").setAttribute("aria-expanded", String(isOpen));
}

function showTheme() {
  const theme = kept.settings.theme ?? "system";
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
}

// ---- What is asked ----

function headers() {
  const key = kept.settings.key;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server says ${response.status}`;
  }
}

/** The models that are not loaded, as far as is known. */
let unloaded = new Set();

async function loadModels() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await problemOf(response));
    const models = (await response.json()).data;
    unloaded = new Set(models.filter(({ status }) => status !== "loaded").map(({ id }) => id));
    const chosen = $("model").value || kept.settings.model;
    const name = (id) => (unloaded.has(id) ? `${id} (not loaded)` : id);
    $("model").replaceChildren(...models.map(({ id }) => make("option", { value: id }, name(id))));
    if (models.some(({ id }) => id === chosen)) $("model").value = chosen;
    return true;
  } catch (error) {
    say(`No models: ${error.message}`, true);
    return false;
  }
}

async function showModels() {
  if (await loadModels()) say("");
}

function requestOf(messages) {
  const { temperature, most, system, thinking } = kept.settings;
  // What was stopped before it said anything is not said again.
  const said = messages.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  const request = {
    model: $("model").value,
    messages: system ? [{ role: "system", content: system }, ...said] : said,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (temperature !== undefined && temperature !== "") request.temperature = Number(temperature);
  if (most) request.max_tokens = Number(most);
  if (thinking === false) request.chat_template_kwargs = { enable_thinking: false };
  return request;
}

/** The objects of a stream of server-sent events. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function ask() {
  const conversation = current();
  const request = requestOf(conversation.messages);
  const message = { role: "assistant", content: "", reasoning: "" };
  const abort = new AbortController();
  asking = { message, abort };
  conversation.messages.push(message);
  $("send").hidden = true;
  $("stop").hidden = false;
  show();
  const article = $("log").lastElementChild;
  article.setAttribute("aria-busy", "true");
  let frame = 0;
  const draw = () => {
    frame = 0;
    const log = $("log");
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    fill(article, message);
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  };
  let [first, tokens, usage] = [0, 0, null];
  if (unloaded.has(request.model)) say(`Loading ${request.model} …`);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request), signal: abort.signal,
    });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const chunk of eventsOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const delta = chunk.choices?.[0]?.delta;
      if (!delta) continue;
      if (delta.content || delta.reasoning_content) {
        first ||= performance.now();
        tokens += 1;
      }
      message.content += delta.content ?? "";
      message.reasoning += delta.reasoning_content ?? "";
      const seconds = (performance.now() - first) / 1000;
      if (tokens > 1) say(`${request.model}: ${tokens} tokens, ${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (error.name !== "AbortError") message.error = `No answer: ${error.message}`;
  }
  cancelAnimationFrame(frame);
  const seconds = (performance.now() - first) / 1000;
  const count = usage?.completion_tokens ?? tokens;
  if (count > 1) message.speed = `${count} tokens, ${((count - 1) / seconds).toFixed(1)} tokens/s`;
  asking = null;
  article.removeAttribute("aria-busy");
  $("send").hidden = false;
  $("stop").hidden = true;
  say(message.speed ? `${request.model}: ${message.speed}` : "");
  loadModels();
  if (kept.conversations.includes(conversation)) show();
  $("text").focus();
}

function stop() {
  asking?.abort.abort();
}

function send() {
  const text = $("text").value.trim();
  if (!text || asking) return;
  if (!current()) begin();
  const conversation = current();
  if (!conversation.messages.length) conversation.title = text.slice(0, 60);
  conversation.messages.push({ role: "user", content: text });
  $("text").value = "";
  ask();
}

function regenerate() {
  if (asking) return;
  current().messages.pop();
  ask();
}

// ---- Events ----

$("form").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
};
$("stop").onclick = stop;
document.onkeydown = (event) => {
  if (event.key === "Escape") {
    stop();
    showMenu(false);
  }
};
$("new").onclick = () => {
  stop();
  kept.current = null;
  showMenu(false);
  show();
  $("text").focus();
};
$("menu").onclick = () => showMenu(!$("conversations").classList.contains("open"));
$("theme").onclick = () => {
  const themes = ["system", "light", "dark"];
  kept.settings.theme = themes[(themes.indexOf(kept.settings.theme ?? "system") + 1) % themes.length];
  showTheme();
  keep();
};
$("model").onchange = () => {
  kept.settings.model = $("model").value;
  keep();
};
for (const id of ["temperature", "most", "system", "key"]) {
  $(id).value = kept.settings[id] ?? "";
  $(id).onchange = () => {
    kept.settings[id] = $(id).value;
    keep();
    if (id === "key") showModels();
  };
}
$("thinking").checked = kept.settings.thinking ?? true;
$("thinking").onchange = () => {
  kept.settings.thinking = $("thinking").checked;
  keep();
};
showTheme();
show();
showModels();
$("text").focus();
