// The pieces that the page is made of. Each is built once and then told what is new, so that the focus stays where it is.

import { counted, duration, kept, progress, size, why } from "./words.js";

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Keeps one piece for each item of a list, in the list's order: `build(item)` gives {element, tell(item, context)}.
export class Pieces {
  constructor(parent, key, build) { this.parent = parent; this.key = key; this.build = build; this.found = new Map(); }

  tell(items, context) {
    this.keep(new Set(items.map(this.key))); // first: a piece that is put in anew loses the focus and where it was scrolled to
    let at = this.parent.firstElementChild;
    for (const item of items) {
      const key = this.key(item);
      let piece = this.found.get(key);
      if (!piece) this.found.set(key, piece = this.build(item));
      if (piece.element === at) at = at.nextElementSibling;
      else this.parent.insertBefore(piece.element, at);
      piece.tell(item, context);
    }
  }

  // Takes away the pieces of all other keys.
  keep(keys) {
    for (const [key, piece] of this.found) {
      if (keys.has(key)) continue;
      const beside = piece.element.contains(document.activeElement) && (piece.element.nextElementSibling || piece.element.previousElementSibling);
      piece.element.remove();
      this.found.delete(key);
      if (beside) beside.querySelector("button:enabled")?.focus();
    }
  }
}

function bar(label) {
  const fill = make("span");
  const element = make("span", { class: "bar", role: "img", "aria-label": label }, fill);
  return {
    element,
    tell(part, words) {
      fill.style.width = `${Math.round(Math.max(0, Math.min(1, part)) * 1000) / 10}%`;
      element.setAttribute("aria-label", words);
    },
  };
}

function figures(...names) {
  const list = make("dl", { class: "figures" });
  const cells = {};
  for (const name of names) {
    cells[name] = make("dd");
    list.append(make("dt", {}, name), cells[name]);
  }
  return { element: list, cells };
}

// The last first tokens as a line, and the budget as another: SVG, scaled to what is larger.
function spark() {
  const svg = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const path = svg("path", {}), limit = svg("line", { x1: 0, x2: 100 });
  const element = svg("svg", { class: "spark", viewBox: "0 0 100 30", preserveAspectRatio: "none", role: "img" });
  element.append(limit, path);
  return {
    element,
    tell(times, budget) {
      const top = Math.max(1, ...times) * 1.1;
      const y = (value) => (29 - 28 * Math.min(1, value / top)).toFixed(1);
      const step = 100 / Math.max(1, times.length - 1);
      path.setAttribute("d", times.map((value, i) => `${i ? "L" : "M"}${(i * step).toFixed(1)} ${y(value)}`).join(""));
      limit.toggleAttribute("hidden", !budget || budget > top);
      if (budget) { limit.setAttribute("y1", y(budget)); limit.setAttribute("y2", y(budget)); }
      const slow = times.filter((value) => budget && value > budget).length;
      element.setAttribute("aria-label", times.length
        ? `last ${counted(times.length, "first token")}: ${duration(Math.min(...times))} to ${duration(Math.max(...times))}, ${slow} beyond the budget of ${duration(budget)}`
        : "no first token yet");
    },
  };
}

function actions(act, ...verbs) {
  const element = make("div", { class: "actions" });
  const buttons = verbs.map(([verb, label]) => {
    const button = make("button", { type: "button" }, label);
    button.addEventListener("click", async () => {
      button.disabled = true;
      await act(verb);
      button.disabled = false;
    });
    element.append(button);
    return button;
  });
  return { element, buttons };
}

export function modelCard(model, operate) {
  const title = make("h3"), state = make("span", { class: "state" }), reason = make("p", { class: "why" });
  const { element: list, cells } = figures("first token", "slots", "waiting", "memory", "today");
  const line = spark(), load = bar("load"), first = make("span"), memory = bar("memory"), bytes = make("span");
  load.element.classList.add("progress");
  cells["first token"].append(first, line.element);
  cells.memory.append(bytes, memory.element);
  const act = actions((verb) => operate("models", model.name, verb),
    ["warm", "Warm"], ["unload", "Unload"], ["reset", "Reset"], ["pin", "Pin"]);
  const pin = act.buttons[3];
  const element = make("article", { class: "card", "aria-label": `model ${model.name}` },
    make("div", { class: "head" }, title, state), reason, load.element, list, act.element);
  return {
    element,
    tell(model, { hosts }) {
      say(title, model.label ? `${model.label} (${model.name})` : model.name);
      say(state, model.state + (model.pinned ? ", pinned" : kept(model) ? ", kept warm" : ""));
      state.dataset.state = model.state;
      say(reason, why(model));
      reason.hidden = !reason.textContent;
      const part = progress(model);
      load.element.hidden = part === null;
      if (part !== null) load.tell(part, `${Math.round(part * 100)} % loaded`);
      const budget = duration(model.first_token_budget_ms);
      say(first, model.first_token_ms || model.first_tokens_ms.length ? `${duration(model.first_token_ms)}, budget ${budget}` : `none yet, budget ${budget}`);
      line.tell(model.first_tokens_ms, model.first_token_budget_ms);
      say(cells.slots, `${model.slots_used} of ${model.slots_total} in use`);
      say(cells.waiting, `${model.waiting} of ${model.max_queue}, ${model.running} running`);
      const total = hosts.filter((host) => model.hosts.includes(host.name)).reduce((sum, host) => sum + host.memory_total, 0);
      const headroom = hosts.filter((host) => model.hosts.includes(host.name)).reduce((sum, host) => sum + host.memory_headroom, 0);
      const needs = model.memory_bytes ? size(model.memory_bytes) : model.footprint_bytes ? `none, needs ${size(model.footprint_bytes)}` : "none";
      say(bytes, `${needs}, headroom ${total ? size(headroom) : "not known"}`);
      memory.tell(total ? model.memory_bytes / total : 0, `${size(model.memory_bytes)} of ${size(total)}`);
      const cached = model.cached_share === null ? "" : `, ${Math.round(model.cached_share * 100)} % of prompts cached`;
      say(cells.today, model.judged
        ? `first token in time: ${Math.round((model.in_time_asked / model.judged) * 100)} % from it, ${Math.round((model.in_time_any / model.judged) * 100)} % from any${cached}`
        : `nothing judged yet${cached}`);
      say(pin, model.pinned ? "Unpin" : "Pin");
      act.element.hidden = !operate.allowed;
    },
  };
}

export function hostCard(host, operate) {
  const title = make("h3", {}, host.name), state = make("span", { class: "state" }), note = make("p", { class: "why" });
  const { element: list, cells } = figures("memory", "headroom", "running", "last heard");
  const memory = bar("memory"), bytes = make("span");
  cells.memory.append(bytes, memory.element);
  const heard = cells["last heard"].previousElementSibling;
  let draining = false;
  const act = actions(() => operate("hosts", host.name, draining ? "undrain" : "drain"), ["drain", "Drain"]);
  const element = make("article", { class: "card", "aria-label": `host ${host.name}` },
    make("div", { class: "head" }, title, state), note, list, act.element);
  return {
    element,
    tell(host) {
      const silent = host.silent === true;
      for (const row of list.children) row.hidden = silent && row !== heard && row !== cells["last heard"];
      say(cells["last heard"], `${duration(host.beat_age_ms)} ago`);
      draining = host.draining === true;
      const old = host.policy_unread > 0;
      say(state, silent ? "silent" : old ? "too old" : draining ? "draining" : "up");
      state.dataset.state = silent ? "silent" : old || draining ? "draining" : "warm";
      say(note, silent ? "Its worker sends no heartbeat and did not take its leave."
        : old ? `It takes no work: its version cannot read policy ${host.policy_unread}.` : host.memory_note);
      note.hidden = !note.textContent;
      act.element.hidden = silent || !operate.allowed;
      if (silent) return; // no more is known of it
      const kind = host.memory_source === "gpu" ? " of the GPU" : "";
      say(bytes, host.memory_total ? `${size(host.memory_used)} of ${size(host.memory_total)}${kind} used` : "not known yet");
      memory.tell(host.memory_total ? host.memory_used / host.memory_total : 0, bytes.textContent);
      say(cells.headroom, size(host.memory_headroom));
      say(cells.running, `${counted(host.running, "job")} on ${host.models.join(", ") || "no model"}`);
      say(act.buttons[0], draining ? "Undrain" : "Drain");
    },
  };
}

function tile(job, open) {
  const head = make("b"), age = make("span"), more = make("span");
  const button = make("button", { type: "button", class: "tile", tabindex: "-1" }, head, age, more);
  button.addEventListener("click", () => open(button.dataset.job));
  return {
    element: make("li", {}, button),
    tell(job, { now, named, fresh }) {
      button.dataset.job = job.id;
      const waits = job.position > 0, who = job.caller || "another";
      const deadline = waits ? job.promote_at || job.give_up_at : 0;
      const late = deadline > 0 && deadline < now;
      button.dataset.kind = waits ? (late ? "late" : "waiting") : "running";
      say(head, waits ? `${job.position}. ${who}` : who);
      if (waits) {
        const of = deadline ? ` of ${duration(deadline - job.submitted_at)}` : "";
        say(age, `${duration(now - job.submitted_at)}${of}`);
        say(more, job.first_token_in_ms === null ? "no estimate" : `token in ${duration(job.first_token_in_ms)}`);
      } else {
        say(age, `${job.state} ${duration(now - job.claimed_at)}`);
        say(more, job.first_token_at ? `first after ${duration(job.first_token_at - job.submitted_at)}` : "reads the prompt");
      }
      if (named !== undefined) button.disabled = !job.id;
      if (!fresh) return; // else a reader would hear an age four times a second
      button.setAttribute("aria-label", [
        waits ? `waiting, position ${job.position}` : job.state, who, age.textContent, more.textContent,
        late ? "past its deadline" : "",
      ].filter(Boolean).join(", "));
    },
  };
}

export function laneRow(lane, open) {
  const title = make("h3", {}, lane.name), state = make("span", { class: "quiet" }), where = make("p", { class: "quiet" });
  const full = bar("queue"), list = make("ul", { class: "tiles", "aria-label": `jobs of lane ${lane.name}` }), rest = make("p", { class: "quiet" });
  const tiles = new Pieces(list, (job) => job.key, (job) => tile(job, open));
  const element = make("article", { class: "lane", "aria-label": `lane ${lane.name}` },
    make("div", { class: "head" }, title, state), full.element, where, list, rest);
  list.addEventListener("keydown", (event) => walk(list, event));
  return {
    element,
    tell(lane, context) {
      const oldest = lane.oldest_waiting_ms ? `, the oldest for ${duration(lane.oldest_waiting_ms)}` : "";
      say(state, `${lane.waiting} of ${lane.max_queue} waiting, ${lane.running} running${oldest}`);
      full.tell(lane.max_queue ? lane.waiting / lane.max_queue : 0, `queue budget: ${lane.waiting} of ${lane.max_queue}`);
      const to = lane.fallback
        ? lane.spills_only ? `, spills to ${lane.fallback}` : `, to ${lane.fallback} after ${duration(lane.cold_start_budget_ms)}`
        : "";
      say(where, `${lane.priority}, served by ${lane.model}${to}${lane.retiring ? ", retiring" : ""}`);
      const jobs = lane.jobs.map((job, i) => ({ ...job, key: job.id || `${i}` }));
      tiles.tell(jobs, { ...context, named: true });
      const hidden = lane.waiting + lane.running - jobs.length;
      say(rest, hidden > 0 ? `and ${hidden} more` : "");
      rest.hidden = hidden <= 0;
      list.hidden = !jobs.length;
      if (jobs.length && !list.querySelector("[tabindex='0']:enabled")) stop(list, list.querySelector(".tile:enabled"));
    },
  };
}

// One stop for the Tab key in each lane; arrows, Home and End walk among its tiles.
function stop(list, button) {
  list.querySelectorAll("[tabindex='0']").forEach((other) => other.setAttribute("tabindex", "-1"));
  button?.setAttribute("tabindex", "0");
}

function walk(list, event) {
  const tiles = [...list.querySelectorAll(".tile:enabled")], at = tiles.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tiles.length - 1 }[event.key];
  if (to === undefined || !tiles[to]) return;
  event.preventDefault();
  stop(list, tiles[to]);
  tiles[to].focus();
}
