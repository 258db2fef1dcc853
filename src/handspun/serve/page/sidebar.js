// The list of conversations: search, rename, delete, export, import.

import { button, byId, element, saveFile } from "./dom.js";
import { branchRows, correctedRows, fromText, shownRows, toText } from "./rows.js";

/** Show the conversations that match the search, newest first. actions: open, rename, remove. */
export function list(conversations, current, actions) {
  const wanted = byId("search").value.trim().toLowerCase();
  const found = [...conversations].filter((one) => matches(one, wanted)).sort((a, b) => b.changed - a.changed);
  const focused = document.activeElement.closest("#conversations li")?.dataset.id;
  byId("conversations").replaceChildren(...found.map((one) => row(one, one.id === current.id, actions)));
  if (focused) byId("conversations").querySelector(`[data-id="${CSS.escape(focused)}"] .title`)?.focus();
}

function matches(conversation, wanted) {
  if (!wanted) return true;
  const texts = [conversation.title, ...Object.values(conversation.nodes).map((node) => node.content)];
  return texts.some((text) => text.toLowerCase().includes(wanted));
}

function row(conversation, isCurrent, actions) {
  const title = conversation.title || "New conversation";
  const open = element("button", { class: "title", onclick: () => actions.open(conversation) }, title);
  if (isCurrent) open.setAttribute("aria-current", "true");
  const item = element("li", {}, open);
  item.dataset.id = conversation.id;
  item.append(
    button("✎", `Rename ${title}`, () => rename(item, conversation, actions)),
    button("✕", `Delete ${title}`, () => confirmRemoval(item, conversation, actions)),
  );
  return item;
}

function rename(item, conversation, actions) {
  const box = element("input", { value: conversation.title, "aria-label": "Name of the conversation" });
  const finish = (name) => actions.rename(conversation, name.trim() || conversation.title);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter") finish(box.value);
    if (event.key === "Escape") finish(conversation.title);
    if (event.key === "Enter" || event.key === "Escape") event.stopPropagation();
  });
  item.replaceChildren(box, button("✓", "Rename", () => finish(box.value)));
  box.select();
}

function confirmRemoval(item, conversation, actions) {
  const rows = correctedRows([conversation]).length;
  const about = rows ? `Delete this conversation and its corrected answers (${rows})` : "Delete this conversation";
  const yes = button(rows ? `Delete with ${rows} corrected` : "Delete", about, () => actions.remove(conversation));
  item.replaceChildren(yes, button("Keep", "Keep this conversation", () => actions.open(conversation)));
  yes.focus();
}

/** Connect the buttons for export and import. */
export function connectFiles(conversations, onimport, onerror) {
  byId("export").addEventListener("click", () => showExports(conversations()));
  for (const [name, rows] of Object.entries(EXPORTS)) {
    byId(`export-${name}`).addEventListener("click", () => {
      byId("export-dialog").close();
      saveFile(name === "corrected" ? "corrections.jsonl" : "conversations.jsonl", toText(rows(conversations())));
    });
  }
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async () => {
    const [file] = byId("import-file").files;
    byId("import-file").value = "";
    if (!file) return;
    try {
      await onimport(fromText(await file.text()));
    } catch (error) {
      onerror(`${file.name}: ${error.message}`);
    }
  });
}

const EXPORTS = { shown: shownRows, branches: branchRows, corrected: correctedRows };

function showExports(conversations) {
  for (const [name, rows] of Object.entries(EXPORTS)) {
    const count = rows(conversations).length;
    byId(`export-${name}`).disabled = count === 0;
    byId(`export-${name}-rows`).textContent = count === 1 ? "1 row" : `${count} rows`;
  }
  byId("export-dialog").showModal();
}
