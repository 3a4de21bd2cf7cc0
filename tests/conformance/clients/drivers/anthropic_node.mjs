// Drives the stock @anthropic-ai/sdk.
import Anthropic from "@anthropic-ai/sdk";
import { WEATHER, serve, user } from "./lines.mjs";

const TOOL = { name: WEATHER.name, description: WEATHER.description, input_schema: WEATHER.parameters };
const client = (order) => new Anthropic({ baseURL: order.url, apiKey: "any" });
const patience = (order) => (order.timeout_s ? { timeout: order.timeout_s * 1000 } : {});
const words = (order) => ({ model: order.model, messages: user(order), max_tokens: order.max_tokens });
const textOf = (answer) => answer.content.map((block) => (block.type === "text" ? block.text : "")).join("");

async function* chat(order) {
  const answer = await client(order).messages.create(words(order), patience(order));
  yield {
    saw: "answer",
    text: textOf(answer),
    finish: answer.stop_reason,
    model: answer.model,
    tokens: answer.usage.output_tokens,
  };
}

async function* stream(order) {
  const more = order.do === "tools" ? { tools: [TOOL] } : {};
  const events = client(order).messages.stream({ ...words(order), ...more });
  let left = order.hang_up_after ?? -1;
  for await (const event of events) {
    if (event.type !== "content_block_delta") continue;
    if (event.delta.type === "thinking_delta") yield { saw: "thought", text: event.delta.thinking };
    if (event.delta.type !== "text_delta") continue;
    yield { saw: "piece", text: event.delta.text };
    left -= 1;
    if (left === 0) {
      events.controller.abort();
      return;
    }
  }
  const answer = await events.finalMessage();
  for (const block of answer.content) {
    if (block.type === "tool_use") yield { saw: "tool", name: block.name, arguments: block.input };
  }
  yield { saw: "answer", text: textOf(answer), finish: answer.stop_reason };
}

async function* models(order) {
  for await (const model of client(order).models.list({ limit: 2 })) {
    yield { saw: "model", id: model.id, name: model.display_name, year: new Date(model.created_at).getUTCFullYear() };
  }
  const one = await client(order).models.retrieve(order.model);
  yield { saw: "answer", id: one.id, type: one.type };
}

await serve({ models, chat, stream, tools: stream, reasoning: stream });
