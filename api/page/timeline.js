// A job's life, as its record tells it, in a dialog.

import { ask } from "./feed.js";
import { make, say } from "./parts.js";
import { duration } from "./words.js";

const LOOK_EVERY_MS = 1000;
const ENDED = ["done", "failed", "cancelled", "expired"];
const by = (id) => document.getElementById(id);

// The steps of a job: [what, from, until], instants in ms; until 0 = it goes on. In another lane, or after an attempt that
// came to nothing, it waits anew. Its claim noted when the model had woken; while it waits, the model tells.
export function steps(job, model) {
  const found = [], begins = Math.max(job.submitted_at, job.not_before);
  if (job.not_before > job.submitted_at) found.push(["scheduled", job.submitted_at, job.state === "scheduled" ? 0 : job.not_before]);
  if (job.state === "scheduled") return found;
  const since = Math.max(begins, job.promoted_at, job.requeued_at), waits = job.state === "queued";
  const claimed = !waits && job.claimed_at >= since ? job.claimed_at : 0, waitsUntil = claimed || job.ended_at;
  if (since > begins) found.push([job.requeued_at > job.promoted_at ? "earlier attempts" : "waited in another lane", begins, since]);
  const woke = claimed ? job.woke_at : waits ? model?.woke_at || 0 : 0;
  if (woke > since) {
    found.push(["model woke", since, woke], ["waited", woke, waitsUntil]);
  } else {
    found.push(["waited", since, waitsUntil]);
  }
  if (!claimed) return found;
  const first = job.first_token_at && Math.max(job.first_token_at, claimed); // an answer that is gone on from had its first before
  found.push(["read the prompt", claimed, first || job.ended_at]);
  if (first) found.push(["answered", first, job.ended_at]);
  return found;
}

function when(at, now) {
  if (!at) return "";
  return at > now ? `in ${duration(at - now)}` : `${duration(now - at)} ago`;
}

export class Timeline {
  constructor() {
    this.dialog = by("job");
    this.timer = 0;
    by("job-close").addEventListener("click", () => this.dialog.close());
    by("job-cancel").addEventListener("click", () => this.#cancel());
    this.dialog.addEventListener("close", () => { clearInterval(this.timer); this.id = ""; });
  }

  open(id, context) {
    this.id = id;
    this.context = context;
    say(by("job-title"), `Job ${id}`);
    say(by("job-words"), "Asking …");
    say(by("job-trouble"), "");
    by("job-steps").replaceChildren();
    by("job-facts").replaceChildren();
    this.dialog.showModal();
    this.#look();
    this.timer = setInterval(() => this.#look(), LOOK_EVERY_MS);
  }

  async #look() {
    const id = this.id;
    try {
      const job = await ask("GET", `v1/jobs/${id}`);
      if (id !== this.id) return;
      this.#show(job);
      if (ENDED.includes(job.state)) clearInterval(this.timer);
    } catch (trouble) {
      if (id === this.id) say(by("job-words"), `It cannot be shown: ${trouble.message}.`);
    }
  }

  async #cancel() {
    try {
      this.#show(await ask("DELETE", `v1/jobs/${this.id}`));
    } catch (trouble) {
      say(by("job-trouble"), trouble.message);
    }
  }

  #show(job) {
    const { now, models } = this.context();
    const model = models.find((one) => one.name === job.model), until = job.ended_at || now;
    const all = Math.max(1, until - job.submitted_at);
    const wait = job.wait ? `, ${job.wait.ahead} before it, ${job.wait.model} is ${job.wait.model_state}${job.wait.reason ? ` (${job.wait.reason})` : ""}` : "";
    say(by("job-words"), `${job.state}${job.error ? `: ${job.error.message}` : ""}${wait}, ${duration(all)} since it was submitted.`);
    by("job-steps").replaceChildren(...steps(job, model).map(([what, from, to]) => {
      const fill = make("span"), length = Math.max(0, (to || until) - from);
      fill.style.marginLeft = `${Math.min(99, ((from - job.submitted_at) / all) * 100)}%`;
      fill.style.width = `${Math.max(1, (length / all) * 100)}%`;
      return make("li", {}, make("span", {}, what), make("span", {}, duration(length)), make("span", { class: "bar", "aria-hidden": "true" }, fill));
    }));
    const waits = job.state === "queued";
    const facts = {
      caller: job.caller, lane: job.lane, "asked for": job.asked, spilled: job.spilled, "served by": job.served_by, endpoint: job.endpoint,
      priority: job.priority, attempt: job.attempt, promotions: job.promotions, "put back": job.put_backs, losses: job.losses,
      "prompt tokens": job.tokens,
      "cold-start deadline": waits ? when(job.promote_at, now) : "",
      "gives up": waits ? when(job.give_up_at, now) : "",
    };
    by("job-facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value).flatMap(
      ([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
    by("job-cancel").hidden = ENDED.includes(job.state);
  }
}
