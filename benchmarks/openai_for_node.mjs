// OpenAI's client for Node over the features of a running server. Prints one line per feature; exits with 1 if one fails.
//
//     npm install openai@7.55.0
//     handspun serve MODEL &
//     node openai_for_node.mjs http://127.0.0.1:8000/v1 [KEY]
//
// Node looks for the package beside this file: copy the file into the folder where the package is installed.

import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL = "http://127.0.0.1:8000/v1", apiKey = "none"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Hi" }];
const sampled = { model, messages, max_tokens: 12, seed: 5 };
const parameters = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters } }];

const features = {
  async "one model"() {
    assert.equal((await client.models.retrieve(model)).id, model);
  },
  async "a stream is the answer in pieces"() {
    const whole = await client.chat.completions.create(sampled);
    let text = "";
    let usage;
    const asked = { ...sampled, stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create(asked)) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },
  async "four choices"() {
    const whole = await client.chat.completions.create({ ...sampled, n: 4 });
    const texts = ["", "", "", ""];
    for await (const chunk of await client.chat.completions.create({ ...sampled, n: 4, stream: true }))
      for (const choice of chunk.choices) texts[choice.index] += choice.delta.content ?? "";
    assert.deepEqual(texts, whole.choices.map((choice) => choice.message.content));
  },
  async "log-probabilities"() {
    const asked = { ...sampled, logprobs: true, top_logprobs: 3 };
    const whole = (await client.chat.completions.create(asked)).choices[0].logprobs.content;
    const rebuilt = (await client.chat.completions.stream(asked).finalChatCompletion().catch((error) => error));
    if (!(rebuilt instanceof Error)) assert.deepEqual(rebuilt.choices[0].logprobs.content, whole);
    for (const one of whole) assert.equal(one.top_logprobs.length, 3);
  },
  async "a streamed call is rebuilt"() {
    const asked = { ...sampled, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 200 };
    const [call] = (await client.chat.completions.create(asked)).choices[0].message.tool_calls;
    const [again] = (await client.chat.completions.stream(asked).finalMessage()).tool_calls;
    assert.deepEqual(again.function.arguments, call.function.arguments);
    assert.equal(again.function.name, "weather");
    assert.ok(again.id);
    assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
  },
  async "a schema is held to"() {
    const response_format = { type: "json_schema", json_schema: { name: "place", strict: true, schema: parameters } };
    const answer = await client.chat.completions.parse({ ...sampled, response_format, max_tokens: 100 });
    assert.ok(["Paris", "Rome"].includes(JSON.parse(answer.choices[0].message.content).city));
  },
  async "completions: echo and log-probabilities"() {
    const asked = { model, prompt: ["Hi", "Give me a"], echo: true, logprobs: 2, max_tokens: 0 };
    const [one, two] = (await client.completions.create(asked)).choices;
    assert.deepEqual([one.text, two.text], asked.prompt);
    assert.equal(one.logprobs.token_logprobs[0], null);
  },
  async "errors are exceptions"() {
    await assert.rejects(client.chat.completions.create({ ...sampled, model: "none" }), OpenAI.NotFoundError);
    await assert.rejects(client.chat.completions.create({ ...sampled, temperature: 3 }), OpenAI.BadRequestError);
  },
  async "a stream that is left"() {
    const stream = await client.chat.completions.create({ ...sampled, max_tokens: 400, stream: true });
    for await (const _ of stream) break;
    assert.ok((await client.chat.completions.create(sampled)).choices);
  },
  async "responses"() {
    const asked = { model, input: "Hi", max_output_tokens: 200, text: {
      format: { type: "json_schema", name: "place", strict: true, schema: parameters } } };
    const { output_text } = await client.responses.create({ ...asked, temperature: 0 });
    const rebuilt = await client.responses.stream({ ...asked, temperature: 0 }).finalResponse();
    assert.equal(rebuilt.output_text, output_text);
  },
};

let failed = 0;
for (const [name, check] of Object.entries(features)) {
  try {
    await check();
    console.log(`passed  ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}: ${error.stack}`);
  }
}
process.exitCode = failed ? 1 : 0;
