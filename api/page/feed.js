// The stream of snapshots: asked for with the key in a header, which an EventSource could not send; asked for again when it
// breaks, with growing pauses.

const PAUSE_MS = 1000;
const PAUSE_MS_MAX = 10000;
const SILENCE_MS_MAX = 8000; // the gateway says something every second
const ASK_MS_MAX = 10000;

export const store = {
  get key() { return sessionStorage.getItem("warmlane-key") || ""; },
  set key(text) { text ? sessionStorage.setItem("warmlane-key", text) : sessionStorage.removeItem("warmlane-key"); },
};

export function headers() {
  return store.key ? { authorization: `Bearer ${store.key}` } : {};
}

// Asks for JSON; throws an Error with the gateway's own words.
export async function ask(method, path) {
  const answer = await fetch(path, { method, headers: headers(), signal: AbortSignal.timeout(ASK_MS_MAX) });
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.error?.message || `the gateway answered ${answer.status}`);
  return told;
}

// Calls on.snapshot, on.away (Redis does not answer), on.lost (the connection broke; it is tried again by itself), on.trying,
// on.refused (a key is wanted), on.connected, on.paused.
export class Feed {
  constructor(on) { this.on = on; this.pause = PAUSE_MS; this.stop = null; this.timer = 0; }

  again() {
    clearTimeout(this.timer);
    if (this.stop) this.stop.abort();
    this.#follow();
  }

  // Ends the stream until `again`: a browser has six connections to a place, and hidden tabs would hold them all.
  rest() {
    clearTimeout(this.timer);
    const stop = this.stop;
    this.stop = null;
    if (stop) stop.abort();
    this.on.paused();
  }

  async #follow() {
    this.on.trying();
    const stop = this.stop = new AbortController();
    let silence = 0;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => stop.abort("silence"), SILENCE_MS_MAX);
    };
    try {
      heard();
      const answer = await fetch("v1/status/events", { headers: headers(), signal: stop.signal, cache: "no-store" });
      if (answer.status === 401 || answer.status === 403) {
        clearTimeout(silence);
        return this.on.refused((await answer.json().catch(() => ({}))).error?.message || "a key is wanted");
      }
      if (!answer.ok) throw new Error(`the gateway answered ${answer.status}`);
      this.on.connected();
      this.pause = PAUSE_MS;
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) throw new Error("the gateway ended the stream");
        heard();
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        events.forEach((event) => this.#tell(event));
      }
    } catch (trouble) {
      clearTimeout(silence);
      if (stop !== this.stop) return; // somebody else follows by now
      this.on.lost(trouble === "silence" ? "the gateway went silent" : trouble.message || String(trouble));
      this.timer = setTimeout(() => this.#follow(), this.pause);
      this.pause = Math.min(PAUSE_MS_MAX, this.pause * 2);
    }
  }

  #tell(event) {
    let name = "", data = "";
    for (const line of event.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7);
      if (line.startsWith("data: ")) data += line.slice(6);
    }
    if (name === "snapshot") this.on.snapshot(JSON.parse(data));
    if (name === "away") this.on.away(JSON.parse(data).reason);
  }
}
