// Conversations, kept in this browser's IndexedDB.
//
// A conversation is a tree of messages: editing or answering again adds a sibling, so nothing is lost.
//   {id, title, changed, system, leaf, nodes: {id: {id, parent, role, content, ...what is known of an answer}}}
// `leaf` is the last message of the branch that is shown. An answer may have `calls` of tools, in OpenAI's form; the
// message after it then has `results`: [{id, name, content}]. `isRow` marks an answer that is to be trained on.
// An answer may have a `second` beside it: another model's, which has `isSecond`, and so has the copy of a message that
// only the second model answers.

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

/** Return all conversations. Tokens of their answers are read once they are asked for. */
export async function load() {
  const conversations = await result(table("readonly").getAll());
  for (const { nodes } of conversations) Object.values(nodes).forEach(unpack);
  return conversations;
}

export const save = (conversation) => result(table("readwrite").put(packed(conversation)));
export const remove = (id) => result(table("readwrite").delete(id));

// A browser copies one long text much faster than the many small objects of an answer's tokens. Typing would wait.
const texts = new WeakMap(); // by lists of tokens, and searches
const unread = { tokens: new WeakMap(), beams: new WeakMap() }; // by messages: what nobody has asked for

function packed(conversation) {
  const nodes = Object.entries(conversation.nodes).map(([id, node]) => [id, packedNode(node)]);
  return { ...conversation, nodes: Object.fromEntries(nodes) };
}

function packedNode(node) {
  const members = Object.keys(node).map((name) => [name, name in unread ? packedMember(node, name) : node[name]]);
  return Object.fromEntries(members);
}

function packedMember(node, name) {
  return unread[name].get(node) ?? (node[name] && textOf(node[name]));
}

function textOf(value) {
  if (!texts.has(value)) texts.set(value, JSON.stringify(value));
  return texts.get(value);
}

function unpack(node) {
  for (const name of Object.keys(unread)) if (typeof node[name] === "string") unpackMember(node, name);
}

function unpackMember(node, name) {
  const text = node[name];
  unread[name].set(node, text);
  const set = (value) => {
    unread[name].delete(node);
    Object.defineProperty(node, name, { value, writable: true, enumerable: true, configurable: true });
    return value;
  };
  const get = () => {
    const value = set(JSON.parse(text));
    texts.set(value, text);
    return value;
  };
  Object.defineProperty(node, name, { get, set, enumerable: true, configurable: true });
}

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
  return Object.values(conversation.nodes).filter((other) => other.parent === node.parent && !other.isSecond);
}

/**
 * Add the answer of a second model beside an answer, and return it. It is no alternative: both are shown together.
 *
 * If the second model also answered before, beside the conversation, then it goes on behind its own answer.
 */
export function addSecond(conversation, answer, model) {
  const { nodes, leaf } = conversation;
  const message = nodes[answer.parent];
  const before = nodes[nodes[message?.parent]?.second];
  let parent = answer.parent;
  if (before?.model === model) {
    message.second ??= Object.assign(add(conversation, before.id, "user", message.content), { isSecond: true }).id;
    parent = message.second;
  }
  const second = Object.assign(add(conversation, parent, "assistant", ""), { model, isSecond: true });
  answer.second = second.id;
  conversation.leaf = leaf;
  return second;
}

const SAME = ["role", "model", "seed", "content", "taken"];

/** Return a message behind a parent that says the same as another one; it is added if there is none. */
export function ensure(conversation, parent, message) {
  const isSame = (one) => one.parent === parent && !one.isSecond && SAME.every((name) => (one[name] || 0) === (message[name] || 0));
  const there = Object.values(conversation.nodes).find(isSame);
  if (there) return there;
  const { id, second, isSecond, ...known } = message;
  return Object.assign(add(conversation, parent, known.role, known.content), { ...known, parent });
}

/** Return a message in the conversation itself: one beside it is copied, with all before it. */
export function adopt(conversation, message) {
  if (!message || !path(conversation, message.id).some(({ isSecond }) => isSecond)) return message;
  const before = adopt(conversation, conversation.nodes[message.parent]);
  return ensure(conversation, before?.id ?? null, message);
}

/** Return where each message stands among its alternatives, and whether any follows it: {index, count, isLast}. */
export function places(conversation) {
  const families = Map.groupBy(Object.values(conversation.nodes), ({ id, parent, isSecond }) => (isSecond ? id : parent));
  const found = new Map();
  for (const family of families.values()) {
    for (const [index, node] of family.entries()) {
      found.set(node, { index, count: family.length, isLast: !families.has(node.id) });
    }
  }
  return found;
}

/** Show the branch of a node: from it on, the newest messages. */
export function show(conversation, node) {
  const children = (id) => Object.values(conversation.nodes).filter((other) => other.parent === id && !other.isSecond);
  let last = node;
  for (let next = children(last.id).at(-1); next; next = children(last.id).at(-1)) last = next;
  conversation.leaf = last.id;
}

/** Return messages as the server and `handspun train` read them. */
export function toMessages(system, nodes) {
  const messages = nodes.flatMap(messagesOf);
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

function messagesOf({ role, content, calls, results }) {
  if (results) return results.map(({ id, name, content }) => ({ role, tool_call_id: id, name, content }));
  return [{ role, content, ...(calls?.length && { tool_calls: calls }) }];
}

/** Add messages in that form behind those that are shown. Throws an Error that says which one cannot be shown. */
export function addMessages(conversation, messages) {
  for (const message of messages) {
    const { role, content, tool_calls: calls } = message;
    const last = conversation.nodes[conversation.leaf];
    if (typeof (content ?? (calls ? "" : null)) !== "string") throw new Error("the content of a message is not text.");
    if (role === "system" && !last) conversation.system = content;
    else if (role === "tool" && (last?.calls || last?.results)) addResult(conversation, last, message);
    else if (role === "user" || role === "assistant") {
      const node = add(conversation, conversation.leaf, role, content ?? "");
      if (calls?.length) node.calls = calls.map(readCall);
    } else throw new Error(`a message with the role ${JSON.stringify(role)} cannot be shown here.`);
  }
}

function readCall({ id, function: called }) {
  if (typeof called?.name !== "string") throw new Error("a call names no function.");
  const { name, arguments: given } = called;
  return { id: String(id ?? crypto.randomUUID()), type: "function", function: { name, arguments: typeof given === "string" ? given : JSON.stringify(given ?? {}) } };
}

/** Results that belong together are one message on the page. */
function addResult(conversation, last, { tool_call_id: id, name, content }) {
  const node = last.results ? last : add(conversation, last.id, "tool", "");
  const calls = conversation.nodes[node.parent].calls;
  node.results ??= [];
  const call = calls.find((one) => one.id === id) ?? calls[node.results.length];
  node.results.push({ id: id ?? call?.id, name: name ?? call?.function.name ?? "", content });
  node.content = node.results.map((one) => one.content).join("\n\n");
}

/** Return a title: the beginning of the first message. */
export function titleOf(conversation) {
  const text = path(conversation)[0]?.content.replace(/\s+/g, " ").trim() ?? "";
  return text.length > 60 ? `${text.slice(0, 60)}…` : text;
}
