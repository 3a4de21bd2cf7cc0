// The talk between a test and a driver, as in lines.py.
import { createInterface } from "node:readline";

export const SCHEMA = {
  type: "object",
  properties: { ok: { type: "boolean" } },
  required: ["ok"],
  additionalProperties: false,
};
export const WEATHER = {
  name: "weather",
  description: "The weather of a city",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};

export const user = (order) => [{ role: "user", content: order.prompt ?? "hi" }];
export const say = (seen) => process.stdout.write(JSON.stringify(seen) + "\n");

export function error(problem) {
  const inner = problem.lastError ?? problem;
  const status = inner.statusCode ?? inner.status ?? inner.status_code ?? null;
  const code = inner.code ?? inner.error?.code ?? inner.data?.error?.code ?? null;
  const type = problem.constructor?.name === "Object" ? "object" : (problem.constructor?.name ?? typeof problem);
  return { type, status, code, message: String(problem.message ?? JSON.stringify(problem)) };
}

export async function serve(deeds) {
  for await (const line of createInterface({ input: process.stdin })) {
    const order = JSON.parse(line);
    try {
      for await (const seen of deeds[order.do](order)) say(seen);
    } catch (problem) {
      say({ saw: "error", ...error(problem) });
    }
    say({ saw: "end" });
  }
}
