// Drives the AI SDK through its provider for servers that speak OpenAI's chat, as opencode and Cline do.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embedMany, generateText, jsonSchema, streamText, tool } from "ai";
import { SCHEMA, WEATHER, error, serve } from "./lines.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;

const provider = (order) =>
  createOpenAICompatible({
    name: "warmlane",
    baseURL: `${order.url}/v1`,
    apiKey: "any",
    supportsStructuredOutputs: true,
  });
const words = (order) => ({
  model: provider(order)(order.model),
  prompt: order.prompt ?? "hi",
  maxOutputTokens: order.max_tokens,
});

async function* chat(order) {
  const more = order.do === "schema" ? { output: Output.object({ schema: jsonSchema(SCHEMA) }) } : {};
  const answer = await generateText({ ...words(order), ...more });
  yield {
    saw: "answer",
    text: answer.text,
    finish: answer.finishReason,
    model: answer.response.modelId,
    tokens: answer.usage.outputTokens,
  };
}

async function* stream(order) {
  const hangUp = new AbortController();
  const tools =
    order.do === "tools"
      ? { tools: { weather: tool({ description: WEATHER.description, inputSchema: jsonSchema(WEATHER.parameters) }) } }
      : {};
  const answer = streamText({ ...words(order), ...tools, abortSignal: hangUp.signal, onError: () => {} });
  let text = "";
  let left = order.hang_up_after ?? -1;
  for await (const part of answer.fullStream) {
    if (part.type === "text-delta") {
      text += part.text;
      yield { saw: "piece", text: part.text };
      left -= 1;
      if (left === 0) {
        hangUp.abort();
        return;
      }
    } else if (part.type === "reasoning-delta") {
      yield { saw: "thought", text: part.text };
    } else if (part.type === "tool-call") {
      yield { saw: "tool", name: part.toolName, arguments: part.input };
    } else if (part.type === "error") {
      yield { saw: "error", part: true, ...error(part.error) };
      return;
    } else if (part.type === "finish") {
      yield { saw: "answer", text, finish: part.finishReason };
    }
  }
}

async function* embed(order) {
  const model = provider(order).textEmbeddingModel(order.model);
  const found = await embedMany({ model, values: ["balu", "7 + 4 = 11"] });
  yield { saw: "vectors", count: found.embeddings.length, width: found.embeddings[0].length };
}

await serve({ chat, schema: chat, stream, tools: stream, reasoning: stream, embed });
