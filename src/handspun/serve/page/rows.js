// Conversations as JSON lines: rows that `handspun train` reads, and that are read back.

import * as store from "./store.js";
import { toTools } from "./options.js";

/** Return rows as the text of a file. */
export const toText = (rows) => rows.map((row) => JSON.stringify(row) + "\n").join("");

/** Return the shown branch of each conversation, up to its last answer. */
export function shownRows(conversations) {
  return conversations.flatMap((one) => {
    const nodes = upToAnswer(store.path(one));
    return nodes.length ? [rowOf(one, nodes)] : [];
  });
}

/**
 * Return every branch of each conversation. An answer that several branches share is trained on in the first of them
 * only. `id` and `title` say which rows are one conversation.
 */
export function branchRows(conversations) {
  return conversations.flatMap((one) => {
    const told = new Set();
    return lastOfBranches(one).flatMap((leaf) => {
      const nodes = upToAnswer(store.path(one, leaf.id));
      if (!nodes.length || told.has(nodes.at(-1))) return [];
      const row = { id: one.id, title: one.title, ...rowOf(one, nodes, (node) => told.has(node)) };
      for (const node of nodes) told.add(node);
      return [row];
    });
  });
}

/** The shown branch is the last one, so that it is shown again after an import. */
function lastOfBranches(conversation) {
  const parents = new Set(Object.values(conversation.nodes).map((node) => node.parent));
  const leaves = Object.values(conversation.nodes).filter((node) => !parents.has(node.id));
  return leaves.sort((a, b) => (a.id === conversation.leaf) - (b.id === conversation.leaf));
}

/** Return the rows of the answers that were corrected, or kept as they are. */
export function correctedRows(conversations) {
  return conversations.flatMap((one) => Object.values(one.nodes).filter((node) => node.isRow).map((node) => rowOfAnswer(one, node)));
}

/** Return the row of one answer. The answers before it are context: nobody has said that they are right. */
export function rowOfAnswer(conversation, answer) {
  return rowOf(conversation, store.path(conversation, answer.id), (node) => node !== answer);
}

function rowOf(conversation, nodes, isContext = () => false) {
  const last = nodes.at(-1);
  const messages = store.toMessages(last.system ?? conversation.system, []);
  for (const node of nodes) {
    const mark = node.role === "assistant" && isContext(node) ? { weight: 0 } : {};
    messages.push(...store.toMessages("", [node]).map((message) => ({ ...message, ...mark })));
  }
  const tools = toTools(last.options?.tools);
  return tools ? { messages, tools } : { messages };
}

function upToAnswer(nodes) {
  const last = nodes.findLastIndex((node) => node.role === "assistant" && (node.content || node.calls?.length));
  return nodes.slice(0, last + 1);
}

/** Return the conversations of JSON lines. Throws an Error that names the line. */
export function fromText(text) {
  const conversations = new Map();
  for (const [index, line] of text.split(/\r?\n/).entries()) {
    if (!line.trim()) continue;
    try {
      const row = JSON.parse(line);
      const key = row?.id === undefined ? index : `id ${row.id}`;
      conversations.set(key, addRow(conversations.get(key) ?? store.create(), row));
    } catch (error) {
      throw new Error(`line ${index + 1}: ${error instanceof SyntaxError ? "it is not JSON." : error.message}`);
    }
  }
  return [...conversations.values()];
}

/** Add a row to its conversation: messages that it shares with the rows before are there already. */
function addRow(conversation, row) {
  if (!Array.isArray(row?.messages)) throw new Error('there is no list "messages".');
  const own = store.create();
  store.addMessages(own, row.messages);
  const tools = row.tools && (typeof row.tools === "string" ? row.tools : JSON.stringify(row.tools, null, 2));
  conversation.system = own.system;
  conversation.leaf = null;
  for (const { id, parent, ...node } of store.path(own)) {
    const same = store.siblings(conversation, { parent: conversation.leaf }).find((one) => isSame(one, node));
    if (same) conversation.leaf = same.id;
    else Object.assign(store.add(conversation, conversation.leaf, node.role, node.content), node, node.role === "assistant" && { system: own.system, options: tools ? { tools } : {} });
  }
  conversation.title ||= (typeof row.title === "string" && row.title) || store.titleOf(conversation);
  return conversation;
}

function isSame(one, other) {
  const told = ({ role, content, calls, results }) => JSON.stringify([role, content, calls, results]);
  return told(one) === told(other);
}
