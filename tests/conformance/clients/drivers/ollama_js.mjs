// Drives the stock ollama package of Node.
import { Ollama } from "ollama";
import { SCHEMA, WEATHER, serve, user } from "./lines.mjs";

const client = (order) => new Ollama({ host: order.url });
const words = (order) => ({
  model: order.model,
  messages: user(order),
  options: { num_predict: order.max_tokens },
});

async function* chat(order) {
  const more = order.do === "schema" ? { format: SCHEMA } : {};
  const answer = await client(order).chat({ ...words(order), ...more });
  yield {
    saw: "answer",
    text: answer.message.content,
    finish: answer.done_reason,
    model: answer.model,
    tokens: answer.eval_count,
  };
}

async function* stream(order) {
  const more = order.do === "tools" ? { tools: [{ type: "function", function: WEATHER }] } : {};
  const pieces = await client(order).chat({ ...words(order), ...more, stream: true });
  let text = "";
  let finish = null;
  let left = order.hang_up_after ?? -1;
  for await (const piece of pieces) {
    finish = piece.done_reason ?? finish;
    if (piece.message.thinking) yield { saw: "thought", text: piece.message.thinking };
    for (const call of piece.message.tool_calls ?? []) {
      yield { saw: "tool", name: call.function.name, arguments: call.function.arguments };
    }
    if (piece.message.content) {
      text += piece.message.content;
      yield { saw: "piece", text: piece.message.content };
      left -= 1;
      if (left === 0) {
        pieces.abort();
        return;
      }
    }
  }
  yield { saw: "answer", text, finish };
}

async function* embed(order) {
  const found = await client(order).embed({ model: order.model, input: ["balu", "7 + 4 = 11"] });
  yield { saw: "vectors", count: found.embeddings.length, width: found.embeddings[0].length };
}

await serve({ chat, schema: chat, stream, tools: stream, reasoning: stream, embed });
