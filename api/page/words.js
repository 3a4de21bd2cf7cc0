// Figures as people read them, and what changed from one snapshot to the next.

export function duration(ms) {
  if (ms < 1000) return `${Math.max(0, Math.round(ms))} ms`;
  if (ms < 10000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 120000) return `${Math.round(ms / 1000)} s`;
  return ms < 7200000 ? `${Math.round(ms / 60000)} min` : `${Math.round(ms / 3600000)} h`;
}

export function size(bytes) {
  if (!(bytes > 0)) return "0 MiB";
  return bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${Math.max(1, Math.round(bytes / 2 ** 20))} MiB`;
}

export function counted(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

export function summary(shown) {
  const warm = shown.models.filter((model) => model.state === "warm").length;
  const waiting = shown.lanes.reduce((sum, lane) => sum + lane.waiting, 0);
  const running = shown.lanes.reduce((sum, lane) => sum + lane.running, 0);
  const oldest = Math.max(0, ...shown.lanes.map((lane) => lane.oldest_waiting_ms));
  const waits = waiting ? `${counted(waiting, "job waits", "jobs wait")}, the oldest for ${duration(oldest)}` : "nobody waits";
  const silent = shown.silent.length ? `, ${counted(shown.silent.length, "host")} silent` : "";
  return `${warm} of ${counted(shown.models.length, "model")} warm, ${running} running, ${waits}${silent}.`;
}

// What to say under a model's name: why it is as it is.
export function why(model) {
  const words = [];
  if (model.simulated) words.push("simulated: its answers mean nothing");
  if (model.state === "waking") {
    if (model.reason) words.push(`${model.reason}, for ${duration(model.state_ms)}`);
    else if (model.progress >= 0) words.push(`${Math.round(model.progress * 100)} % loaded after ${duration(model.state_ms)}`);
    else if (model.load_ms) words.push(`loading for ${duration(model.state_ms)} of about ${duration(model.load_ms)}`);
    else words.push(`loading for ${duration(model.state_ms)}`);
  } else if (model.reason) {
    words.push(model.quarantine_ms ? `${model.reason}, for ${duration(model.quarantine_ms)} more` : model.reason);
  }
  if (model.parallel) words.push(`its runtime runs ${model.parallel} of ${model.max_concurrent} at once`);
  if (model.outside_hours && model.state === "cold") words.push(`kept warm only ${model.outside_hours}`);
  if (model.sessions_on_fallback) words.push(`${counted(model.sessions_on_fallback, "session")} stay on its fallback`);
  if (model.downgraded) words.push(`${model.downgraded} of its last ${model.asked} jobs were served by another model`);
  if (model.slots_settling) words.push(`${counted(model.slots_settling, "slot")} settling after a cancel`);
  if (model.unloaded_ms && model.keep_warm) words.push(`unloaded by hand, not kept warm for ${duration(model.unloaded_ms)}`);
  return words.join("; ");
}

// Whether a model is one that is kept warm now: within its hours, and where there is a host for it.
export function kept(model) {
  return model.keep_warm && !model.outside_hours && model.state !== "absent";
}

// How far a load is, 0..1: by the runtime's own figures, else by how long it takes as a rule; null = nobody can tell.
export function progress(model) {
  if (model.state !== "waking" || model.reason) return null;
  if (model.progress >= 0) return model.progress;
  return model.load_ms ? Math.min(0.99, model.state_ms / model.load_ms) : null;
}

// The sentences of what happened between two snapshots.
export function changes(before, now) {
  const said = [];
  if (!before) return said;
  const models = new Map(before.models.map((model) => [model.name, model]));
  for (const model of now.models) {
    const was = models.get(model.name);
    if (was && was.state !== model.state) {
      said.push(`${model.name} is ${model.state}, was ${was.state}${model.reason ? `: ${model.reason}` : ""}`);
    }
  }
  const hosts = new Set(before.hosts.map((host) => host.name));
  for (const host of now.hosts) if (!hosts.delete(host.name)) said.push(`host ${host.name} is here`);
  const silent = new Set(now.silent.map((host) => host.name));
  for (const gone of hosts) said.push(silent.has(gone) ? `host ${gone} fell silent` : `host ${gone} took its leave`);
  const more = (kind, tell) => {
    for (const [name, count] of Object.entries(now.moves[kind])) {
      const new_ones = count - (before.moves[kind][name] || 0);
      if (new_ones > 0) said.push(tell(new_ones, ...name.split(" ")));
    }
  };
  more("promoted", (count, from, to) => `${counted(count, "job")} promoted from ${from} to ${to}`);
  more("refused", (count, lane, code) => `${counted(count, "request")} refused${lane === "-" ? "" : ` in lane ${lane}`}: ${code}`);
  more("put_back", (count, lane) => `${counted(count, "batch job")} of ${lane} put back for people`);
  if (now.policy_version !== before.policy_version) said.push(`policy version ${now.policy_version} is active`);
  return said;
}
