// The page: one state, sent by the server whenever it changes, drawn anew. Every text goes through textContent: what a
// model wrote is never markup.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 150, LEFT = 34, BOTTOM = 18, TOP = 14;
const RETRY_MS = 2000;
const SILENCE_MS = 30000; // the server says something every 15 s

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

function drawn(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const share = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(0) + " %");
const number = (value, digits = 1) => (value === null || value === undefined ? "–" : Number(value).toFixed(digits));

// The store speaks UTC; a person reads their own clock.
const local = (stamp) => (stamp ? new Date(stamp).toLocaleString([], { dateStyle: "short", timeStyle: "short" }) : "–");

// ---------------------------------------------------------------- charts
function means(values, width) {
  return values.map((_, place) => {
    const near = values.slice(Math.max(0, place - width + 1), place + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

function niceTop(most) {
  if (!(most > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map((step) => step * unit).find((top) => top >= most);
}

// Where an adapter came or went: before the first answer that is younger.
function markPlaces(points, marks) {
  return marks
    .map((mark) => ({ ...mark, place: points.findIndex((point) => point.at >= mark.at) }))
    .map((mark) => (mark.place < 0 ? { ...mark, place: points.length } : mark))
    .filter((mark) => points.length && mark.at >= points[0].at);
}

function chart(box, points, marks, name, top, label) {
  const width = Math.max(240, box.clientWidth); // in pixels, so that letters keep their size on a phone
  const known = points.map((point, place) => ({ place, value: point[name] })).filter((point) => point.value !== null);
  if (!known.length) return element("p", { class: "quiet" }, "nothing yet");
  top = top || niceTop(Math.max(...known.map((point) => point.value)));
  const x = (place) => LEFT + ((width - LEFT - 6) * (place + 0.5)) / points.length;
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - BOTTOM - TOP) * value) / top;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label });
  for (const part of [0, 0.5, 1]) {
    svg.append(drawn("line", { class: "grid", x1: LEFT, x2: width, y1: y(part * top), y2: y(part * top) }));
    svg.append(drawn("text", { x: LEFT - 5, y: y(part * top) + 4, "text-anchor": "end" }, String(part * top)));
  }
  for (const mark of markPlaces(points, marks)) {
    const at = Math.min(x(mark.place - 0.5), width - 2);
    const line = drawn("line", { class: "mark", x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM });
    line.append(drawn("title", {}, `${mark.event} ${mark.adapter || "none"}: ${mark.reason}`));
    const side = at > width - 60 ? { "text-anchor": "end" } : {};
    svg.append(line, drawn("text", { class: "label", x: at, y: TOP - 4, ...side }, mark.adapter || "none"));
  }
  for (const point of known) {
    const dot = drawn("circle", { cx: x(point.place), cy: y(point.value), r: 2.5 });
    dot.append(drawn("title", {}, `${label}: ${number(point.value, 2)}`));
    svg.append(dot);
  }
  const line = means(known.map((point) => point.value), 10);
  svg.append(drawn("path", { d: line.map((value, n) => `${n ? "L" : "M"}${x(known[n].place)} ${y(value)}`).join("") }));
  const time = (point) => new Date(1000 * point.at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  svg.append(drawn("text", { x: LEFT, y: HEIGHT - 2 }, time(points[0])));
  svg.append(drawn("text", { x: width, y: HEIGHT - 2, "text-anchor": "end" }, time(points.at(-1))));
  return svg;
}

// ---------------------------------------------------------------- parts
function tile(name, value, more, bad) {
  const made = element("div", { class: bad ? "tile bad" : "tile" }, element("small", {}, name), element("b", {}, value));
  if (more) made.append(element("small", {}, more));
  return made;
}

function tiles(status) {
  const { inference, queue, acceptance, failures, adapter, store } = status;
  return [
    tile("inference", inference.state, "", inference.state === "stopped" || inference.state === "failed"),
    tile("tokens per second", number(status.tokens_per_second.rolling), "last 50 answers"),
    tile("acceptance", share(acceptance.rolling), `${share(acceptance.lifetime)} in all`),
    tile("queue", queue.in_flight, `${queue.depth} waiting`),
    tile("adapter", adapter.active || "none", `before it ${adapter.previous || "none"}`),
    tile("failures", failures.pending, `trains at ${failures.trigger}`),
    tile("answers kept", store.generations, `${store.disagreements} disagreements`),
  ];
}

function training(found) {
  const loss = found.loss === null || found.loss === undefined ? "" : `, loss ${found.loss.toFixed(3)}`;
  const of = found.total ? ` of ${found.total}` : "";
  const step = found.state === "idle" || found.state === "stopped" ? found.state : `${found.state}, step ${found.step}${of}${loss}`;
  const now = found.waits ? `${step}; waits: ${found.waits}` : step;
  const last = found.last_verdict;
  return `Now: ${now}.` + (last ? ` Last verdict: ${last.verdict}, ${last.reason} (${local(last.created)}).` : "");
}

function table(heads, rows, texts = []) {
  if (!rows.length) return element("p", { class: "quiet" }, "nothing yet");
  const head = element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name)));
  const cell = (value, place) => element("td", texts.includes(place) ? { class: "text" } : {}, value);
  const body = rows.map((row) => element("tr", {}, ...row.map(cell)));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

function answer(row) {
  const facts = [
    `${row.tokens} tokens`, `${number(row.speed)} per second`, `first after ${number(row.ttft_ms, 0)} ms`,
    `acceptance ${share(row.acceptance)}`, `${row.accepted} of ${row.drafted} guesses in ${row.rounds} rounds`,
    `adapter ${row.adapter || "none"}`, row.finish_reason, local(row.created),
  ];
  return element(
    "article", {},
    element("p", { class: "asked" }, row.asked || row.prompt || "(not kept)"),
    element("p", { class: "output" }, row.output || "(not kept)"),
    element("p", { class: "quiet" }, facts.join(" · ")),
  );
}

function show(state) {
  const { status } = state;
  $("models").textContent = `${status.models.target} drafted by ${status.models.draft || "nothing"}`;
  $("problems").replaceChildren(...status.problems.map((problem) => element("li", {}, problem)));
  $("tiles").replaceChildren(...tiles(status));
  for (const [id, top, label] of [["speed", 0, "Tokens per second"], ["acceptance", 1, "Acceptance"]]) {
    $(id).replaceChildren(chart($(id), state.points, state.marks, id, top, `${label} of the last answers`));
  }
  $("training").textContent = training(status.training);
  $("rollback").disabled = !status.adapter.active && !status.adapter.previous;
  $("answers").replaceChildren(
    ...(state.answers.length ? state.answers.map(answer) : [element("p", { class: "quiet" }, "nothing yet")]),
  );
  $("history").replaceChildren(table(
    ["when", "verdict", "adapter", "agreement before", "after", "examples", "steps", "why"],
    state.history.map((run) => [
      local(run.created), run.verdict, run.adapter || "–", share(run.heldout_before), share(run.heldout_after),
      run.examples, run.steps, run.reason,
    ]),
  ));
  $("costly").replaceChildren(table(
    ["guessed", "said", "times", "sure of the guess", "sure of the word"],
    state.costly.map((row) => [
      JSON.stringify(row.draft_text), JSON.stringify(row.target_text), row.times,
      share(row.draft_confidence), share(row.target_confidence),
    ]), [0, 1],
  ));
}

// ---------------------------------------------------------------- the server
function headers() {
  const token = sessionStorage.getItem("token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function linked(word, kind) {
  $("link").textContent = word;
  $("link").className = `state ${kind}`;
}

// Events of a stream read by hand: EventSource cannot show a token.
class Events {
  constructor(handle) { this.rest = ""; this.handle = handle; }
  take(text) {
    const parts = (this.rest + text).split("\n\n");
    this.rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) this.handle(JSON.parse(part.slice(6)));
  }
}

async function follow() {
  const ending = new AbortController();
  let watch = setTimeout(() => ending.abort(), SILENCE_MS);
  try {
    const response = await fetch("api/events", { headers: headers(), signal: ending.signal });
    $("token-form").hidden = response.status !== 401;
    if (!response.ok) return linked(response.status === 401 ? "token needed" : "refused", "lost");
    const events = new Events(show), decoder = new TextDecoder(), reader = response.body.getReader();
    linked("live", "live");
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return linked("gateway stopped; trying again", "lost");
      clearTimeout(watch);
      watch = setTimeout(() => ending.abort(), SILENCE_MS);
      events.take(decoder.decode(value, { stream: true }));
    }
  } catch {
    linked("gateway not reached; trying again", "lost");
  } finally {
    clearTimeout(watch);
    setTimeout(follow, RETRY_MS);
  }
}

async function command(path, button, question) {
  $("question").textContent = question;
  $("ask").showModal();
  await new Promise((resolve) => $("ask").addEventListener("close", resolve, { once: true }));
  if ($("ask").returnValue !== "yes") return;
  button.disabled = true;
  $("said").textContent = "asked";
  try {
    const response = await fetch(path, {
      method: "POST", body: "{}", headers: { "Content-Type": "application/json", ...headers() },
    });
    const body = await response.json();
    $("said").textContent = body.message || body.error.message;
  } catch {
    $("said").textContent = "the gateway was not reached";
  } finally {
    button.disabled = false;
  }
}

function start() {
  $("train").addEventListener("click", (event) => {
    command("api/train", event.target, "Train an adapter now, on what is stored? Answers may be slower meanwhile.");
  });
  $("rollback").addEventListener("click", (event) => {
    command("api/rollback", event.target, "Go back to the adapter that was active before?");
  });
  $("ask").addEventListener("cancel", () => { $("ask").returnValue = "no"; });
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("token", $("token").value);
    $("token").value = "";
  });
  follow();
}

if (typeof document === "undefined") module.exports = { means, niceTop, markPlaces, Events };
else start();
