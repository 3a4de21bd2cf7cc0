// The page: shows each snapshot, and says when what it shows is old. Nothing here guesses what the gateway does.

import { ask, Feed, store } from "./feed.js";
import { hostCard, laneRow, make, modelCard, Pieces, say } from "./parts.js";
import { Timeline } from "./timeline.js";
import { changes, duration, summary } from "./words.js";

const STALE_MS = 3500; // three snapshots missed
const EVENTS_KEPT = 200;
const ABOUT_KEYS = "It stays in this tab. An administrator's key shows whose jobs they are, and may act.";
const HIDDEN_MS = 5000; // a tab that nobody looks at for so long holds no connection
const by = (id) => document.getElementById(id);

let shown = null, receivedAt = 0, trouble = "", hiding = 0;

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

function draw(fresh) {
  const context = { now: now(), hosts: shown.hosts, fresh };
  models.tell(shown.models, context);
  hosts.tell([...shown.silent.map((host) => ({ ...host, silent: true })), ...shown.hosts], context);
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

// The words are read out when they change: what changes all the time stands beside them.
function connection(state, words, age) {
  by("connection").dataset.state = state;
  say(by("connection"), words);
  say(by("age"), age);
}

// Says what is true of the connection, four times a second: live only while snapshots come.
function watch() {
  const age = performance.now() - receivedAt, old = shown !== null && age > STALE_MS;
  document.body.classList.toggle("stale", old);
  const shownAge = shown && (trouble || old) ? `shown is ${duration(age)} old` : "";
  if (trouble) connection("lost", trouble, shownAge);
  else if (old) connection("stale", "stale", shownAge);
  else if (shown) connection("live", "live", "");
  if (shown && !old) draw(false);
}

// Forgets what is shown: it was shown to somebody with another key.
function blank() {
  shown = null;
  for (const pieces of [models, hosts, lanes]) pieces.keep(new Set());
  for (const id of ["summary", "number"]) say(by(id), "–");
  by("event-list").replaceChildren();
  timeline.dialog.close();
}

const feed = new Feed({
  connected() { trouble = ""; rights(); },
  trying() { if (trouble.startsWith("connection lost")) trouble = trouble.replace(/, .*/, ", trying again"); },
  paused() { trouble = "paused while nobody looks"; watch(); },
  snapshot(next) {
    const said = shown && shown.number < next.number ? changes(shown, next) : [];
    shown = next;
    receivedAt = performance.now();
    trouble = "";
    said.forEach(note);
    draw(true);
    watch();
  },
  away(reason) { trouble = `away: ${reason}`; watch(); },
  lost(reason) { trouble = `connection lost (${reason}), tried again in a moment`; watch(); },
  refused(words) { trouble = "no access"; watch(); banner(words); askForKey(words); },
});

function askForKey(words) {
  say(by("ask-key-words"), words || ABOUT_KEYS);
  by("ask-key").returnValue = "";
  if (!by("ask-key").open) by("ask-key").showModal();
}

// Whether the key may act is the gateway's to say: it is asked for something that only an administrator sees.
async function rights() {
  operate.allowed = await ask("GET", "v1/keys").then(() => true, () => false);
}

by("key").addEventListener("click", () => askForKey(""));
by("ask-key").addEventListener("close", () => {
  const said = by("ask-key").returnValue, text = by("key-text").value.trim();
  by("key-text").value = "";
  if (said !== "none" && !(said === "use" && text)) return; // Escape, or nothing typed: the key is as it was
  store.key = said === "use" ? text : "";
  operate.allowed = false;
  banner("");
  blank();
  feed.again();
});
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(() => feed.rest(), HIDDEN_MS);
  else if (!feed.stop) feed.again();
});
setInterval(watch, 250);
feed.again();
