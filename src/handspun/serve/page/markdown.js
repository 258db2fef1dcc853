// Markdown of a model, as elements. markdown-it parses it, DOMPurify keeps only harmless elements.

import MarkdownIt from "./vendor/markdown-it.mjs";
import DOMPurify from "./vendor/purify.mjs";
import { copyButton, element } from "./dom.js";

const parser = new MarkdownIt({ html: false, linkify: true, breaks: false }).disable("image");
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });

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

/** Shows a text that grows. Only its last block is rendered again, so that long answers stay fast. */
export class GrowingMarkdown {
  constructor(container) {
    this.container = container;
    this.finished = 0; // characters of blocks that no longer change
    this.changing = []; // nodes of the last block
  }

  update(text) {
    const rest = text.slice(this.finished);
    const starts = parser
      .parse(rest, {})
      .filter((token) => token.level === 0 && token.map && token.nesting >= 0)
      .map((token) => token.map[0]);
    const cut = starts.length > 1 ? offsetOfLine(rest, starts.at(-1)) : 0;
    for (const node of this.changing) node.remove();
    if (cut > 0) {
      this.container.append(render(rest.slice(0, cut)));
      this.finished += cut;
    }
    const fragment = render(rest.slice(cut));
    this.changing = [...fragment.childNodes];
    this.container.append(fragment);
  }

  /** Render all of it once more: a reference at the end may belong to a link at the beginning. */
  finish(text) {
    this.container.replaceChildren(render(text));
  }
}

function offsetOfLine(text, line) {
  let offset = 0;
  for (let number = 0; number < line; number++) offset = text.indexOf("\n", offset) + 1;
  return offset;
}
