// The official client for Node against a server of the bundled model: its base URL is the only argument.

import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Hello! Who are you?" }];

const answer = await client.chat.completions.create({ model, messages, max_tokens: 30, seed: 1 });
assert.ok(answer.choices[0].message.content);
assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
console.log("chat: ok");

let streamed = "";
for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 30, seed: 1, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(streamed, answer.choices[0].message.content);
console.log("stream: ok");

const schema = {
  type: "object",
  properties: { colour: { type: "string", enum: ["red", "green"] }, size: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["colour", "size"],
  additionalProperties: false,
};
const formed = await client.chat.completions.create({
  model, messages, max_tokens: 100, response_format: { type: "json_schema", json_schema: { name: "thing", strict: true, schema } },
});
const thing = JSON.parse(formed.choices[0].message.content);
assert.ok(["red", "green"].includes(thing.colour) && thing.size >= 1 && thing.size <= 9);
console.log("structured output: ok");

const tools = [{ type: "function", function: { name: "paint", parameters: schema } }];
const stream = client.chat.completions.stream({ model, messages, tools, tool_choice: "required", max_tokens: 100 });
const call = (await stream.finalChatCompletion()).choices[0].message.tool_calls[0];
assert.equal(call.function.name, "paint");
assert.ok(["red", "green"].includes(JSON.parse(call.function.arguments).colour));
console.log("tools: ok");

const text = await client.completions.create({ model, prompt: "Once upon a time", max_tokens: 5, logprobs: 1 });
assert.equal(text.choices[0].logprobs.tokens.join(""), text.choices[0].text);
await assert.rejects(client.chat.completions.create({ model, messages, temperature: -1 }), OpenAI.BadRequestError);
console.log("completions and refusals: ok");
