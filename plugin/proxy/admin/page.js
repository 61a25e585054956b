
"use strict";
// Everything shown comes from PREFIX/status. Nodes are made once and changed in place, so that a selection, the focus and
// a screen reader's place survive a refresh.
const PREFIX = document.body.dataset.prefix;
const STARTING = new Set(["mounting", "starting", "loading", "warming", "trimming", "checkpointing", "resuming", "restoring", "waking", "verifying"]);
const OFF = new Set(["asleep", "idle", "stopped", "failed"]);
const KINDS = { now: "now", cold: "cold start", "first-restore": "first restore", restored: "restore", woken: "wake" };
const PHASES = {
  idle: "Nothing has started it yet", mounting: "Prepares the model's files", starting: "The engine's process starts",
  loading: "The engine loads the weights", warming: "The engine compiles and warms up", trimming: "Memory that a snapshot need not hold is dropped",
  checkpointing: "The snapshot is written", resuming: "The engine resumes after its snapshot", restoring: "The processes come back from the snapshot",
  waking: "The engine reloads its environment and its weights", verifying: "It repeats a recorded answer, token by token",
  serving: "It answers requests", suspect: "It has been silent for too long and gets no new requests", asleep: "No engine runs",
  standby: "It is frozen with its memory; the next request continues it",
  failed: "The last start, or the engine, has failed", stopped: "It has been stopped for good", draining: "Requests in flight are finished, new ones are refused",
};
const OUTCOMES = {
  forwarded: "Answered by a replica", tunnel: "WebSockets", "client-gone": "The client left before its answer was complete",
  "hold-deadline": "No replica was ready in time", "held-too-many": "Too many requests waited already", "shutting-down": "The proxy was shutting down",
};
const FINE = new Set(["forwarded", "tunnel", "client-gone"]);

// Text

const span = s => s < 60 ? `${Math.floor(s)} s` : s < 3600 ? `${Math.floor(s / 60)} min` : s < 86400 ? `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min` : `${Math.floor(s / 86400)} d ${Math.floor(s % 86400 / 3600)} h`;
const about = s => s < 0.0995 ? `${(s * 1000).toFixed(0)} ms` : s < 10 ? `${s.toFixed(1)} s` : s < 100 ? `${s.toFixed(0)} s` : `${(s / 60).toFixed(s < 600 ? 1 : 0)} min`;
const seconds = s => s < 0.0995 ? `${(s * 1000).toFixed(0)} ms` : s < 10 ? `${s.toFixed(2)} s` : s < 600 ? `${s.toFixed(1)} s` : about(s);
const number = n => n.toLocaleString("en-US");
const count = (n, one) => `${number(n)} ${one}${n === 1 ? "" : "s"}`;
const bytes = n => { const units = ["B", "kB", "MB", "GB", "TB"]; let i = 0; while (n >= 1000 && i < 4) { n /= 1000; i++; } return `${i && n < 10 ? n.toFixed(1) : n.toFixed(0)} ${units[i]}`; };
const capital = s => s.charAt(0).toUpperCase() + s.slice(1);
const tone = phase => phase === "serving" ? "good" : phase === "failed" || phase === "suspect" ? "bad" : STARTING.has(phase) || phase === "draining" ? "wait" : "";
const total = spans => spans.reduce((end, s) => Math.max(end, s.at_s + s.took_s), 0);

// Nodes

function put(node, text) {
  if (node.firstChild === null) node.append("");
  if (node.firstChild.nodeValue !== text) node.firstChild.nodeValue = text;
}
function slots(root) {
  root.slots ??= ["text", "show", "list"].flatMap(kind => [...root.querySelectorAll(`[data-${kind}]`)].map(node => [kind, node.dataset[kind], node]));
  return root.slots;
}
// Write `values` into the data-text slots below `root`, and hide the data-show slots whose value is missing. Lists are left to `list`.
function fill(root, values) {
  for (const [kind, name, node] of slots(root)) {
    if (!(name in values)) continue;
    const value = values[name], missing = value === null || value === "" || value === false;
    if (kind === "text") { put(node, missing ? "" : String(value)); node.hidden = missing; }
    if (kind === "show") node.hidden = missing;
  }
}
// Give `node` one child of `template` per item, by key, and call `update(child, item)`.
function list(node, template, items, key, update) {
  const old = new Map([...node.children].map(child => [child.key, child]));
  items.forEach((item, index) => {
    let child = old.get(key(item));
    if (child === undefined) {
      child = document.getElementById(`${template}-template`).content.firstElementChild.cloneNode(true);
      child.key = key(item);
      slots(child);
    }
    old.delete(child.key);
    if (node.children[index] !== child) node.insertBefore(child, node.children[index] ?? null);
    update(child, item);
  });
  for (const child of old.values()) child.remove();
}
const slot = (root, name) => slots(root).find(([kind, found]) => kind === "list" && found === name)[2];
function hint(node, text) { if (node.title !== text) node.title = text; }
function paint(node, width, phase) {
  node.style.setProperty("width", `${width}%`);
  node.style.setProperty("background", `var(--${phase}, var(--sleep))`);
}
// Run `change`, then select again what was selected: a changed text node loses its part of a selection.
function keepingSelection(change) {
  const s = getSelection(), { anchorNode, anchorOffset, focusNode, focusOffset } = s;
  change();
  if (anchorNode === null || s.isCollapsed && anchorNode === focusNode && anchorOffset === focusOffset) return;
  if (s.anchorOffset === anchorOffset && s.focusOffset === focusOffset && s.anchorNode === anchorNode && s.focusNode === focusNode) return;
  const end = node => node.nodeType === Node.TEXT_NODE ? node.length : node.childNodes.length;
  if (anchorNode.isConnected && focusNode.isConnected) s.setBaseAndExtent(anchorNode, Math.min(anchorOffset, end(anchorNode)), focusNode, Math.min(focusOffset, end(focusNode)));
}

// One pool

// What happens now and next, after the phase's name.
function sentence(pool, phase, replica) {
  const p = pool.progress, usual = pool.usual[p.kind], typical = usual ? about(usual.median_s) : "";
  const starts = pool.woken_by_requests;
  if (STARTING.has(phase)) {
    if (p.expected_s === null) return `: for ${span(replica.seconds_in_phase)}; nothing here starts it`;
    const late = usual && p.elapsed_s > usual.median_s ? `longer than the usual ${typical}` : usual ? `usually ${typical}` : "no start of this kind has been measured yet";
    return `: ${p.step ? `${p.step}, ` : ""}${p.elapsed_s.toFixed(1)} s so far, ${late}`;
  }
  if (phase === "serving") return ` for ${span(replica.seconds_in_phase)}`;
  if (phase === "standby") return ` for ${span(replica.seconds_in_phase)}: the next request continues it${typical ? `, usually ${typical}` : ""}`;
  if (phase === "asleep" || phase === "idle") {
    if (!starts) return ": nothing here starts it; requests wait until it answers";
    return `: the next request ${p.kind === "cold" ? "starts" : "wakes"} it${typical ? `, usually ${typical}` : ""}`;
  }
  if (phase === "failed") {
    if (pool.refused_for_s === null) return ": new requests are refused until it starts again";
    if (pool.refused_for_s > 0) return `: new requests are refused for ${about(pool.refused_for_s)} more, then the next one starts it again`;
    return starts ? `: the next request starts it again${typical ? `, usually ${typical}` : ""}` : ": requests wait until it answers again";
  }
  return "";
}
function shown(pool) {
  const rank = r => r.phase === "serving" ? 2 : STARTING.has(r.phase) ? 1 : 0;
  return pool.replicas.reduce((best, r) => best === null || rank(r) > rank(best) ? r : best, null);
}
function where(replica, doc) {
  const address = replica.address;
  if (!address) return "";
  const here = /^(127\.|localhost|\[?::1|unix:|port )/.test(address);
  const process = replica.pid !== null && !address.includes("process") ? `, process ${replica.pid}` : "";
  return address + process + (here ? ` on ${doc.host}` : "");
}
function memory(replica) {
  if (replica.memory_bytes !== null) return bytes(replica.memory_bytes) + " held";
  if (OFF.has(replica.phase)) return "none: no engine runs";
  return STARTING.has(replica.phase) ? "measured once it serves" : "not known: it was not started from here";
}
function gpu(pool, replica) {
  const names = [...new Set(pool.gpus)].map(name => { const n = pool.gpus.filter(other => other === name).length; return n > 1 ? `${n} × ${name}` : name; }).join(", ");
  const held = replica.gpu_bytes !== null ? `${bytes(replica.gpu_bytes)} held` : names && OFF.has(replica.phase) ? "nothing held" : "";
  const awake = pool.gpu_memory_bytes && replica.gpu_bytes === null ? `${bytes(pool.gpu_memory_bytes)} while awake` : "";
  return [names, held, awake].filter(Boolean).join(", ") || (pool.engine ? "none" : "");
}
function underWay(pool) {
  const r = pool.replicas.find(r => STARTING.has(r.phase));
  return r ? [...r.timeline, { phase: r.phase, at_s: total(r.timeline), took_s: Math.max(r.seconds_in_phase, 0.001) }] : null;
}
function drawStarts(card, pool) {
  const live = underWay(pool), drawn = { ...pool.starts, ...(live ? { now: live } : {}) };
  const kinds = Object.keys(KINDS).filter(kind => drawn[kind] && drawn[kind].length);
  const longest = Math.max(...kinds.map(kind => total(drawn[kind])));
  const fast = pool.usual.restored ?? pool.usual.woken, ratio = fast && pool.usual.cold ? pool.usual.cold.median_s / fast.median_s : 0;
  fill(card, {
    starts: kinds.length > 0,
    startsTitle: kinds.length === 1 && kinds[0] === "now" ? "The first start" : kinds.length === 1 ? "Last start" : "Last starts",
    ratio: ratio > 1 ? `${ratio < 10 ? ratio.toFixed(1) : ratio.toFixed(0)} times faster` : "",
  });
  list(slot(card, "race"), "race", kinds.length > 1 ? kinds : [], kind => kind, (row, kind) => {
    fill(row, { kind: KINDS[kind], took: seconds(total(drawn[kind])) });
    list(slot(row, "lane"), "lane", drawn[kind].map((s, i) => [i, s]), ([i]) => i, (bar, [, s]) => {
      paint(bar, 100 * s.took_s / longest, s.phase);
      hint(bar, `${s.phase} ${seconds(s.took_s)}`);
    });
  });
  list(slot(card, "falls"), "fall", kinds, kind => kind, (fall, kind) => {
    const spans = drawn[kind], end = total(spans) || 1;
    fill(fall, { title: kind === "now" ? `now, ${seconds(end)} so far` : `${KINDS[kind]}, ${seconds(end)}` });
    // A phase that took no time gets no bar.
    const bars = spans.map((s, i) => [i, s]).filter(([, s]) => s.took_s >= 0.0005 || spans.length === 1);
    list(slot(fall, "rows"), "row", bars, ([i]) => i, (row, [, s]) => {
      fill(row, { phase: s.phase, took: seconds(s.took_s) });
      hint(row, PHASES[s.phase] ?? "");
      const bar = row.querySelector("i");
      paint(bar, Math.max(0.5, 100 * s.took_s / end), s.phase);
      bar.style.setProperty("margin-left", `${Math.min(99.5, 100 * s.at_s / end)}%`);
    });
  });
}
function drawPool(card, pool, doc) {
  const replica = shown(pool), phase = doc.draining ? "draining" : replica ? replica.phase : "idle";
  const several = pool.replicas.length > 1, p = pool.progress, one = !several && replica;
  const title = pool.name !== "default" ? pool.name : pool.model || pool.engine || (replica && replica.address) || "engine";
  const failure = pool.last_failure, recent = failure && (pool.refused_for_s !== 0 || replica?.reason.startsWith(failure.code));
  const rising = STARTING.has(phase) && p.expected_s !== null && pool.usual[p.kind] !== undefined;
  const waits = pool.held && phase !== "serving" ? `${count(pool.held, "request")} wait${pool.held === 1 ? "s" : ""} for it` : "";
  fill(card, {
    title, state: phase === "draining" ? "Shutting down" : capital(phase), say: (replica ? sentence(pool, phase, replica) : "") + (waits && `; ${waits}`), bar: rising,
    why: phase !== "failed" && phase !== "suspect" ? "" : recent ? `${failure.code}: ${failure.message}` : replica.reason,
    held: number(pool.held), outstanding: number(pool.outstanding), served: number(pool.replicas.reduce((n, r) => n + r.served, 0)),
    wakes: number(pool.wakes), sleeps: number(pool.sleeps), failed: pool.failed_starts ? number(pool.failed_starts) : "",
    model: pool.model && pool.model !== title ? pool.model : "", engine: pool.engine === title ? "" : pool.engine,
    snapshot: pool.snapshot ? pool.snapshot.name : "", snapshotSize: pool.snapshot && pool.snapshot.bytes ? bytes(pool.snapshot.bytes) : "",
    where: one ? where(replica, doc) : "", memory: one ? memory(replica) : "see its replicas", gpu: one ? gpu(pool, replica) : "",
    sleep: pool.sleep_after_s ? `after ${span(pool.sleep_after_s)} without a request${phase === "serving" && !pool.outstanding && pool.idle_s >= 5 ? `, idle for ${span(pool.idle_s)}` : ""}` : "",
    usual: Object.keys(pool.usual).length > 0, replicas: several,
  });
  const dot = card.querySelector(".state .dot");
  dot.className = `dot ${doc.draining ? "wait" : tone(phase)}`;
  hint(card.querySelector(".state"), PHASES[phase] ?? "");
  if (rising) paint(card.querySelector(".bar i"), Math.min(100, 100 * p.elapsed_s / p.expected_s), phase);
  list(slot(card, "usual"), "usual", Object.keys(KINDS).filter(kind => pool.usual[kind]), kind => kind, (row, kind) => {
    const { median_s, starts } = pool.usual[kind];
    fill(row, { took: seconds(median_s), kind: `${KINDS[kind]}, ${starts > 1 ? `median of ${starts}` : "measured once"}` });
  });
  list(slot(card, "replicas"), "replica", several ? pool.replicas : [], r => r.name, (row, r) => {
    row.querySelector(".dot").className = `dot ${tone(r.phase)}`;
    fill(row, {
      name: r.name, phase: `${r.phase} for ${span(r.seconds_in_phase)}${r.held_back ? ", finishes its requests" : ""}`,
      more: [`${number(r.outstanding)} in flight`, `${number(r.served)} answered`, `memory ${memory(r)}`, r.gpu_bytes !== null ? `GPU ${bytes(r.gpu_bytes)} held` : "", where(r, doc)].filter(Boolean).join(" · "),
    });
  });
  drawStarts(card, pool);
  const state = `${title}: ${phase}`;
  if (card.state !== undefined && card.state !== state) put(document.getElementById("said"), state);
  card.state = state;
}

// The page

const gone = document.getElementById("gone"), form = document.getElementById("sign-in"), proxy = document.getElementById("proxy");
const pools = document.getElementById("pools"), signOut = document.getElementById("sign-out"), header = document.querySelector("header");
slots(gone); slots(form); slots(proxy); slots(header);
let timer = 0, lastAnswer = null, signIn = false;

function draw(doc) {
  list(pools, "pool", doc.pools, pool => pool.name, (card, pool) => drawPool(card, pool, doc));
  const outcomes = Object.entries(doc.outcomes).filter(([name]) => name !== "own").sort((a, b) => b[1] - a[1]);
  const waits = doc.held_seconds.counts.reduce((n, m) => n + m, 0);
  fill(proxy, {
    clients: number(doc.clients), waited: number(doc.held_total), wait: waits ? seconds(doc.held_seconds.sum / waits) : "–", bodies: bytes(doc.held_bytes),
    sent: bytes(doc.bytes_out), none: outcomes.length ? "" : "No request has come yet.",
  });
  list(slot(proxy, "outcomes"), "outcome", outcomes, ([name]) => name, (chip, [name, n]) => {
    fill(chip, { name, count: number(n) });
    chip.className = FINE.has(name) ? "" : "bad";
    hint(chip, OUTCOMES[name] ?? "The code of an error; docs/proxy.md says when it comes");
  });
  const replica = doc.pools.length === 1 ? shown(doc.pools[0]) : null;
  const phase = doc.draining ? "draining" : replica ? replica.phase : doc.pools.some(pool => pool.ready) ? "serving" : "asleep";
  const text = replica ? capital(phase) : `${doc.pools.filter(pool => pool.ready).length} of ${doc.pools.length} serve`;
  const workers = doc.workers ? `, ${doc.workers} workers` : "";
  fill(header, { listens: doc.listens_at, host: `on ${doc.host}`, live: `up ${span(doc.uptime_s)}${workers}` });
  mark(`${text} · quickthaw`, tone(phase));
}
// Set the tab's title and the colour of its mark, and the header's dot.
function mark(title, colour) {
  if (document.title !== title) document.title = title;
  const dot = header.querySelector(".dot"), known = `dot ${colour}`;
  if (dot.className === known) return;
  dot.className = known;
  const fill = getComputedStyle(dot).backgroundColor;
  document.querySelector("link[rel=icon]").href = `data:image/svg+xml,${encodeURIComponent(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="8" cy="8" r="6" fill="${fill}"/></svg>`)}`;
}
function show({ doc, banner, login }) {
  gone.hidden = !banner;
  if (banner) fill(gone, banner);
  document.body.classList.toggle("gone", Boolean(banner));
  if (login !== signIn) {
    signIn = login;
    form.hidden = !login;
    if (login) { pools.replaceChildren(); form.token.focus(); fill(header, { listens: "", host: "", live: "signed out" }); mark("Sign in · quickthaw", ""); }
  }
  if (doc) draw(doc);
  proxy.hidden = login || pools.children.length === 0;
  fill(header, { links: !login });
  signOut.hidden = login || document.body.dataset.signIn !== "true";
}
async function read() {
  let answer;
  try {
    answer = await fetch(`${PREFIX}/status`, { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (answer.ok) {
      const doc = await answer.json();
      lastAnswer = Date.now();
      return { doc, login: false };
    }
  } catch {
    mark("Gone · quickthaw", "bad");
    fill(header, { live: "no answer" });
    const since = lastAnswer ? `Its last answer came ${span((Date.now() - lastAnswer) / 1000)} ago, at ${new Date(lastAnswer).toLocaleTimeString()}; what you see below is from then. ` : "";
    return { banner: { title: "The proxy does not answer", text: `${since}It was stopped or killed, it hangs, or the network between is down. This page asks again every second.` }, login: signIn };
  }
  if (answer.status === 401) return { login: true };
  const error = await answer.json().catch(() => ({}));
  mark("Refused · quickthaw", "bad");
  fill(header, { live: "refused" });
  return { banner: { title: answer.status === 403 ? "This page is not for this client" : `The proxy answers ${answer.status}`, text: error.error?.message ?? "" }, login: false, final: answer.status === 403 };
}
async function tick() {
  clearTimeout(timer);
  const state = await read();
  keepingSelection(() => show(state));
  const starting = state.doc?.pools.some(pool => pool.replicas.some(r => STARTING.has(r.phase)));
  clearTimeout(timer);
  // Who is not signed in, or may not read the page, gets no other answer by asking again.
  if (!state.login && !state.final) timer = setTimeout(tick, document.hidden ? 5000 : starting ? 200 : 1000);
}
form.addEventListener("submit", async event => {
  event.preventDefault();
  fill(form, { why: "" });
  try {
    const answer = await fetch(`${PREFIX}/sign-in`, { method: "POST", body: new URLSearchParams({ token: form.token.value }), signal: AbortSignal.timeout(5000) });
    if (!answer.ok) fill(form, { why: capital((await answer.json()).error.message) + "." });
    else form.reset();
  } catch {
    fill(form, { why: "The proxy does not answer." });
  }
  form.token.select();
  tick();
});
signOut.addEventListener("click", async () => { await fetch(`${PREFIX}/sign-out`, { method: "POST", signal: AbortSignal.timeout(5000) }).catch(() => null); tick(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) tick(); });
fill(form, { why: "" });
fill(header, { listens: "", host: "" });
tick();
