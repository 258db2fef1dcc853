// Conversations, kept in this browser's IndexedDB.
//
// A conversation is a tree of messages: editing or answering again adds a sibling, so nothing is lost.
//   {id, title, changed, system, leaf, nodes: {id: {id, parent, role, content, ...what is known of an answer}}}
// `leaf` is the last message of the branch that is shown.

let database;

/** Open the database. */
export async function open() {
  const opening = indexedDB.open("handspun", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
  database = await result(opening);
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const table = (mode) => database.transaction("conversations", mode).objectStore("conversations");

export const load = () => result(table("readonly").getAll());
export const save = (conversation) => result(table("readwrite").put(conversation));
export const remove = (id) => result(table("readwrite").delete(id));

/** Return an empty conversation. */
export function create(system = "") {
  return { id: crypto.randomUUID(), title: "", changed: Date.now(), system, leaf: null, nodes: {} };
}

/** Add a message behind a parent, show its branch, and return it. */
export function add(conversation, parent, role, content) {
  const node = { id: crypto.randomUUID(), parent, role, content };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  return node;
}

/** Return the messages from the first one to a node (default: those that are shown). */
export function path(conversation, id = conversation.leaf) {
  const nodes = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) nodes.unshift(node);
  return nodes;
}

/** Return a message and its alternatives, oldest first. */
export function siblings(conversation, node) {
  return Object.values(conversation.nodes).filter((other) => other.parent === node.parent);
}

/** Return where each message stands among its alternatives: {index, count}. */
export function places(conversation) {
  const families = Map.groupBy(Object.values(conversation.nodes), ({ parent }) => parent);
  const found = new Map();
  for (const family of families.values()) {
    for (const [index, node] of family.entries()) found.set(node, { index, count: family.length });
  }
  return found;
}

/** Show the branch of a node: from it on, the newest messages. */
export function show(conversation, node) {
  const children = (id) => Object.values(conversation.nodes).filter((other) => other.parent === id);
  let last = node;
  for (let next = children(last.id).at(-1); next; next = children(last.id).at(-1)) last = next;
  conversation.leaf = last.id;
}

/** Return messages as the server and `handspun train` read them. */
export function toMessages(system, nodes) {
  const messages = nodes.map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** Return conversations as JSON lines: the shown branch of each, up to its last answer. */
export function toJsonLines(conversations) {
  return conversations
    .map((conversation) => {
      const nodes = path(conversation);
      while (nodes.length && (nodes.at(-1).role !== "assistant" || !nodes.at(-1).content)) nodes.pop();
      return nodes.length ? JSON.stringify({ messages: toMessages(conversation.system, nodes) }) + "\n" : "";
    })
    .join("");
}

/** Return the conversations of JSON lines. Throws an Error that names the line. */
export function fromJsonLines(text) {
  const lines = text.split(/\r?\n/);
  return lines.flatMap((line, index) => (line.trim() ? [fromRow(line, `line ${index + 1}`)] : []));
}

function fromRow(line, where) {
  let row;
  try {
    row = JSON.parse(line);
  } catch {
    throw new Error(`${where} is not JSON.`);
  }
  if (!Array.isArray(row?.messages)) throw new Error(`${where} has no list "messages".`);
  const conversation = create();
  for (const { role, content } of row.messages) {
    if (typeof content !== "string") throw new Error(`${where}: the content of a message is not text.`);
    if (role === "system" && !conversation.leaf) conversation.system = content;
    else if (role === "user" || role === "assistant") add(conversation, conversation.leaf, role, content);
    else throw new Error(`${where}: messages with the role ${JSON.stringify(role)} cannot be shown.`);
  }
  conversation.title = titleOf(conversation);
  return conversation;
}

/** Return a title: the beginning of the first message. */
export function titleOf(conversation) {
  const text = path(conversation)[0]?.content.replace(/\s+/g, " ").trim() ?? "";
  return text.length > 60 ? `${text.slice(0, 60)}…` : text;
}
