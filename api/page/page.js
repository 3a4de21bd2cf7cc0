// The page: shows each snapshot, and says when what it shows is old. Nothing here guesses what the gateway does.

import { ask, Feed, store } from "./feed.js";
import { hostCard, laneRow, make, modelCard, Pieces, say } from "./parts.js";
import { Timeline } from "./timeline.js";
import { changes, duration, summary } from "./words.js";

const STALE_MS = 3500; // three snapshots missed
const EVENTS_KEPT = 200;
const by = (id) => document.getElementById(id);

let shown = null, receivedAt = 0, trouble = "";

// The gateway's clock, as the last snapshot told it; it stands still while what is shown is old.
function now() {
  return shown ? shown.at_ms + Math.min(STALE_MS, performance.now() - receivedAt) : 0;
}

function banner(words) {
  say(by("banner"), words);
  by("banner").hidden = !words;
}

async function operate(kind, name, verb) {
  const model = shown.models.find((one) => one.name === name);
  if (verb === "pin" && model?.pinned) verb = "unpin";
  try {
    await ask("POST", `v1/${kind}/${encodeURIComponent(name)}/${verb}`);
    note(`${verb} ${name}: asked for from this page`);
    banner("");
  } catch (problem) {
    banner(`${verb} ${name}: ${problem.message}`);
  }
}
operate.allowed = false;

const timeline = new Timeline();
const open = (id) => timeline.open(id, () => ({ now: now(), at: shown.at_ms, models: shown.models }));
const models = new Pieces(by("model-cards"), (model) => model.name, (model) => modelCard(model, operate));
const hosts = new Pieces(by("host-cards"), (host) => host.name, (host) => hostCard(host, operate));
const lanes = new Pieces(by("lane-rows"), (lane) => lane.name, (lane) => laneRow(lane, open));

function note(words) {
  const at = new Date(now() || Date.now());
  by("event-list").prepend(make("li", {}, make("time", { datetime: at.toISOString() }, at.toLocaleTimeString()), words));
  while (by("event-list").children.length > EVENTS_KEPT) by("event-list").lastElementChild.remove();
}

function draw() {
  const context = { now: now(), hosts: shown.hosts };
  models.tell(shown.models, context);
  hosts.tell(shown.hosts, context);
  by("hosts-empty").hidden = shown.hosts.length > 0;
  const own = new Set(shown.models.map((model) => model.name));
  const told = shown.lanes.filter((lane) => own.has(lane.name) || lane.waiting || lane.running || lane.retiring);
  lanes.tell(told, context);
  const quiet = shown.lanes.filter((lane) => !told.includes(lane)).map((lane) => lane.name);
  say(by("lanes-empty"), `Empty: ${quiet.join(", ")}.`);
  by("lanes-empty").hidden = !quiet.length;
  say(by("summary"), summary(shown));
  say(by("number"), String(shown.number));
}

function connection(state, words) {
  by("connection").dataset.state = state;
  say(by("connection"), words);
}

// Says what is true of the connection, four times a second: live only while snapshots come.
function watch() {
  const age = performance.now() - receivedAt, old = shown !== null && age > STALE_MS;
  document.body.classList.toggle("stale", old);
  if (trouble) connection("lost", shown ? `${trouble}; shown is ${duration(age)} old` : trouble);
  else if (old) connection("stale", `stale: shown is ${duration(age)} old`);
  else if (shown) connection("live", "live");
  if (shown && !old) draw();
}

const feed = new Feed({
  connected() { trouble = ""; },
  snapshot(next) {
    const said = shown && shown.number < next.number ? changes(shown, next) : [];
    shown = next;
    receivedAt = performance.now();
    trouble = "";
    said.forEach(note);
    draw();
    watch();
  },
  away(reason) { trouble = `away: ${reason}`; watch(); },
  lost(reason, pause) { trouble = `connection lost (${reason}), next try in ${duration(pause)}`; watch(); },
  refused(words) { trouble = "no access"; watch(); banner(words); askForKey(words); },
});

function askForKey(words) {
  if (words) say(by("ask-key-words"), words);
  if (!by("ask-key").open) by("ask-key").showModal();
}

// Whether the key may act is the gateway's to say: it is asked for something that only an administrator sees.
async function rights() {
  operate.allowed = await ask("GET", "v1/keys").then(() => true, () => false);
}

by("key").addEventListener("click", () => askForKey(""));
by("ask-key").addEventListener("close", () => {
  store.key = by("ask-key").returnValue === "use" ? by("key-text").value.trim() : "";
  by("key-text").value = "";
  banner("");
  rights().finally(() => feed.again());
});
setInterval(watch, 250);
rights().finally(() => feed.again());
