// Drives the stock openai package of Node.
import OpenAI from "openai";
import { SCHEMA, WEATHER, serve, user } from "./lines.mjs";

const client = (order) => new OpenAI({ baseURL: `${order.url}/v1`, apiKey: "any" });
const patience = (order) => (order.timeout_s ? { timeout: order.timeout_s * 1000 } : {});
const words = (order) => ({ model: order.model, messages: user(order), max_tokens: order.max_tokens });

async function* chat(order) {
  const more =
    order.do === "schema"
      ? { response_format: { type: "json_schema", json_schema: { name: "answer", schema: SCHEMA, strict: true } } }
      : {};
  const answer = await client(order).chat.completions.create({ ...words(order), ...more }, patience(order));
  const [choice] = answer.choices;
  yield {
    saw: "answer",
    text: choice.message.content,
    finish: choice.finish_reason,
    model: answer.model,
    tokens: answer.usage?.completion_tokens,
  };
}

async function* stream(order) {
  const more = order.do === "tools" ? { tools: [{ type: "function", function: WEATHER }] } : {};
  const chunks = await client(order).chat.completions.create({ ...words(order), ...more, stream: true });
  let text = "";
  let finish = null;
  let left = order.hang_up_after ?? -1;
  const calls = {};
  for await (const chunk of chunks) {
    for (const choice of chunk.choices) {
      finish = choice.finish_reason ?? finish;
      if (choice.delta.reasoning_content) yield { saw: "thought", text: choice.delta.reasoning_content };
      for (const call of choice.delta.tool_calls ?? []) {
        calls[call.index] ??= { name: "", arguments: "" };
        calls[call.index].name += call.function?.name ?? "";
        calls[call.index].arguments += call.function?.arguments ?? "";
      }
      if (choice.delta.content) {
        text += choice.delta.content;
        yield { saw: "piece", text: choice.delta.content };
        left -= 1;
        if (left === 0) {
          chunks.controller.abort();
          return;
        }
      }
    }
  }
  for (const call of Object.values(calls)) yield { saw: "tool", name: call.name, arguments: JSON.parse(call.arguments) };
  yield { saw: "answer", text, finish };
}

async function* embed(order) {
  const found = await client(order).embeddings.create({ model: order.model, input: ["balu", "7 + 4 = 11"] });
  yield { saw: "vectors", count: found.data.length, width: found.data[0].embedding.length };
}

await serve({ chat, schema: chat, stream, tools: stream, reasoning: stream, embed });
