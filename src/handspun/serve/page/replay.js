// Links that give the same answer again. What is behind # in an address is never sent to a server.

import { addMessages, create, toMessages } from "./store.js";

/** Return a link to an answer. before: the messages that it answers. */
export function linkTo(answer, before) {
  const { model, system, seed, start, fingerprint, taken } = answer;
  const messages = toMessages("", before);
  const told = { model, system, options: { ...answer.options, seed: String(seed) }, start, fingerprint, taken, messages };
  return `${location.origin}/#answer=${encodeURIComponent(JSON.stringify(told))}`;
}

/** Return what a link tells, or null if the address is none. Throws an Error if it is damaged. */
export function readLink(hash) {
  if (!hash.startsWith("#answer=")) return null;
  try {
    const { model, system, options, start, fingerprint, taken = 0, messages } = JSON.parse(decodeURIComponent(hash.slice("#answer=".length)));
    const texts = [model, system, fingerprint ?? "", ...Object.values(options)];
    addMessages(create(), messages);
    const areRoles = messages.every(({ role }) => role !== "system");
    const isToken = ({ id, token, logprob, bytes }) =>
      [id, logprob].every(Number.isFinite) && typeof token === "string" && (!bytes || Array.isArray(bytes));
    const areTokens = (start ?? []).every(isToken);
    if (!areRoles || !areTokens || !Number.isInteger(taken) || !texts.every((text) => typeof text === "string")) throw new Error();
    return { model, system, options, start, fingerprint, taken, messages };
  } catch {
    throw new Error("The link is damaged. Copy all of it.");
  }
}
