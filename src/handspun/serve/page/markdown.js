// Markdown of a model, as elements. markdown-it parses it, DOMPurify keeps only harmless elements.

import MarkdownIt from "./vendor/markdown-it.mjs";
import DOMPurify from "./vendor/purify.mjs";
import { copyButton, element } from "./dom.js";

const parser = new MarkdownIt({ html: false, linkify: true, breaks: false }).disable("image");
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
// An item would change its form if a later one of its list has a blank line. Then a long list could not grow item by item.
parser.core.ruler.push("paragraphs_in_items", ({ tokens }) => {
  for (const token of tokens) if (token.type.startsWith("paragraph_")) token.hidden = false;
});

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong s a".split(" "),
    ..."table thead tbody tr th td".split(" "),
  ],
  ALLOWED_ATTR: ["href", "class", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  RETURN_DOM_FRAGMENT: true,
};

/** Return the elements of a Markdown text. */
export function render(text) {
  const fragment = DOMPurify.sanitize(parser.render(text), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) showTarget(link);
  for (const block of fragment.querySelectorAll("pre")) addCopyButton(block);
  for (const table of fragment.querySelectorAll("table")) {
    const frame = element("div", { class: "table", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

function showTarget(link) {
  link.removeAttribute("class");
  if (!link.hasAttribute("href")) return;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  link.title = link.href;
  // The text may name another address than the one that it leads to.
  if (link.textContent !== link.getAttribute("href")) {
    link.after(element("span", { class: "target" }, ` (${link.host || link.href})`));
  }
}

function addCopyButton(block) {
  const code = block.querySelector("code");
  const language = code?.className.match(/^language-([\w+#.-]{1,20})$/)?.[1] ?? "text";
  code?.removeAttribute("class");
  const copy = copyButton("Copy", "Copy this code", () => block.textContent);
  block.tabIndex = 0; // a wide block is scrolled by keyboard
  const frame = element("div", { class: "code" }, element("div", { class: "row" }, element("span", {}, language), copy));
  block.replaceWith(frame);
  frame.append(block);
}

/**
 * Shows a text that grows. Only its last block is rendered again, and of a list only its last item, so that long
 * answers stay fast.
 */
export class GrowingMarkdown {
  constructor(container) {
    this.container = container;
    this.restart();
  }

  restart() {
    this.finished = 0; // characters of blocks and items that no longer change
    this.changing = []; // nodes of what comes after them
    this.list = null; // the list whose next item begins there
    this.code = null; // {text, node}: the code block that is all of it
    this.isGrowing = false;
  }

  update(text) {
    if (!this.isGrowing) this.container.replaceChildren();
    this.isGrowing = true;
    const rest = text.slice(this.finished);
    const blocks = parser.parse(rest, {}).filter((token) => token.map && token.nesting >= 0);
    if (this.growsCode(blocks)) return;
    const { cut, isItem } = lastBeginning(rest, blocks);
    for (const node of this.changing) node.remove();
    if (cut > 0) {
      this.place(rest.slice(0, cut));
      this.finished += cut;
      this.list = isItem ? this.last : null;
    }
    this.changing = this.place(rest.slice(cut));
    this.watchCode(cut > 0 ? parser.parse(rest.slice(cut), {}) : blocks);
  }

  /** Append what a text renders to, and return its nodes. Items of the list that is open join it. */
  place(text) {
    const fragment = render(text);
    const goesOn = this.list && fragment.firstElementChild?.tagName === this.list.tagName;
    const items = goesOn ? [...fragment.firstElementChild.childNodes] : [];
    if (goesOn) {
      fragment.firstElementChild.remove();
      this.list.append(...items);
    }
    this.last = fragment.lastElementChild ?? this.list;
    const nodes = [...fragment.childNodes];
    this.container.append(fragment);
    return [...items, ...nodes];
  }

  /** Remember the block's node if it is one block of code, which may become long. */
  watchCode(blocks) {
    const [block] = blocks;
    const node = blocks.length === 1 && block.type === "fence" && this.last?.querySelector("code")?.firstChild;
    this.code = node ? { text: block.content, node } : null;
  }

  /** Append to a block of code. Returns false if something else has to be done. */
  growsCode(blocks) {
    const [block] = blocks;
    if (!this.code || blocks.length !== 1 || block.type !== "fence" || !block.content.startsWith(this.code.text)) return false;
    this.code.node.appendData(block.content.slice(this.code.text.length));
    this.code.text = block.content;
    return true;
  }

  /** Show a text that no longer grows. A reference at its end may belong to a link at its beginning. */
  finish(text) {
    if (!this.finished || /^[\s>*+\-\d.)]*\[[^\]\n]+\]:/m.test(text)) this.show(text);
    else this.update(text);
  }

  /** Show a text anew. */
  show(text) {
    this.restart();
    this.container.replaceChildren(render(text));
  }
}

const ENDED_BY_A_BLANK_LINE = ["paragraph_open", "heading_open", "table_open", "hr"];

/**
 * Return where the last block or item of a list begins that no longer belongs to what is before it, whatever comes:
 * {cut, isItem}. As long as its first line grows, "1" may still become an item, or a line of the paragraph before.
 */
function lastBeginning(text, blocks) {
  const starts = [];
  for (const { level, type, map } of blocks) {
    const isItem = level === 1 && type === "list_item_open" && map[0] > starts.at(-1).line;
    if (level === 0 || isItem) starts.push({ line: map[0], type, isItem });
  }
  for (let index = starts.length - 1; index > 0; index--) {
    const { line, isItem } = starts[index];
    const cut = offsetOfLine(text, line);
    const isApart = text[cut - 2] === "\n" && ENDED_BY_A_BLANK_LINE.includes(starts[index - 1].type);
    if (text.includes("\n", cut) || isApart) return { cut, isItem };
  }
  return { cut: 0 };
}

function offsetOfLine(text, line) {
  let offset = 0;
  for (let number = 0; number < line; number++) offset = text.indexOf("\n", offset) + 1;
  return offset;
}
