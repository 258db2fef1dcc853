// One answer: asks for it, and notes in its message what comes.

import { stream } from "./api.js";
import { startSearch, withIds } from "./beams.js";
import { toMessages } from "./store.js";
import { toRequest } from "./options.js";

/** Return the body of a request for an answer. */
export function requestFor(answer, before) {
  return {
    model: answer.model,
    messages: toMessages(answer.system, before),
    ...toRequest(answer.options),
  };
}

/**
 * Fill a message with the model's answer.
 *
 * answer: a message with model, system, options, and perhaps start, its first tokens. before: the messages that it
 * answers. onchange: called whenever more is known. signal: ends it; what came until then stays.
 */
export async function receive(answer, before, onchange, signal) {
  const start = answer.start ?? [];
  Object.assign(answer, { content: textOf(start), tokens: [], calls: [], finish: null, error: null });
  const ids = start.map(({ id }) => id);
  const tokens = [];
  const search = startSearch(answer);
  let first, last;
  try {
    const body = {
      ...requestFor(answer, before),
      stream: true,
      stream_options: { include_usage: true },
      return_token_ids: true,
      logprobs: true,
      ...(start.length && { answer_token_ids: ids.slice() }),
      ...search?.fields,
    };
    for await (const event of stream("/v1/chat/completions", body, signal)) {
      if (event.handspun) answer.seed = event.handspun.seed;
      answer.fingerprint = event.system_fingerprint;
      if (event.usage) answer.usage = event.usage;
      const [choice] = event.choices;
      if (!choice) continue;
      if (search && !search.push(choice)) {
        onchange();
        continue;
      }
      answer.content += choice.delta.content ?? "";
      for (const { index, ...call } of choice.delta.tool_calls ?? []) answer.calls[index] = call;
      ids.push(...(choice.token_ids ?? []));
      tokens.push(...(choice.logprobs?.content ?? []));
      if (choice.token_ids?.length) {
        last = performance.now();
        first ??= { at: last, tokens: ids.length };
      }
      answer.finish = choice.finish_reason ?? answer.finish;
      onchange();
    }
  } catch (error) {
    if (signal.aborted) answer.finish = "stopped";
    else answer.error = error.message;
  }
  answer.tokens = [...start, ...withIds(tokens, ids.slice(start.length))];
  answer.count = ids.length;
  if (search) answer.beams = { ...answer.beams }; // what is kept is written down once
  if (first && ids.length > first.tokens) answer.rate = (1000 * (ids.length - first.tokens)) / (last - first.at);
}

/** Return the text of tokens. The bytes of half a character at the end are left out, as the server does. */
export function textOf(tokens) {
  const bytes = tokens.flatMap((one) => one.bytes ?? [...new TextEncoder().encode(one.token)]);
  return new TextDecoder().decode(new Uint8Array(bytes), { stream: true });
}

/** Return what is known of an answer, in words. */
export function facts(answer) {
  const found = [];
  if (answer.rate) found.push(`${answer.rate.toFixed(1)} tokens per second`);
  if (answer.count) found.push(`${answer.count} ${answer.count === 1 ? "token" : "tokens"}`);
  if (answer.usage) {
    const cached = answer.usage.prompt_tokens_details.cached_tokens;
    found.push(`prompt ${answer.usage.prompt_tokens}${cached ? `, ${cached} of them cached` : ""}`);
  }
  if (answer.seed !== undefined) found.push(`seed ${answer.seed}`);
  if (answer.expected && answer.expected !== answer.fingerprint) found.push("not the model or server of the link");
  if (answer.finish === "length") found.push("ended at the limit of tokens");
  if (answer.finish === "stopped") found.push("stopped");
  if (answer.isRow) found.push("a row to train on");
  if (answer.isRow && answer.collected) found.push(answer.collected);
  return found.join(" · ");
}
