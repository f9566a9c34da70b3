"use strict";
const at = (id) => document.getElementById(id);
let messages = [], stop = null;
at("key").value = sessionStorage.getItem("key") || "";

function headers() {
  const key = at("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function turn(role, text) {
  const box = document.createElement("div");
  box.className = `turn ${role}`;
  const said = document.createElement("div");
  said.textContent = text;
  box.append(said);
  at("talk").append(box);
  box.scrollIntoView({ block: "end" });
  return { box, said };
}

async function models() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (!answer.ok) return;
  const before = at("model").value;
  at("model").replaceChildren(...(await answer.json()).data.map((m) => new Option(m.id, m.id)));
  if (before) at("model").value = before;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

function rated(box, id) {
  const about = document.createElement("div");
  about.className = "about";
  for (const [mark, rating] of [["Good", 1], ["Bad", -1]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = mark;
    button.onclick = async () => {
      const answer = await fetch("/v1/feedback", { method: "POST", headers: headers(), body: JSON.stringify({ id, rating }) });
      about.textContent = answer.ok ? "Thank you." : (await answer.json()).error.message;
    };
    about.append(button);
  }
  box.append(about);
}

function cited(box, sources) {
  const list = document.createElement("details"), name = document.createElement("summary");
  name.textContent = `${sources.length} passages`;
  list.append(name, ...sources.map((s) => {
    const p = document.createElement("p");
    p.textContent = `[${s.index}] ${s.title || s.source}: ${s.text}`;
    return p;
  }));
  box.append(list);
}

at("ask").onsubmit = async (event) => {
  event.preventDefault();
  if (stop) { stop.abort(); return; }
  const text = at("text").value.trim();
  if (!text) return;
  at("text").value = "";
  messages.push({ role: "user", content: text });
  turn("user", text);
  const { box, said } = turn("assistant", "");
  stop = new AbortController();
  at("send").textContent = "Stop";
  let id = "";
  try {
    const body = { model: at("model").value, messages, temperature: Number(at("temperature").value), stream: true };
    const answer = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: stop.signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const chunk of events(answer)) {
      if (chunk.error) throw new Error(chunk.error.message);
      id = chunk.id;
      if (chunk.sources) cited(box, chunk.sources);
      for (const choice of chunk.choices) said.textContent += choice.delta.content || "";
      box.scrollIntoView({ block: "end" });
    }
    rated(box, id);
  } catch (error) {
    if (error.name !== "AbortError") { said.textContent += error.message; box.classList.add("error"); }
  } finally {
    messages.push({ role: "assistant", content: said.textContent });
    stop = null;
    at("send").textContent = "Send";
    at("text").focus();
  }
};
at("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); at("ask").requestSubmit(); }
};
at("new").onclick = () => { messages = []; at("talk").replaceChildren(); };
at("key").onchange = () => { sessionStorage.setItem("key", at("key").value); models(); };
models();
