// Correcting an answer: what the model should have said becomes a row to train on.

import { ask } from "./api.js";
import { button, element } from "./dom.js";
import { rowOfAnswer } from "./rows.js";

/**
 * Return an editor of an answer. onsave(content, calls): the text and calls as they should have been. onremove(): the
 * answer is to be a row no longer. onclose(): nothing changes.
 */
export function correctionEditor(node, { onsave, onremove, onclose }) {
  const box = element("textarea", { value: node.content, rows: Math.min(20, Math.max(4, node.content.split("\n").length + 1)), "aria-label": "What the model should have said" });
  const calls = element("textarea", { value: callsText(node.calls), rows: 3, placeholder: '[{"name": "weather", "arguments": {"city": "Oslo"}}]', "aria-label": "Calls of tools that it should have made, as JSON" });
  calls.hidden = !node.calls?.length && !node.options?.tools;
  const error = element("p", { class: "error", role: "alert", hidden: true });
  const save = () => {
    try {
      const made = readCalls(calls.value);
      if (!box.value.trim() && !made.length) throw new Error("The answer is empty. Write what the model should have said.");
      onsave(box.value, made);
    } catch (problem) {
      error.textContent = problem.message;
      error.hidden = false;
    }
  };
  const about = element("p", { class: "meaning" }, "Write what the model should have said. It becomes a branch and a row to train on; Ctrl and Enter save.");
  const remove = node.isRow ? [button("Remove the row", "Do not train on this answer", onremove)] : [];
  const buttons = element("div", { class: "row" }, ...remove, element("span", { class: "grow" }), button("Cancel", "Cancel", onclose), button("Save as a row", "Save as a row to train on", save));
  buttons.lastChild.classList.add("primary");
  const root = element("div", { class: "correction" }, about, box, calls, error, buttons);
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") onclose();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return root;
}

function callsText(calls) {
  if (!calls?.length) return "";
  return JSON.stringify(calls.map(({ function: { name, arguments: text } }) => ({ name, arguments: parsed(text) })), null, 2);
}

function readCalls(text) {
  if (!text.trim()) return [];
  const calls = parsed(text);
  const isCall = (one) => typeof one?.name === "string" && one.arguments?.constructor === Object;
  if (!Array.isArray(calls) || !calls.every(isCall)) throw new Error("The calls are no JSON list of objects with name and arguments. Fix or remove them.");
  return calls.map(({ name, arguments: given }) => ({ id: crypto.randomUUID(), type: "function", function: { name, arguments: JSON.stringify(given) } }));
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

let collects; // whether the server appends rows to a file; asked once

/** Send the row of an answer to the server, if it was started with --collect. What became of it is noted there. */
export async function sendRow(conversation, answer) {
  try {
    collects ??= (await ask("/version")).collects_rows;
    if (!collects) return;
    await ask("/collect", rowOfAnswer(conversation, answer));
    answer.collected = "in the server's file";
  } catch (error) {
    answer.collected = `not in the server's file: ${error.message}`;
  }
}
