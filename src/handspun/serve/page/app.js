// The page: conversations on the left, messages in the middle, settings on the right.

import { ask } from "./api.js";
import { receive } from "./answer.js";
import { PairView, withSameSeed } from "./compare.js";
import { sendRow } from "./correct.js";
import { button, byId, element } from "./dom.js";
import { MessageView, Speaker } from "./message.js";
import * as options from "./options.js";
import { readLink } from "./replay.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";

let conversations = [];
let current = store.create();
let models = [];
let running = null; // {controller, node}: the answer that is being received
const views = new Map(); // of the messages that are shown, by their ids
const speaker = new Speaker(byId("spoken"));
const FILLED_AT_ONCE = 4000; // characters at the end of a conversation; the rest is filled when it comes near
const actions = { edit, again, move, goOn, give, correct, forget, adopt, own, before };

// What is shown

function showConversation() {
  const earlier = new Map(views);
  views.clear();
  const places = store.places(current);
  for (const node of store.path(current)) {
    // A long conversation would take long to show again: what is shown already is kept.
    const old = earlier.get(node.id);
    const isSame = old?.node === node && old.place.count === places.get(node).count;
    views.set(node.id, isSame ? old : viewOf(node, places.get(node)));
  }
  const shown = [...views.values()];
  let left = FILLED_AT_ONCE;
  for (let index = shown.length - 1; index >= 0 && left > 0; index--) {
    left -= 100 + shown[index].node.content.length;
    shown[index].fill(running?.node !== shown[index].node);
  }
  place(shown.map((view) => view.root));
  byId("system").value = current.system;
  showList();
  updateControls();
  scrollToEnd();
}

/** Return how a message is shown. An answer with a second model's beside it is shown with that. */
function viewOf(node, place) {
  const second = node.role === "assistant" && current.nodes[node.second];
  return second ? new PairView(node, second, place, actions, () => models) : new MessageView(node, place, actions);
}

/** Show messages: those at the beginning that are shown already are left alone. */
function place(shown) {
  const list = byId("messages");
  let same = 0;
  while (same < shown.length && list.childNodes[same] === shown[same]) same++;
  while (list.childNodes.length > same) list.lastChild.remove();
  list.append(...shown.slice(same));
}

function showList() {
  sidebar.list(conversations, current, { open, rename, remove });
}

function updateControls() {
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  document.title = current.title ? `${current.title} – Handspun` : "Handspun";
  document.body.classList.toggle("empty", current.leaf === null);
}

function say(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

const isAtEnd = () => byId("scroller").scrollHeight - byId("scroller").scrollTop - byId("scroller").clientHeight < 60;
const scrollToEnd = () => (byId("scroller").scrollTop = byId("scroller").scrollHeight);

// Conversations

async function keep() {
  current.title ||= store.titleOf(current);
  await save(current);
}

async function save(conversation) {
  conversation.changed = Date.now();
  if (!conversations.includes(conversation)) conversations.push(conversation);
  await store.save(conversation);
  showList();
}

function open(conversation) {
  current = conversation;
  say("");
  showConversation();
  showSidebar(false);
}

function startNew() {
  open(store.create(current.system));
  byId("prompt").focus();
}

function rename(conversation, title) {
  conversation.title = title;
  return save(conversation);
}

async function remove(conversation) {
  if (conversation === current) stop();
  conversations = conversations.filter((one) => one !== conversation);
  await store.remove(conversation.id);
  if (conversation === current) startNew();
  else {
    showList();
    byId("search").focus();
  }
}

async function importFile(found) {
  for (const conversation of found) await save(conversation);
  if (found.length) open(found[0]);
}

// Messages

function send(text) {
  if (running || !text.trim()) return;
  answerTo(store.add(current, current.leaf, "user", text));
}

function edit(node, content) {
  if (node.results) give(current.nodes[node.parent], content);
  else if (!running) answerTo(store.add(current, node.parent, "user", content));
}

/** Give the results of an answer's calls to the model, which goes on. */
function give(answer, results) {
  if (running) return;
  const node = store.add(current, answer.id, "tool", results.map(({ content }) => content).join("\n\n"));
  node.results = results;
  answerTo(node);
}

/** Keep what the model should have said as a row: on a branch, unless it said just that. */
async function correct(answer, content, calls) {
  const told = (one) => JSON.stringify((one ?? []).map(({ function: called }) => called));
  const isSame = content === answer.content && told(calls) === told(answer.calls);
  const { model, system, options } = answer;
  const node = isSame ? answer : Object.assign(store.add(current, answer.parent, "assistant", content), { model, system: system ?? current.system, options, calls });
  node.isRow = true;
  await saveRow(node, () => sendRow(current, node));
}

async function forget(answer) {
  answer.isRow = false;
  await saveRow(answer);
}

/** Save and show an answer that became a row, or is one no longer. */
async function saveRow(answer, send) {
  const conversation = current;
  await save(conversation);
  await send?.();
  if (send) await save(conversation);
  if (conversation !== current) return;
  views.delete(answer.id);
  showConversation();
  views.get(answer.id)?.focus();
}

function again(node) {
  if (running) return;
  answerTo(current.nodes[node.parent] ?? null);
}

/** Answer again, beginning with tokens of an answer. The rest is drawn as there: options and seed are the same. */
function goOn(answer, tokens) {
  if (running) return;
  const { model, system, seed } = answer;
  const options = { ...answer.options, seed: String(seed) };
  answerTo(own(current.nodes[answer.parent]) ?? null, { model, system, options, start: tokens });
}

/** Take an answer for the conversation's, on a branch of its own. changes: what is another in it, as in its search. */
function adopt(answer, changes) {
  if (running) return;
  const message = own(current.nodes[answer.parent]);
  const node = store.ensure(current, message?.id ?? null, { ...answer, ...changes });
  store.show(current, node);
  showConversation();
  (views.get(node.id).root.querySelector(".take[aria-pressed=true]") ?? byId("prompt")).focus();
  save(current);
}

/** Return a message in the conversation itself: one beside it, of a second model, is copied. */
function own(message) {
  return store.adopt(current, message);
}

/** Show what the address's link holds. The model is only asked once the reader says so. */
function offerLink() {
  const link = readLink(location.hash);
  if (!link) return;
  history.replaceState(null, "", "/");
  const { model, system, options: saved, start, taken, fingerprint: expected, messages } = link;
  const conversation = store.create(system);
  store.addMessages(conversation, messages);
  open(conversation);
  const isServed = models.some(({ id }) => id === model);
  const given = { model: isServed ? model : byId("model").value, system, options: saved, start, taken, expected };
  const text = isServed ? `This link leads to an answer of ${model}.` : `This link leads to an answer of ${model}, which is not served here.`;
  const ask = button("Answer", "Have the model answer", () => answerTo(conversation.nodes[conversation.leaf] ?? null, given));
  byId("messages").append(element("p", { class: "offer row" }, element("span", { class: "grow" }, text), ask));
}

function before(node) {
  return store.path(current, node.parent);
}

function move(node, by) {
  const alternatives = store.siblings(current, node);
  const other = alternatives[alternatives.indexOf(node) + by];
  if (!other) return;
  store.show(current, other);
  showConversation();
  views.get(other.id).focus(by);
  store.save(current);
}

/** Have the model answer a message. given: what is not as the controls say. */
async function answerTo(message, given = {}) {
  say("");
  const conversation = current;
  const node = store.add(conversation, message?.id ?? null, "assistant", "");
  Object.assign(node, { model: byId("model").value, system: current.system, options: options.values(), ...given });
  const answers = [node];
  const other = byId("compare").value;
  if (other && other !== node.model && !given.model) {
    node.options = withSameSeed(node.options);
    const { system, options } = node;
    answers.push(Object.assign(store.addSecond(conversation, node, other), { system, options }));
  }
  running = { controller: new AbortController(), node };
  speaker.restart();
  showConversation();
  keepFocus();
  await keep();
  const onchange = paced(() => {
    if (running?.node !== node) return;
    const follows = isAtEnd();
    views.get(node.id)?.update(false);
    speaker.update(node.content, false);
    if (follows && views.has(node.id)) scrollToEnd();
  });
  const { signal } = running.controller;
  await Promise.all(answers.map((one) => receive(one, store.path(conversation, one.parent), onchange, signal)));
  running = null;
  const follows = isAtEnd();
  views.get(node.id)?.update(true);
  speaker.update(node.content, true);
  updateControls();
  if (follows && views.has(node.id)) scrollToEnd();
  if (conversations.includes(conversation)) await save(conversation);
}

/** Go to the box if the button that had the focus is gone. On a phone that would open its keyboard. */
function keepFocus() {
  if (document.activeElement === document.body && !matchMedia("(pointer: coarse)").matches) byId("prompt").focus();
}

/** Return a function that has something drawn soon. Drawing takes a fourth of the time at most: keys come first. */
function paced(draw) {
  let isAsked = false, pause = 0;
  const run = () => {
    isAsked = false;
    const began = performance.now();
    draw();
    pause = 3 * (performance.now() - began);
  };
  return () => {
    if (isAsked) return;
    isAsked = true;
    if (pause < 16) requestAnimationFrame(run);
    else setTimeout(() => requestAnimationFrame(run), pause);
  };
}

function stop() {
  running?.controller.abort();
}

// Controls

function showSidebar(isOpen) {
  document.body.classList.toggle("with-sidebar", isOpen);
  byId("open-sidebar").setAttribute("aria-expanded", String(isOpen));
}

function showSettings(isOpen) {
  byId("settings").hidden = !isOpen;
  byId("settings-button").setAttribute("aria-expanded", String(isOpen));
  byId(isOpen ? "system" : "settings-button").focus();
}

function fitPrompt() {
  const box = byId("prompt");
  box.rows = Math.min(8, box.value.split("\n").length);
}

function saveOptions() {
  localStorage.setItem("options", JSON.stringify(options.values()));
}

function chooseModel() {
  localStorage.setItem("model", byId("model").value);
  options.showDefaults(models.find((model) => model.id === byId("model").value).defaults);
  for (const option of byId("compare").options) option.disabled = option.value === byId("model").value;
  if (byId("compare").value === byId("model").value) byId("compare").value = "";
}

function connect() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    send(byId("prompt").value);
    byId("prompt").value = "";
    fitPrompt();
  });
  byId("prompt").addEventListener("input", fitPrompt);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("composer").requestSubmit();
    } else if (event.key === "PageUp" || event.key === "PageDown") {
      event.preventDefault();
      byId("scroller").scrollBy({ top: (event.key === "PageUp" ? -0.9 : 0.9) * byId("scroller").clientHeight });
    } else if (event.key === "ArrowUp" && !byId("prompt").value && !running) {
      event.preventDefault();
      views.get(store.path(current).findLast((node) => node.role === "user")?.id)?.edit();
    }
  });
  byId("stop").addEventListener("click", stop);
  byId("new").addEventListener("click", startNew);
  byId("search").addEventListener("input", showList);
  byId("system").addEventListener("change", () => {
    current.system = byId("system").value;
    if (current.leaf) save(current);
  });
  byId("model").addEventListener("change", chooseModel);
  byId("reset-options").addEventListener("click", () => {
    options.fill({});
    saveOptions();
  });
  byId("settings-button").addEventListener("click", () => showSettings(byId("settings").hidden));
  byId("close-settings").addEventListener("click", () => showSettings(false));
  byId("open-sidebar").addEventListener("click", () => showSidebar(true));
  byId("close-sidebar").addEventListener("click", () => showSidebar(false));
  sidebar.connectFiles(() => conversations, importFile, say);
  document.addEventListener("keydown", onKey);
}

function onKey(event) {
  const answer = store.path(current).findLast((node) => node.role === "assistant");
  const shortcuts = {
    KeyN: startNew,
    KeyS: () => showSettings(byId("settings").hidden),
    KeyR: () => answer && again(answer),
    KeyC: () => answer && !running && views.get(answer.id).correct(),
    KeyW: () => answer && !running && views.get(answer.id).focusTokens(),
    Comma: () => answer && move(answer, -1),
    Period: () => answer && move(answer, 1),
  };
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (running) stop();
    else if (!byId("settings").hidden) showSettings(false);
    else showSidebar(false);
  } else if (event.altKey && !event.ctrlKey && !event.metaKey && event.code in shortcuts) {
    event.preventDefault();
    shortcuts[event.code]();
  }
}

async function start() {
  options.build(saveOptions);
  connect();
  try {
    options.fill(JSON.parse(localStorage.getItem("options") ?? "{}"));
    await store.open();
    conversations = await store.load();
    showConversation();
    models = (await ask("/v1/models")).data;
    byId("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
    byId("compare").replaceChildren(new Option("Compare …", ""), ...models.map(({ id }) => new Option(`with ${id}`, id)));
    byId("compare").hidden = models.length < 2;
    const last = localStorage.getItem("model");
    if (models.some(({ id }) => id === last)) byId("model").value = last;
    chooseModel();
    document.body.dataset.ready = "true";
    performance.mark("ready");
    byId("prompt").focus();
    offerLink();
    addEventListener("hashchange", () => {
      try {
        if (!running) offerLink();
      } catch (error) {
        say(error.message);
      }
    });
  } catch (error) {
    say(error.message);
  }
}

start();
