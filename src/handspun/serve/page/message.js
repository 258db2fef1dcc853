// How a message is shown.

import { facts } from "./answer.js";
import { button, copyButton, element } from "./dom.js";
import { GrowingMarkdown } from "./markdown.js";
import { linkTo } from "./replay.js";
import { tokenView } from "./tokens.js";

/**
 * A message on the page. actions: what its buttons do, each called with the message: edit(node, text), again(node),
 * move(node, by), goOn(node, tokens); before(node) are the messages that it answers.
 */
export class MessageView {
  constructor(node, place, actions) {
    this.node = node;
    this.place = place;
    this.actions = actions;
    const isAnswer = node.role === "assistant";
    this.body = element("div", { class: "body" });
    this.facts = element("p", { class: "facts" });
    this.error = element("p", { class: "error", role: "alert", hidden: true });
    this.buttons = element("div", { class: "actions" }, ...this.makeButtons(isAnswer, place));
    const name = isAnswer ? node.model ?? "Answer" : "You";
    this.root = element(
      "article",
      { class: `message ${node.role}`, "aria-label": name },
      element("h2", { class: isAnswer ? "name" : "unseen" }, name),
      this.body,
      this.error,
      element("div", { class: "under" }, this.buttons, this.facts),
    );
    if (isAnswer) this.markdown = new GrowingMarkdown(this.body);
    else this.body.textContent = node.content;
    this.update(true);
  }

  makeButtons(isAnswer, { index, count }) {
    const { node, actions } = this;
    const buttons = [copyButton("Copy", "Copy this message", () => node.content)];
    if (isAnswer) {
      this.tokens = button("Why", "Why these words: show the tokens", () => this.showTokens());
      this.tokens.setAttribute("aria-pressed", "false");
      buttons.push(button("Again", "Answer again, on a branch of its own", () => actions.again(node)), this.tokens);
      this.link = copyButton("Link", "Copy a link that gives this answer again", () => linkTo(node, actions.before(node)));
      buttons.push(this.link);
    } else {
      buttons.push(button("Edit", "Edit and send again, on a branch of its own", () => this.edit()));
    }
    if (count > 1) {
      const back = button("‹", "Previous branch", () => actions.move(node, -1));
      const on = button("›", "Next branch", () => actions.move(node, 1));
      back.disabled = index === 0;
      on.disabled = index === count - 1;
      buttons.push(element("span", { class: "branches" }, back, ` ${index + 1} of ${count} `, on));
    }
    return buttons;
  }

  /** Show what is new. isFinal: nothing more will come. */
  update(isFinal) {
    const { node } = this;
    if (this.markdown) {
      if (isFinal) this.markdown.finish(node.content);
      else this.markdown.update(node.content);
    }
    this.root.classList.toggle("growing", !isFinal);
    this.facts.textContent = isFinal ? facts(node) : "";
    if (this.tokens) this.tokens.hidden = this.link.hidden = !node.tokens?.length;
    this.error.hidden = !node.error;
    this.error.textContent = node.error ?? "";
  }

  /** Show the answer as its tokens, or as Markdown again. */
  showTokens() {
    const { node, actions } = this;
    const shows = this.tokens.getAttribute("aria-pressed") === "false";
    this.tokens.setAttribute("aria-pressed", String(shows));
    if (shows) this.body.replaceChildren(tokenView(node, actions.before(node), actions.goOn));
    else this.markdown.finish(node.content);
  }

  /** Replace the text with a box in which it is edited. */
  edit() {
    const { node, actions } = this;
    const box = element("textarea", { value: node.content, rows: 3, "aria-label": "Edit the message" });
    const close = () => {
      this.body.replaceChildren(node.content);
      this.buttons.hidden = false;
    };
    const send = () => {
      close();
      if (box.value.trim()) actions.edit(node, box.value);
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const row = element("div", { class: "row" }, element("span", { class: "grow" }), button("Cancel", "Cancel", close), button("Send", "Send", send));
    this.body.replaceChildren(box, row);
    this.buttons.hidden = true;
    box.focus();
  }
}

/** Speaks a growing text to screen readers, in whole sentences. */
export class Speaker {
  constructor(region) {
    this.region = region;
    this.restart();
  }

  restart() {
    this.spoken = 0;
    this.region.textContent = "";
  }

  update(text, isFinal) {
    const rest = text.slice(this.spoken);
    const end = isFinal ? rest.length : Math.max(...[...rest.matchAll(/[.!?]\s|[。！？\n]/g)].map((found) => found.index + 1), 0);
    if (end === 0) return;
    this.region.textContent = rest.slice(0, end);
    this.spoken += end;
  }
}
