"use strict";
const $ = (id) => document.getElementById(id);
const KEPT = 600, ROW = 22, GAP = 4, LEFT = 46, CELL = 7, STRIP = 54, ROWS = 20, LEAST = 16;
let about = null, steps = [], drawn = null, asked = null;

// --- the batch

const feed = new EventSource("steps");
feed.addEventListener("about", (event) => {
  about = JSON.parse(event.data);
  steps = [];
  $("what").textContent = `${about.model} on ${about.ranks} rank${about.ranks === 1 ? "" : "s"}, ${about.slots} slots, ` +
    `${about.policy} batching${about.speculate === "off" ? "" : ", speculation by " + about.speculate}`;
  document.title = `rankwise: ${about.model}`;
  $("modes").hidden = !(about.chat && about.text);
  if (!about.chat) document.querySelector("[value=complete]").checked = true;
  if (!about.text && !/^[\d\s,]*$/.test($("prompt").value)) $("prompt").value = "1, 2, 3";
});
feed.addEventListener("steps", (event) => {
  steps.push(...JSON.parse(event.data));
  steps.splice(0, steps.length - KEPT);
  tell();
  requestAnimationFrame(draw);
});
feed.addEventListener("error", () => { $("what").textContent = "the server is away; trying again…"; });

function tell() {
  const last = steps.at(-1);
  if (!last) return;
  const [used, kept, free] = last.blocks;
  $("running").textContent = last.running;
  $("waiting").textContent = last.waiting;
  $("kv").textContent = `${Math.round(100 * used / (used + kept + free))} %`;
  let tokens = 0, ms = 0;
  for (const step of steps.slice(-50)) {
    tokens += step.runs.reduce((sum, run) => sum + run[4], 0);
    ms += step.ms;
  }
  $("rate").textContent = last.running ? (1000 * tokens / ms).toFixed(0) : "0";
}

// Steps as columns that fit, and of each request there the cell at each: [kind, run] or null.
function rowsOf(columns) {
  const rows = new Map();
  const row = (id) => rows.get(id) ?? rows.set(id, { id, cells: [], first: Infinity, last: -1, ended: null, away: false }).get(id);
  columns.forEach((step, x) => {
    for (const run of step.runs) {
      const r = row(run[0]);
      r.cells[x] = [run[1] ? "prefill" : run[4] > 1 ? "drafted" : "decode", run];
      r.first = Math.min(r.first, x);
      r.last = x;
      r.away = false;
    }
    for (const id of step.preempted) {
      const r = row(id);
      r.cells[x] = ["preempted", null];
      r.first = Math.min(r.first, x);
      r.last = x;
      r.away = true;
    }
    for (const r of rows.values()) {
      if (r.away && !r.cells[x]) r.cells[x] = ["idle", null];
      if (r.away) r.last = x;
    }
    for (const [id, reason] of Object.entries(step.ended)) {
      if (rows.has(+id)) rows.get(+id).ended = reason;
    }
  });
  return [...rows.values()].sort((a, b) => a.id - b.id);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function cell(g, kind, x, y, w, h, run) {
  g.fillStyle = colour(kind);
  if (kind === "idle") {
    g.fillRect(x, y + h / 2 - 1, w + 1, 2);
  } else if (kind === "ended" || kind === "gone") {
    g.beginPath();
    g.arc(x + w / 2, y + h / 2, kind === "gone" ? 2.5 : 3, 0, 7);
    g.strokeStyle = g.fillStyle = colour("ended");
    g.lineWidth = 1.2;
    if (kind === "gone") g.stroke(); else g.fill();
  } else {
    g.fillRect(x, y, w, h);
  }
  if (kind === "preempted") {
    g.strokeStyle = colour("card");
    g.lineWidth = 1.4;
    const a = w / 2 - 1.5, b = 4, cx = x + w / 2, cy = y + h / 2;
    g.beginPath();
    g.moveTo(cx - a, cy - b); g.lineTo(cx + a, cy + b); g.moveTo(cx + a, cy - b); g.lineTo(cx - a, cy + b);
    g.stroke();
  }
  if (kind === "drafted") {
    // A notch for each accepted draft.
    g.fillStyle = colour("card");
    const accepted = run ? run[4] - 1 : 1;
    for (let n = 0; n < Math.min(accepted, 4); n++) g.fillRect(x + 2, y + h - 4 - 4 * n, w - 4, 2);
  }
}

function scaled(canvas, width, height) {
  const dpr = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * dpr) || canvas.height !== Math.round(height * dpr)) {
    canvas.width = Math.round(width * dpr);
    canvas.height = Math.round(height * dpr);
    canvas.style.height = `${height}px`;
  }
  const g = canvas.getContext("2d");
  g.setTransform(dpr, 0, 0, dpr, 0, 0);
  g.clearRect(0, 0, width, height);
  return g;
}

function draw() {
  const canvas = $("batch"), width = $("frame").clientWidth;
  const columns = steps.slice(-Math.max(1, Math.floor((width - LEFT - 10) / CELL)));
  const all = rowsOf(columns), rows = all.slice(-ROWS), hidden = all.length - rows.length;
  const lines = Math.max(LEAST, rows.length), bottom = lines * ROW;
  const g = scaled(canvas, width, bottom + STRIP + 24);
  $("empty").hidden = rows.length > 0;
  g.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  g.textBaseline = "middle";
  for (let n = 0; n < lines; n++) {
    g.fillStyle = colour("faint");
    g.fillRect(LEFT, n * ROW + GAP / 2, width - LEFT, ROW - GAP);
  }
  rows.forEach((r, n) => {
    const y = n * ROW + GAP / 2, h = ROW - GAP;
    g.fillStyle = colour(r.ended ? "soft" : "ink");
    g.textAlign = "right";
    g.fillText(`#${r.id}`, LEFT - 10, y + h / 2 + 0.5);
    r.cells.forEach((c, x) => { if (c) cell(g, c[0], LEFT + x * CELL, y, CELL - 1, h, c[1]); });
    if (r.ended) cell(g, r.ended === "cancelled" ? "gone" : "ended", LEFT + (r.last + 1) * CELL, y, CELL, h, null);
  });
  strip(g, columns, bottom + 10, width);
  if (hidden) {
    g.fillStyle = colour("soft");
    g.textAlign = "right";
    g.fillText(`${hidden} earlier ones not shown`, width, bottom + STRIP + 15);
  }
  drawn = { columns, rows };
  const last = columns.at(-1);
  canvas.setAttribute("aria-label", last ? `Step ${last.step}: ${last.running} requests run, ${last.waiting} wait` : "No request yet");
}

// The share of the KV blocks in use, and kept for their prefix, under the steps.
function strip(g, columns, top, width) {
  const height = STRIP - 14;
  g.fillStyle = colour("faint");
  g.fillRect(LEFT, top, width - LEFT, height);
  columns.forEach((step, x) => {
    const [used, kept, free] = step.blocks, all = Math.max(1, used + kept + free);
    const a = height * used / all, b = height * kept / all;
    g.fillStyle = colour("soft");
    g.fillRect(LEFT + x * CELL, top + height - a, CELL, a);
    g.fillStyle = colour("idle");
    g.fillRect(LEFT + x * CELL, top + height - a - b, CELL, b);
  });
  g.fillStyle = colour("soft");
  g.textAlign = "right";
  g.fillText("KV", LEFT - 10, top + height / 2);
  g.textAlign = "left";
  const first = columns[0], last = columns.at(-1);
  const text = last ? `steps ${first.step} to ${last.step}; below them the KV blocks in use, and (paler) kept for their prefix` : "";
  g.fillText(text, LEFT, top + height + 14);
}

function point(event) {
  const box = $("batch").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const step = drawn?.columns[Math.floor((x - LEFT) / CELL)], row = drawn?.rows[Math.floor(y / ROW)];
  const tip = $("tip");
  tip.hidden = !step || x < LEFT;
  if (tip.hidden) return;
  const found = row?.cells[Math.floor((x - LEFT) / CELL)];
  let text = `step ${step.step}, ${step.ms.toFixed(0)} ms, ${step.runs.reduce((sum, r) => sum + r[2], 0)} tokens`;
  if (found) {
    const run = found[1], kind = found[0];
    text = `#${row.id}: ` + (kind === "prefill" ? `${run[2]} tokens of its prompt` : kind === "preempted" ? "lost its blocks" :
      kind === "idle" ? "waits for blocks" : run[3] ? `1 token and ${run[4] - 1} of ${run[3]} drafts` : "1 token") + `; ${text}`;
  }
  tip.textContent = text;
  tip.style.left = `${Math.max(0, Math.min(x + 12, box.width - tip.offsetWidth - 4))}px`;
  tip.style.top = `${y + 16}px`;
}
$("batch").addEventListener("mousemove", point);
$("batch").addEventListener("mouseleave", () => { $("tip").hidden = true; });
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { legend(); draw(); });

function legend() {
  for (const item of document.querySelectorAll("#legend li")) {
    const canvas = item.querySelector("canvas") ?? item.insertBefore(document.createElement("canvas"), item.firstChild);
    canvas.style.width = "12px";
    cell(scaled(canvas, 12, 14), item.dataset.kind, 1, 0, 10, 14, null);
  }
}

// --- a prompt

function call(prompt, most, chat, stream) {
  const wanted = { model: about.model, max_tokens: most, temperature: Number($("temperature").value), stream };
  if ($("seed").value !== "") wanted.seed = Number($("seed").value);
  if (stream) wanted.stream_options = { include_usage: true };
  if (chat) wanted.messages = [{ role: "user", content: prompt }];
  else wanted.prompt = about.text ? prompt : prompt.split(/[\s,]+/).filter(Boolean).map(Number);
  if (!about.text) wanted.return_token_ids = true;
  const path = chat ? "v1/chat/completions" : "v1/completions";
  return fetch(path, { method: "POST", body: JSON.stringify(wanted), headers: { "content-type": "application/json" }, signal: asked.signal });
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function busy(yes) {
  $("send").disabled = $("fill").disabled = yes;
  $("stop").disabled = !yes;
  if (yes) asked = new AbortController();
}

function failed(error) {
  if (error.name === "AbortError") return;
  $("answer").classList.add("failed");
  $("answer").textContent = error.message;
}

async function send() {
  const answer = $("answer"), began = performance.now();
  const chat = about.chat && document.querySelector("[name=mode]:checked").value === "chat";
  answer.textContent = $("told").textContent = "";
  answer.classList.remove("failed");
  busy(true);
  try {
    const response = await call($("prompt").value, Number($("most").value), chat, true);
    if (!response.ok) throw new Error((await response.json()).error.message);
    let first = null, usage = null, reason = null;
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      const text = about.text ? (choice.delta ? choice.delta.content ?? "" : choice.text) : choice.token_ids.join(" ") + " ";
      if (text && first === null) first = performance.now();
      reason = choice.finish_reason ?? reason;
      answer.append(text);
      answer.scrollTop = answer.scrollHeight;
    }
    const seconds = (performance.now() - (first ?? began)) / 1000, tokens = usage.completion_tokens;
    $("told").textContent = `${usage.prompt_tokens} tokens in, ${tokens} out (${reason}); first after ` +
      `${Math.round((first ?? began) - began)} ms` + (tokens > 1 ? `, then ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "");
  } catch (error) {
    failed(error);
  }
  busy(false);
}

const TOPICS = ["Tell me about the sea.", "Write a haiku about rain.", "What is a prime number?", "Name three rivers in Europe.",
  "How do bees make honey?", "Explain what a matrix is to a child.", "Why do leaves fall in autumn?", "What is the capital of Peru?",
  "Give me a recipe for pancakes.", "How far away is the moon?", "Who was Ada Lovelace?", "What makes bread rise?"];

async function fill() {
  $("answer").textContent = $("told").textContent = "";
  $("answer").classList.remove("failed");
  busy(true);
  const jobs = TOPICS.map(async (topic, n) => {
    const prompt = about.text ? topic : Array.from({ length: 6 + 3 * n }, (_, k) => (k * 7 + n) % 16).join(", ");
    const response = await call(prompt, 24 + (n * 37) % 72, about.chat && about.text, false);
    const answered = await response.json();
    if (!response.ok) throw new Error(answered.error.message);
    const choice = answered.choices[0], said = about.text ? choice.message?.content ?? choice.text : choice.token_ids.join(" ");
    const line = document.createElement("p"), asked = document.createElement("b");
    asked.textContent = prompt;
    line.append(asked, "\n" + said.trim().split("\n")[0]);
    $("answer").append(line);
    $("answer").scrollTop = $("answer").scrollHeight;
    return answered.usage.completion_tokens;
  });
  const began = performance.now();
  try {
    const tokens = (await Promise.all(jobs)).reduce((a, b) => a + b);
    const seconds = (performance.now() - began) / 1000;
    $("told").textContent = `${TOPICS.length} answers of ${tokens} tokens in ${seconds.toFixed(1)} s: ${(tokens / seconds).toFixed(0)} tokens/s`;
  } catch (error) {
    asked.abort();
    failed(error);
  }
  busy(false);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); if (about && !$("send").disabled) send(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("fill").addEventListener("click", () => { if (about) fill(); });
$("stop").addEventListener("click", () => asked?.abort());
legend();
draw();
