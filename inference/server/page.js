"use strict";
const $ = (id) => document.getElementById(id);
const KEPT = 600, ROW = 22, GAP = 4, LEFT = 46, CELL = 7, STRIP = 50, ROWS = 20, LEAST = 16;
let about = null, steps = [], drawn = null, stopping = null;

// --- the batch

// What the feed tells, by kind.
const heard = {
  about(told) {
    about = told;
    steps = [];
    $("what").textContent = `${about.model} on ${about.ranks} rank${about.ranks === 1 ? "" : "s"}, ${about.slots} slots, ` +
      `${about.policy} batching${about.speculate === "off" ? "" : ", speculation by " + about.speculate}`;
    document.title = `rankwise: ${about.model}`;
    $("slots").textContent = `running of ${about.slots}`;
    $("modes").hidden = !(about.chat && about.text);
    if (!about.chat) document.querySelector("[value=complete]").checked = true;
    if (!about.text && !/^[\d\s,]*$/.test($("prompt").value)) $("prompt").value = "1, 2, 3";
  },
  steps(told) {
    for (const step of told) {
      const last = steps.at(-1);
      if (step.step !== null) steps.push(step);
      // Requests that went after the last step.
      else if (last) steps[steps.length - 1] = { ...step, step: last.step, ms: last.ms, runs: last.runs,
        preempted: last.preempted, ended: { ...last.ended, ...step.ended } };
    }
    steps.splice(0, Math.max(0, steps.length - KEPT));
    count();
    requestAnimationFrame(draw);
  },
};

// Not by EventSource: it cannot send a key.
async function watch() {
  for (;;) {
    try {
      const response = await fetch("steps", { headers: keyed() });
      if (response.status === 401) {
        await askForKey();
        continue;
      }
      if (response.ok) for await (const { event, data } of events(response.body)) heard[event](data);
    } catch {
      // The same as the end of the feed.
    }
    $("what").textContent = "the server is away; trying again…";
    await new Promise((later) => setTimeout(later, 1000));
  }
}

// Kept for as long as this tab is open.
const KEY = "api-key", keyed = () => (sessionStorage.getItem(KEY) ? { authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {});

async function askForKey() {
  if (sessionStorage.getItem(KEY)) $("ask").textContent = "That is none of this server's API keys";
  $("door").showModal();
  await new Promise((given) => $("door").addEventListener("close", given, { once: true }));
  sessionStorage.setItem(KEY, $("key").value);
}

function count() {
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

// Steps as columns that fit, and of each request there the cell at each: [kind, run] or null. `last`: its last column.
function rowsOf(columns) {
  const rows = new Map();
  const put = (id, x, kind, run) => {
    const r = rows.get(id) ?? rows.set(id, { id, cells: [], last: x, ended: null }).get(id);
    r.cells[x] ??= [kind, run];
    r.last = x;
  };
  columns.forEach((step, x) => {
    for (const run of step.runs) put(run[0], x, run[1] ? "prefill" : run[4] > 1 ? "drafted" : "decode", run);
    for (const id of step.preempted) put(id, x, "preempted", null);
    for (const id of step.queue) put(id, x, "idle", null);
    for (const [id, reason] of Object.entries(step.ended)) {
      if (rows.has(+id)) rows.get(+id).ended = reason;
    }
  });
  return [...rows.values()].sort((a, b) => a.id - b.id);
}

// Of too many rows, those that run and that wait first, then the latest of those that have ended.
function chosen(all, most) {
  const live = all.filter((r) => !r.ended).slice(0, most), ended = all.filter((r) => r.ended);
  return [...ended.slice(ended.length - Math.min(ended.length, most - live.length)), ...live].sort((a, b) => a.id - b.id);
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
  const all = rowsOf(columns), rows = chosen(all, Math.max(ROWS, 12 + (about?.slots ?? 0)));
  const lines = Math.max(LEAST, rows.length), bottom = lines * ROW;
  const g = scaled(canvas, width, bottom + STRIP);
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
  drawn = { columns, rows };
  const last = columns.at(-1), hidden = all.length - rows.length;
  $("caption").textContent = !last ? "" : `Steps ${columns[0].step} to ${last.step}. Below them the KV blocks in use, and (paler) ` +
    `kept for their prefix.${hidden ? ` ${hidden} more request${hidden === 1 ? " is" : "s are"} not shown.` : ""}`;
  canvas.setAttribute("aria-label", last ? `Step ${last.step}: ${last.running} requests run, ${last.waiting} wait` : "No request yet");
}

// The share of the KV blocks in use, and kept for their prefix, under the steps.
function strip(g, columns, top, width) {
  const height = STRIP - 10;
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
      kind === "idle" ? "waits" : run[3] ? `1 token and ${run[4] - 1} of ${run[3]} drafts` : "1 token") + `; ${text}`;
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

const chatting = () => about.chat && about.text && document.querySelector("[name=mode]:checked").value === "chat";

// The n answers to a prompt, streamed: `put` gets each text and the number of its answer. `tally` counts what has come.
async function ask(prompt, most, n, tally, put) {
  const wanted = { model: about.model, max_tokens: most, temperature: Number($("temperature").value), n, stream: true,
    stream_options: { include_usage: true }, return_token_ids: true };
  if ($("seed").value !== "") wanted.seed = Number($("seed").value);
  if (chatting()) wanted.messages = [{ role: "user", content: prompt }];
  else wanted.prompt = about.text ? prompt : prompt.split(/[\s,]+/).filter(Boolean).map(Number);
  const response = await fetch(chatting() ? "v1/chat/completions" : "v1/completions", {
    method: "POST", body: JSON.stringify(wanted), headers: { "content-type": "application/json", ...keyed() }, signal: stopping.signal });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const { data } of events(response.body)) {
    if (data.error) throw new Error(data.error.message);
    tally.prompt += data.usage?.prompt_tokens ?? 0;
    for (const choice of data.choices) {
      const ids = choice.token_ids ?? [];
      if (ids.length) tally.first ??= performance.now();
      tally.tokens += ids.length;
      tally.reason = choice.finish_reason ?? tally.reason;
      put(about.text ? choice.text ?? choice.delta.content ?? "" : ids.map((id) => `${id} `).join(""), choice.index);
    }
  }
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
      const [, event, data] = /^(?:event: (\w+)\n)?data: (.*)$/.exec(part);
      if (data !== "[DONE]") yield { event, data: JSON.parse(data) };
    }
  }
}

function busy(yes) {
  $("send").disabled = $("fill").disabled = yes;
  $("answer").classList.toggle("live", yes);
  $("stop").disabled = !yes;
}

// Run `job` from a click to its end or to Stop, and tell what came of it: `words` says it of a tally that is whole.
async function asking(job, words) {
  const tally = { prompt: 0, tokens: 0, first: null, reason: null }, began = performance.now();
  $("answer").textContent = "";
  $("answer").classList.remove("failed");
  tell("");
  stopping = new AbortController();
  busy(true);
  let stopped = false;
  try {
    await job(tally);
  } catch (error) {
    stopped = stopping.signal.aborted;
    stopping.abort();
    if (!stopped) {
      $("answer").classList.add("failed");
      $("answer").textContent = error.message;
    }
  }
  busy(false);
  const seconds = (performance.now() - tally.first) / 1000;
  if (stopped && !tally.tokens) tell("Stopped before the first token.");
  else if (tally.tokens) {
    tell(`${stopped ? `Stopped: ${tally.tokens} tokens out` : words(tally)}; first after ${((tally.first - began) / 1000).toFixed(2)} s` +
      (tally.tokens > 1 ? `, then ${((tally.tokens - 1) / seconds).toFixed(1)} tokens/s` : ""));
  }
}

function tell(text, wrong = false) {
  $("told").textContent = text;
  $("told").classList.toggle("failed", wrong);
}

function send() {
  const prompt = $("prompt").value, answer = $("answer");
  if (!prompt.trim()) {
    tell("The prompt is empty: type one first.", true);
    $("prompt").focus();
    return;
  }
  asking((tally) => ask(prompt, Number($("most").value), 1, tally, (text) => {
    answer.append(text);
    answer.scrollTop = answer.scrollHeight;
  }), (tally) => `${tally.prompt} tokens in, ${tally.tokens} out (${tally.reason})`);
}

// Three answers to each of four prompts: a browser opens six connections to a host, and the feed is one of them.
const EACH = 3, TOPICS = [["Tell me about the sea.", 96], ["Write a haiku about rain.", 40], ["What is a prime number?", 64],
  ["Name three rivers in Europe.", 24]];

function fill() {
  if (matchMedia("(max-width: 960px)").matches) $("watch").scrollIntoView({ behavior: "smooth" });
  asking((tally) => Promise.all(TOPICS.map(([topic, most], n) => {
    const prompt = about.text ? topic : Array.from({ length: 6 + 3 * n }, (_, k) => (k * 7 + n) % 16).join(", ");
    const asked = document.createElement("p");
    asked.append(Object.assign(document.createElement("b"), { textContent: prompt }));
    const lines = Array.from({ length: EACH }, () => asked.appendChild(document.createElement("span")));
    $("answer").append(asked);
    return ask(prompt, most, EACH, tally, (text, index) => { lines[index].textContent = (lines[index].textContent + text).trimStart(); });
  })), (tally) => `${EACH * TOPICS.length} answers, ${tally.prompt} tokens in, ${tally.tokens} out`);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); if (about && !$("send").disabled) send(); });
$("prompt").addEventListener("keydown", (event) => {
  // Not while an input method has a word under way.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
$("fill").addEventListener("click", () => { if (about && $("form").reportValidity()) fill(); });
$("stop").addEventListener("click", () => stopping?.abort());
legend();
draw();
watch();
