/** Puts the page together: form -> stream of tokens -> figures, token details, heat strip. */

import { EXAMPLES } from "./examples.js";
import { Output, quoted } from "./output.js";
import { Server } from "./server.js";
import { Strip, rowsOf } from "./strip.js";

const TOP_LOGPROBS = 5;
const POLL_MS = 1000;
const MAX_CONTEXT_SPANS = 5000; // prompt tokens shown as text; the strip shows any number

const $ = (id) => document.getElementById(id);
const server = new Server();
const output = new Output($("output"), $("token"), showSelection);
const strip = new Strip($("strip"), $("layers"), showCell);
let features = {}; // what the server offers
let connected; // a promise: the features are known
let running = null; // AbortController of the request under way
let promptTexts = []; // of the prompt's tokens, where the server tells them
let promptLength = 0;
let marks = []; // [first, last] positions of the marked text
let rows = []; // of the strip

async function connect() {
  try {
    features = await server.features();
    setStatus("");
  } catch (error) {
    features = {};
    setStatus(error.message, true);
  }
  $("load").hidden = !features.metrics;
}

function samplingParams() {
  const params = {};
  for (const input of $("form").elements) {
    if (!input.name) continue;
    if (input.type === "number" && input.value !== "") params[input.name] = Number(input.value);
    if (input.type === "checkbox") params[input.name] = input.checked;
  }
  const stop = $("form").elements.stop.value.replaceAll("\\n", "\n");
  return stop ? { ...params, stop: [stop] } : params;
}

function requestBody(text) {
  const body = { text, sampling_params: samplingParams(), return_indexer_topk: $("record").checked };
  if (!features.logprobs) return body;
  const logprobs = { return_logprob: true, return_text_in_logprobs: true };
  return { ...body, ...logprobs, top_logprobs_num: TOP_LOGPROBS };
}

async function run() {
  const text = $("prompt").value;
  running = new AbortController();
  reset();
  const stats = new Stats();
  try {
    await connected;
    promptTexts = features.tokenize ? await server.tokenTexts(text) : [];
    showContext();
    stats.start();
    for await (const event of server.generate(requestBody(text), running.signal)) {
      take(event);
      stats.show(output.tokens.length);
      const reason = event.meta_info.finish_reason;
      if (reason) setStatus(`ended: ${reason.type}`);
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    setStatus(stopped ? "stopped" : error.message, !stopped);
  } finally {
    output.flush();
    running = null;
    $("run").disabled = false;
    $("abort").disabled = true;
  }
}

function reset() {
  output.clear();
  setStatus("");
  $("selection").hidden = true;
  $("run").disabled = true;
  $("abort").disabled = false;
  for (const id of ["ttft", "rate", "count"]) $(id).textContent = "–";
}

/** Show the tokens that an event of the stream brings; its text and ids are all so far. */
function take({ text, output_ids: ids, meta_info: info }) {
  promptLength = info.prompt_tokens;
  const fresh = ids.slice(output.tokens.length);
  const logprobs = info.output_token_logprobs?.slice(-fresh.length) ?? [];
  const tops = info.output_top_logprobs?.slice(-fresh.length) ?? [];
  fresh.forEach((id, i) => {
    const [logprob, , name] = logprobs[i] ?? [];
    const added = i === fresh.length - 1 ? text.slice(output.length) : "";
    const selection = info.indexer_topk?.[i];
    output.push({ id, name, logprob, top: tops[i], selection, text: added });
  });
}

class Stats {
  start() {
    this.sent = performance.now();
    this.first = null;
  }

  show(count) {
    const now = performance.now();
    this.first ??= { time: now, count };
    $("ttft").textContent = `${(this.first.time - this.sent).toFixed(0)} ms`;
    $("count").textContent = count;
    const seconds = (now - this.first.time) / 1000;
    if (seconds > 0) $("rate").textContent = ((count - this.first.count) / seconds).toFixed(1);
  }
}

/** The strip and the shaded prompt for one generated token. */
function showSelection({ selection }, index) {
  $("selection").hidden = !selection;
  if (!selection) return;
  rows = rowsOf(selection);
  const shared = rows.filter((row) => row.source !== undefined).length;
  const chosen = `${rows[0].positions.length} of ${selection.num_keys} positions`;
  $("summary").textContent =
    selection.layers === "all"
      ? `Token ${index + 1}: all ${selection.num_keys} positions, in every layer: ` +
        "the context is not longer than what the indexer may select."
      : `Token ${index + 1}: ${chosen} in each of ${rows.length} layers` +
        (shared ? `; ${shared} of them share the choice of an earlier layer.` : ".");
  strip.show(selection, promptLength + output.tokens.length, promptLength);
  shade();
  tellMark();
}

function shade() {
  const counts = new Map();
  for (const { positions } of rows) {
    for (const position of positions) counts.set(position, (counts.get(position) ?? 0) + 1);
  }
  [...$("context").children].forEach((span, position) => {
    span.style.setProperty("--heat", (counts.get(position) ?? 0) / rows.length);
  });
}

function showContext() {
  const shown = promptTexts.slice(0, MAX_CONTEXT_SPANS);
  $("context").replaceChildren(
    ...shown.map((text, position) => {
      const span = document.createElement("span");
      span.textContent = text;
      span.title = `position ${position}`;
      return span;
    }),
  );
  $("reading").hidden = !shown.length;
  showMark();
}

/** What the strip's cursor is on. */
function showCell(cell) {
  $("context").querySelector(".here")?.classList.remove("here");
  if (!cell) {
    $("cell").textContent = "";
    return;
  }
  const { position, row, selected, layers, source } = cell;
  const texts = [...promptTexts, ...output.tokens.map((token) => token.name ?? token.text)];
  const text = position < texts.length && promptTexts.length ? ` ${quoted(texts[position])}` : "";
  const layer = source === undefined ? `layer ${row}` : `layer ${row} (as layer ${source})`;
  $("cell").textContent =
    `position ${position}${text} · ${layer}: ${selected ? "selected" : "not selected"}` +
    ` · ${layers} of ${$("layers").children.length} layers`;
  $("context").children[position]?.classList.add("here");
}

/** Bracket the prompt's tokens that the marked text touches. */
function showMark() {
  const wanted = $("mark").value;
  marks = wanted ? occurrences(promptTexts, wanted) : [];
  strip.mark(marks);
  [...$("context").children].forEach((span, i) => span.classList.toggle("marked", isMarked(i)));
  tellMark();
}

const isMarked = (position) => marks.some(([first, last]) => first <= position && position <= last);

function tellMark() {
  const where = marks.map(([first, last]) => `${first} to ${last}`).join(", ");
  const touching = rows.filter(({ positions }) => positions.some(isMarked)).length;
  $("marked").textContent =
    where && `positions ${where}: ${touching} of ${rows.length} layers selected there`;
}

/** [first, last] tokens of each place where `wanted` stands in the joined texts. */
function occurrences(texts, wanted) {
  const owners = texts.flatMap((text, token) => Array(text.length).fill(token));
  const joined = texts.join("");
  const found = [];
  for (let at = joined.indexOf(wanted); at >= 0; at = joined.indexOf(wanted, at + 1)) {
    found.push([owners[at], owners[at + wanted.length - 1]]);
  }
  return found;
}

async function poll() {
  if (!features.metrics || document.hidden) return;
  try {
    const values = await server.metrics();
    const usage = values.get("minidsv:kv_cache_usage_perc") ?? 0;
    $("kv-meter").value = usage;
    $("kv").textContent = `${(100 * usage).toFixed(1)} %`;
    $("running").textContent = values.get("minidsv:num_requests_running") ?? "–";
    $("waiting").textContent = values.get("minidsv:num_requests_waiting") ?? "–";
  } catch {
    $("load").hidden = true; // the server is gone or wants another key: connect() shows it again
    features.metrics = false;
  }
}

function setStatus(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function useExample({ prompt, mark }) {
  $("prompt").value = prompt;
  $("mark").value = mark;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) run();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("abort").addEventListener("click", () => running?.abort());
$("mark").addEventListener("input", showMark);
$("key").addEventListener("change", () => {
  server.key = $("key").value;
  connected = connect();
});
for (const button of document.querySelectorAll("[data-example]")) {
  button.addEventListener("click", () => useExample(EXAMPLES[button.dataset.example]));
}
useExample(EXAMPLES.retrieval);
connected = connect();
setInterval(poll, POLL_MS);
