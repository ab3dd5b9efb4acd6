// The official JavaScript clients against the server at the address of the first argument; its model says REPLY to
// whatever it is asked. Raises on the first difference.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [address, model, key, packages] = process.argv.slice(2);
const installed = createRequire(pathToFileURL(`${packages}/`));
const { default: OpenAI, BadRequestError, NotFoundError, AuthenticationError } = installed("openai");
const { default: Anthropic, ...anthropicErrors } = installed("@anthropic-ai/sdk");

const REPLY = "Bonjour, ça va ?";
const messages = [{ role: "user", content: "Hello" }];

async function openaiChat(client) {
  const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
  assert.equal(whole.choices[0].message.content, REPLY);
  assert.equal(whole.choices[0].finish_reason, "stop");
  let text = "";
  let usage;
  const asked = { model, messages, temperature: 0, stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create(asked)) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, REPLY);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  const final = await client.chat.completions.stream({ model, messages, temperature: 0 }).finalChatCompletion();
  assert.equal(final.choices[0].message.content, REPLY);
}

async function openaiOthers(client) {
  const completion = await client.completions.create({ model, prompt: "Hello", temperature: 0 });
  assert.equal(completion.choices[0].text.trim(), REPLY);
  const models = [];
  for await (const each of await client.models.list()) models.push(each.id);
  assert.deepEqual(models, [model]);
}

async function openaiResponses(client) {
  const whole = await client.responses.create({ model, input: "Hello", store: false });
  assert.equal(whole.output_text, REPLY);
  let text = "";
  const stream = client.responses.stream({ model, input: "Hello" });
  for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
  assert.equal(text, REPLY);
  assert.equal((await stream.finalResponse()).status, "completed");
}

async function openaiErrors(client) {
  await assert.rejects(client.chat.completions.create({ model: "another", messages }), NotFoundError);
  await assert.rejects(client.chat.completions.create({ model, messages, no_such_field: 1 }), (error) => {
    assert.ok(error instanceof BadRequestError);
    assert.equal(error.param, "no_such_field");
    return true;
  });
  const stranger = new OpenAI({ baseURL: `${address}/v1`, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), AuthenticationError);
}

async function anthropicMessages(client) {
  const asked = { model, max_tokens: 30, messages };
  const whole = await client.messages.create(asked);
  assert.equal(whole.content[0].text, REPLY);
  assert.equal(whole.stop_reason, "end_turn");
  const stream = client.messages.stream(asked);
  let text = "";
  stream.on("text", (delta) => (text += delta));
  const final = await stream.finalMessage();
  assert.equal(text, REPLY);
  assert.equal(final.content[0].text, REPLY);
  assert.equal(final.usage.output_tokens, whole.usage.output_tokens);
  assert.ok((await client.messages.countTokens({ model, messages })).input_tokens > 0);
  await assert.rejects(client.messages.create({ ...asked, model: "another" }), anthropicErrors.NotFoundError);
  const stranger = new Anthropic({ baseURL: address, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.messages.create(asked), anthropicErrors.AuthenticationError);
}

const openai = new OpenAI({ baseURL: `${address}/v1`, apiKey: key, maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: address, apiKey: key, maxRetries: 0 });
for (const check of [openaiChat, openaiOthers, openaiResponses, openaiErrors]) await check(openai);
await anthropicMessages(anthropic);
