// The options of an answer: their fields, what they mean, and what they become in a request.

import { byId, element } from "./dom.js";

const NUMBERS = [
  ["temperature", 0, 2, 0.05, "0 always takes the most probable token; higher is more varied."],
  ["top_p", 0.01, 1, 0.01, "Only the most probable tokens that together reach this probability can be drawn."],
  ["top_k", 0, 1e9, 1, "Only this many of the most probable tokens can be drawn. 0: all."],
  ["min_p", 0, 1, 0.01, "Only tokens with at least this fraction of the best one's probability can be drawn."],
  ["typical_p", 0.01, 1, 0.01, "Only tokens that are about as surprising as expected can be drawn. 1: all."],
  ["repetition_penalty", 0.01, 100, 0.01, "Above 1, tokens that were there before become less likely."],
  ["presence_penalty", -2, 2, 0.1, "Taken once from the score of each token that the answer has."],
  ["frequency_penalty", -2, 2, 0.1, "Taken for each time that the answer has the token."],
  ["no_repeat_ngram_size", 0, 1e9, 1, "So many tokens in a row never come twice. 0: off."],
  ["max_tokens", 1, 1e9, 1, "The answer ends after so many tokens."],
  ["min_tokens", 0, 1e9, 1, "The answer cannot end before so many tokens."],
  ["seed", 0, 2 ** 53 - 1, 1, "The same seed gives the same answer again. Empty: a new one each time."],
  ["num_beams", 1, 16, 1, "Beam search: so many answers are followed at once, and the best is given."],
  ["length_penalty", -50, 50, 0.1, "Of beam search: above 0 favors longer answers, below 0 shorter ones."],
];
const TEXTS = [
  ["stop_strings", "The answer ends before any of these texts, one per line."],
  ["choices", "The answer is one of these texts, one per line."],
  ["json_schema", "The answer is JSON of this schema."],
  ["tools", "Functions that the model may call: a JSON list as OpenAI has it, or of their name, description and parameters."],
];

/** Build the fields. onchange is called after each change. */
export function build(onchange) {
  for (const [name, min, max, step, meaning] of NUMBERS) {
    addField(element("input", { id: name, type: "number", min, max, step: step < 1 ? "any" : step }), meaning, onchange);
  }
  for (const [name, meaning] of TEXTS) addField(element("textarea", { id: name, rows: 2 }), meaning, onchange);
}

function addField(field, meaning, onchange) {
  field.setAttribute("aria-describedby", `${field.id}-meaning`);
  field.addEventListener("change", onchange);
  const label = element("label", { htmlFor: field.id }, field.id.replaceAll("_", " "));
  const about = element("p", { id: `${field.id}-meaning`, class: "meaning" }, meaning);
  const group = element("div", { class: "option" }, label, field, about);
  if (field.tagName === "TEXTAREA") group.classList.add("tall");
  byId("options").append(group);
}

/** Show a model's defaults in the empty fields. */
export function showDefaults(defaults) {
  const known = { presence_penalty: 0, frequency_penalty: 0, ...defaults, min_tokens: defaults.min_new_tokens };
  if (defaults.do_sample === false) known.temperature = 0;
  for (const [name] of NUMBERS) byId(name).placeholder = known[name] ?? "";
}

/** Return what is in the fields, by name, without empty ones. */
export function values() {
  const fields = [...NUMBERS, ...TEXTS].map(([name]) => byId(name));
  return Object.fromEntries(fields.filter((field) => field.value !== "").map((field) => [field.id, field.value]));
}

/** Fill the fields. */
export function fill(saved) {
  for (const [name] of [...NUMBERS, ...TEXTS]) byId(name).value = saved[name] ?? "";
}

/** Return the options as fields of a request. Throws an Error if one is wrong. */
export function toRequest(saved) {
  const request = {};
  for (const [name, min, max] of NUMBERS) {
    if (saved[name] === undefined) continue;
    const value = Number(saved[name]);
    if (!(value >= min && value <= max)) {
      throw new Error(`${name}: ${saved[name]} is out of range (expected ${min} to ${max}). Change it in the settings.`);
    }
    request[name] = value;
  }
  const lines = (text) => text.split("\n").filter((line) => line !== "");
  if (saved.stop_strings) request.stop = lines(saved.stop_strings);
  if (saved.choices) request.structured_outputs = { choice: lines(saved.choices) };
  if (saved.json_schema) {
    request.response_format = { type: "json_schema", json_schema: { name: "answer", schema: schemaOf(saved.json_schema) } };
  }
  const tools = toTools(saved.tools);
  if (tools) request.tools = tools;
  return request;
}

function schemaOf(text) {
  return parsed("json schema", text);
}

function parsed(name, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name}: it is not JSON (${error.message}). Change it in the settings.`);
  }
}

/** Return the tools of the field in OpenAI's form, or null if there are none. Throws an Error if they are none. */
export function toTools(text) {
  if (!text?.trim()) return null;
  const found = parsed("tools", text);
  const tools = Array.isArray(found) ? found : [found];
  if (!tools.every((one) => typeof (one?.function ?? one)?.name === "string")) {
    throw new Error("tools: one of them has no name (expected a list of functions). Change it in the settings.");
  }
  if (!tools.length) return null;
  return tools.map((one) => (one.function ? one : { type: "function", function: one }));
}
