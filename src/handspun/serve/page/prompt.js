// What the model reads: the prompt with its template, token by token, and who wrote each.

import { requestFor } from "./answer.js";
import { ask } from "./api.js";
import { element } from "./dom.js";
import { count, moveFocus } from "./tokens.js";

const WRITERS = { template: "template", system: "system", developer: "system", user: "you", assistant: "model", tool: "tool" };

/** Return the prompt of an answer. before: the messages that it answers. */
export function promptView(answer, before) {
  const root = element("div", { class: "panel prompt" }, "Reading …");
  show(root, answer, before).catch((error) => root.replaceChildren(element("p", { class: "error" }, error.message)));
  return root;
}

async function show(root, answer, before) {
  const { model, messages, tools } = requestFor(answer, before);
  const { tokens, pieces, writers } = await ask("/apply-template", { model, messages, tools });
  const details = element("p", { class: "details", role: "status" }, "Point at a token to see its id.");
  const buttons = pieces.map((piece, index) => tokenButton(piece, tokens[index], writers[index], index));
  const list = element("dl", { class: "runs" }, ...runs(buttons, writers));
  const tell = (event) => {
    const place = buttons.indexOf(event.target);
    if (place < 0) return;
    for (const one of buttons) one.classList.toggle("chosen", one === event.target);
    details.textContent = `Token ${place + 1}: ${event.target.getAttribute("aria-label")}`;
  };
  for (const kind of ["pointerover", "focusin", "click"]) list.addEventListener(kind, tell);
  list.addEventListener("keydown", (event) => moveFocus(event, buttons));
  if (buttons.length) buttons[0].tabIndex = 0;
  root.replaceChildren(
    element("h3", {}, `What ${model} reads: ${count(tokens.length)} tokens`),
    element("p", { class: "meaning" }, "Each box is a token. Only the template's tokens begin and end a message: the same text from anyone else is other tokens."),
    details,
    list,
  );
}

/** Return a row per stretch of one writer, named by it. */
function runs(buttons, writers) {
  const rows = [];
  for (const [index, one] of buttons.entries()) {
    if (writers[index] !== writers[index - 1]) {
      const name = WRITERS[writers[index]];
      rows.push(element("div", { class: "run", "data-writer": name }, element("dt", {}, name), element("dd", {})));
    }
    rows.at(-1).lastChild.append(one, ...(one.dataset.breaks ? [element("br")] : []));
  }
  return rows;
}

/** piece: a token's text, or its bytes if it is a part of a character. */
function tokenButton(piece, id, writer, index) {
  const isText = typeof piece === "string";
  const shown = isText ? piece.replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅" : piece.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  const made = element("button", { type: "button", class: "token", tabIndex: -1 }, shown);
  made.setAttribute("aria-label", `${JSON.stringify(isText ? piece : shown)}, id ${id}, ${WRITERS[writer]}`);
  made.dataset.id = id;
  if (isText && piece.endsWith("\n")) made.dataset.breaks = index;
  return made;
}
