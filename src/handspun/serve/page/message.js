// How a message is shown.

import { facts } from "./answer.js";
import { correctionEditor } from "./correct.js";
import { button, byId, copyButton, element } from "./dom.js";
import { Extras } from "./extras.js";
import { GrowingMarkdown } from "./markdown.js";
import { linkTo } from "./replay.js";
import { tokenView } from "./tokens.js";
import { callViews, resultForm, resultViews } from "./tools.js";

const waiting = new WeakMap(); // views by their elements: those that are filled once they come near
const near = new IntersectionObserver(comeNear, { root: byId("scroller"), rootMargin: "1500px 0px" });
const distances = new Map(); // from the middle of what is seen, by elements that are near and not filled yet
const FILLING_MS = 6; // of a frame, so that scrolling goes on
const NAMES = { user: "You", tool: "Tools" };

/**
 * A message on the page. actions: what its buttons do, each called with the message: edit(node, text), again(node),
 * move(node, by), goOn(node, tokens), give(node, results), correct(node, content, calls), forget(node),
 * adopt(node, changes); before(node) are the messages that it answers.
 *
 * A message far from what is seen is plain text at first, so that long conversations open fast.
 */
export class MessageView {
  constructor(node, place, actions) {
    this.node = node;
    this.place = place;
    this.actions = actions;
    const isAnswer = node.role === "assistant";
    const name = isAnswer ? node.model ?? "Answer" : NAMES[node.role];
    this.body = element("div", { class: "body" }, node.content);
    this.root = element(
      "article",
      { class: `message ${node.role}`, "aria-label": name },
      element("h2", { class: node.role === "user" ? "unseen" : "name" }, name),
      this.body,
    );
    if (isAnswer) this.markdown = new GrowingMarkdown(this.body);
    waiting.set(this.root, this);
    near.observe(this.root);
  }

  /** Show all of the message, if only its text is there yet. isFinal: it does not grow. */
  fill(isFinal = true) {
    if (!waiting.delete(this.root)) return this;
    near.unobserve(this.root);
    distances.delete(this.root);
    this.calls = element("div", { class: "calls" });
    this.facts = element("p", { class: "facts" });
    this.error = element("p", { class: "error", role: "alert", hidden: true });
    const isAnswer = this.node.role === "assistant";
    if (isAnswer) this.extras = new Extras(this.node, this.actions);
    this.buttons = element("div", { class: "actions" }, ...this.makeButtons(isAnswer, this.place));
    this.root.append(this.calls, this.error, element("div", { class: "under" }, this.buttons, this.facts));
    if (isAnswer) this.root.append(this.extras.root);
    this.update(isFinal);
    return this;
  }

  makeButtons(isAnswer, { index, count }) {
    const { node, actions } = this;
    const buttons = [copyButton("Copy", "Copy this message", () => node.content)];
    if (isAnswer) {
      this.tokens = button("Why", "Why these words: show the tokens", () => this.showTokens());
      this.tokens.setAttribute("aria-pressed", "false");
      this.correction = button("Correct", "Correct this answer, as a row to train on", () => this.correct());
      buttons.push(button("Again", "Answer again, on a branch of its own", () => actions.again(node)), this.correction, this.tokens);
      this.link = copyButton("Link", "Copy a link that gives this answer again", () => linkTo(node, actions.before(node)));
      buttons.push(this.link, ...this.extras.buttons);
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
    } else this.showText();
    this.extras?.update(isFinal);
    this.root.classList.toggle("growing", !isFinal);
    this.facts.textContent = isFinal ? facts(node) : "";
    if (this.tokens) this.tokens.hidden = this.link.hidden = !node.tokens?.length;
    this.showCalls(isFinal);
    this.error.hidden = !node.error;
    this.error.textContent = node.error ?? "";
  }

  showText() {
    const { content, results } = this.node;
    this.body.replaceChildren(...(results ? resultViews(results) : [content]));
  }

  /** Show the calls of tools, and a form for their results if nothing follows yet. */
  showCalls(isFinal) {
    const { node, actions, place } = this;
    if (!node.calls?.length) return;
    this.calls.replaceChildren(...callViews(node.calls));
    if (!isFinal || !place.isLast) return;
    const form = resultForm(node.calls, null, (results) => {
      form.remove();
      actions.give(node, results);
    });
    this.calls.append(form);
  }

  /** Show the answer as its tokens, or as Markdown again. */
  showTokens() {
    const { node, actions } = this;
    const shows = this.tokens.getAttribute("aria-pressed") === "false";
    this.tokens.setAttribute("aria-pressed", String(shows));
    if (shows) this.body.replaceChildren(tokenView(node, actions.before(node), actions.goOn));
    else this.markdown.show(node.content);
  }

  /** Replace the text with a box in which it is edited. */
  edit() {
    const { node, actions } = this.fill();
    if (node.results) {
      const { calls } = actions.before(node).at(-1);
      this.open(resultForm(calls, node.results, (results) => this.close(() => actions.edit(node, results)), () => this.close()));
      return;
    }
    const box = element("textarea", { value: node.content, rows: 3, "aria-label": "Edit the message" });
    const send = () => this.close(() => box.value.trim() && actions.edit(node, box.value));
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.close();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const buttons = [button("Cancel", "Cancel", () => this.close()), button("Send", "Send", send)];
    this.open(element("div", {}, box, element("div", { class: "row" }, element("span", { class: "grow" }), ...buttons)));
  }

  /** Replace the answer with a box in which it is corrected. */
  correct() {
    const { node, actions } = this.fill();
    this.tokens.setAttribute("aria-pressed", "false");
    this.open(correctionEditor(node, {
      onsave: (content, calls) => this.close(() => actions.correct(node, content, calls)),
      onremove: () => this.close(() => actions.forget(node)),
      onclose: () => this.close(),
    }));
  }

  /** Put the focus on the button that leads on in this direction, or on the last button. */
  focus(by) {
    this.root.scrollIntoView({ block: "nearest" });
    const enabled = [...this.buttons.querySelectorAll("button:enabled")].filter((one) => !one.hidden);
    const wanted = enabled.find((one) => one.textContent === { 1: "›", [-1]: "‹" }[by]);
    (wanted ?? enabled.at(-1)).focus();
  }

  /** Show the tokens, and put the focus on the first one; or show the text again. */
  focusTokens() {
    if (this.fill().tokens.hidden) return;
    this.showTokens();
    (this.body.querySelector(".token") ?? this.tokens).focus();
  }

  open(editor) {
    this.opener = document.activeElement;
    this.body.replaceChildren(editor);
    this.buttons.hidden = this.calls.hidden = true;
    editor.querySelector("textarea").focus();
  }

  /** Close an editor. then: what was decided in it. */
  close(then) {
    if (this.markdown) this.markdown.show(this.node.content);
    else this.showText();
    this.buttons.hidden = this.calls.hidden = false;
    this.opener.focus();
    then?.();
  }
}

function comeNear(entries) {
  if (!distances.size) requestAnimationFrame(fillSome);
  for (const { isIntersecting, target, boundingClientRect: at, rootBounds: seen } of entries) {
    if (isIntersecting) distances.set(target, Math.abs(at.top + at.bottom - seen.top - seen.bottom));
    else distances.delete(target);
  }
}

/** Fill the messages that are near, the nearest first. */
function fillSome() {
  const end = performance.now() + FILLING_MS;
  const found = [...distances].sort(([, one], [, other]) => one - other);
  for (const [root] of found) {
    distances.delete(root);
    waiting.get(root)?.fill();
    if (performance.now() > end) break;
  }
  if (distances.size) requestAnimationFrame(fillSome);
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
