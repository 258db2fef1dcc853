// Two models' answers to the same prompt, side by side, and each token's probability under the other model.

import { align, wordsOf } from "./align.js";
import { requestFor } from "./answer.js";
import { ask } from "./api.js";
import { button, element } from "./dom.js";
import { toggle } from "./extras.js";
import { MessageView } from "./message.js";
import { count, moveFocus, percent, visible } from "./tokens.js";

/** Give both answers the same seed, so that they differ only by their models. */
export function withSameSeed(options) {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return { seed: String((high >>> 11) * 2 ** 32 + low), ...options };
}

/** Two answers in columns. Arguments: as of MessageView; second: the other answer; models(): as the server describes them. */
export class PairView {
  constructor(node, second, place, actions, models) {
    Object.assign(this, { node, second, place, actions, models });
    const isBeside = {
      again: () => actions.again(node),
      give: (answer, results) => actions.give(actions.own(answer), results),
      correct: (answer, ...said) => actions.correct(actions.own(answer), ...said),
    };
    this.views = [
      new MessageView(node, place, actions),
      new MessageView(second, { ...place, index: 0, count: 1 }, { ...actions, ...isBeside }),
    ];
    const use = button(`Use ${second.model}'s`, `Use ${second.model}'s answer from here on, on a branch of its own`, () => actions.adopt(second, {}));
    this.compare = toggle("Compare tokens", "Compare tokens: rank and probability of each under the other model", (shows) => this.show(shows));
    this.tint = toggle("Tint", "Tint the tokens by their probability under the other model", (shows) => this.root.classList.toggle("tinted", shows));
    this.result = element("div", { class: "result", hidden: true });
    this.details = element("p", { class: "details", role: "status", hidden: true });
    this.head = element("div", { class: "row" }, this.compare, this.tint, element("span", { class: "grow" }), use);
    this.columns = element("div", { class: "columns" }, ...this.views.map(({ root }) => root));
    this.root = element("section", { class: "pair", "aria-label": `${node.model} and ${second.model}` }, this.columns, this.head, this.result, this.details);
    this.showControls(true);
  }

  /** Show all of both answers, if only their texts are there yet. isFinal: they do not grow. */
  fill(isFinal = true) {
    for (const view of this.views) view.fill(isFinal);
    this.showControls(isFinal);
    return this;
  }

  /** Show what is new. isFinal: nothing more will come. */
  update(isFinal) {
    for (const view of this.views) view.fill(isFinal).update(isFinal);
    this.showControls(isFinal);
  }

  showControls(isFinal) {
    this.head.classList.toggle("growing", !isFinal);
    this.compare.hidden = !this.views.every(({ node }) => node.count);
    if (!this.root.classList.contains("compared")) this.tint.hidden = this.details.hidden = true;
  }

  focus(by) {
    this.views[0].focus(by);
  }

  focusTokens() {
    this.views[0].focusTokens();
  }

  correct() {
    this.views[0].correct();
  }

  /** Show the answers as compared tokens, or as texts again. */
  async show(isCompared) {
    this.fill();
    this.root.classList.toggle("compared", isCompared);
    this.result.hidden = !isCompared;
    for (const line of this.lines ?? []) line.remove();
    this.tint.hidden = this.details.hidden = true;
    for (const { tokens } of this.views) {
      if (tokens.getAttribute("aria-pressed") === "true") tokens.click();
      tokens.hidden = isCompared;
    }
    if (!isCompared) return;
    this.result.replaceChildren("Reading …");
    try {
      this.lines = await this.compared();
      if (!this.root.classList.contains("compared")) return;
      for (const [index, view] of this.views.entries()) view.body.after(this.lines[index]);
    } catch (error) {
      this.result.replaceChildren(element("p", { class: "error" }, error.message));
    }
  }

  /** Return a line of compared tokens, or words, per answer. Notes in words what the comparison says. */
  async compared() {
    const answers = [this.node, this.second];
    const [one, other] = answers.map(({ model }) => this.models().find(({ id }) => id === model));
    if (!one || !other) throw new Error(`${one ? answers[1].model : answers[0].model} is not served any more.`);
    if (one.vocabulary !== other.vocabulary) {
      const lists = answers.map(({ content }) => wordsOf(content));
      const found = align(...lists);
      this.tell(found, "These models have different vocabularies, so their tokens cannot be compared. The texts are.");
      return [line(lists[0], found.a, found.parts, word), line(lists[1], found.b, found.parts, word)];
    }
    const scores = await Promise.all(answers.map((answer) => Promise.all(answers.map((reader) => this.score(answer, reader)))));
    const found = align(...answers.map(({ tokens }) => tokens.map(({ id }) => id)));
    const rows = scores.map((found, index) => merged(answers, found, index));
    this.tint.hidden = this.details.hidden = false;
    this.details.textContent = "Point at a token to see its probability under both models.";
    this.tell(found, this.parting(rows, found.parts));
    const made = (row, isShared) => this.token(row, isShared);
    return [line(rows[0], found.a, found.parts, made), line(rows[1], found.b, found.parts, made)].map((one) => this.connect(one));
  }

  /** Return what a model says of an answer's tokens, behind its own prompt. */
  async score(answer, reader) {
    const { messages, tools } = requestFor(reader, this.actions.before(reader));
    const ids = answer.tokens.map(({ id }) => id);
    return (await ask("/v1/score", { model: reader.model, messages, tools, answer_token_ids: ids })).tokens;
  }

  tell({ parts, a, b }, text) {
    const only = [a, b].map((shared) => shared.filter((one) => !one).length);
    const said = parts === null ? "Both answers are the same." : `${count(only[0])} only on the first side, ${count(only[1])} only on the second.`;
    this.result.replaceChildren(element("p", {}, `${text} ${said}`.trim()));
  }

  /** Return what both models say where their answers part. */
  parting(rows, parts) {
    if (parts === null) return "";
    const said = rows.map((row) => (row[parts] ? `${row[parts].writer} says “${visible(row[parts].text)}” (${odds(row[parts])})` : "the other has ended"));
    return `The answers part at token ${count(parts + 1)}: ${said.join("; ")}. The marked tokens differ:`;
  }

  token(row, isShared) {
    const about = `“${visible(row.text)}” (id ${row.id}): ${odds(row)}${isShared ? "" : "; only in this answer"}`;
    const made = element("button", { type: "button", class: "token", tabIndex: -1, "aria-label": about }, row.text.replaceAll("\n", "↵") || "∅");
    made.dataset.tint = String(Math.min(5, Math.floor(-row.others.logprob / 0.8)));
    return made;
  }

  /** Have a line of tokens tell about the one that is pointed at, clicked, or has the focus. */
  connect(root) {
    const tokens = [...root.querySelectorAll("button")];
    const tell = ({ target }) => {
      if (!tokens.includes(target)) return;
      for (const one of this.root.querySelectorAll(".token.chosen")) one.classList.remove("chosen");
      target.classList.add("chosen");
      this.details.textContent = target.getAttribute("aria-label");
    };
    for (const kind of ["pointerover", "focusin", "click"]) root.addEventListener(kind, tell);
    root.addEventListener("keydown", (event) => moveFocus(event, tokens));
    if (tokens.length) tokens[0].tabIndex = 0;
    return root;
  }
}

/** Return the tokens of one of two answers. found: what each answer's model says of them. */
function merged(answers, found, side) {
  return answers[side].tokens.map(({ id, token }, place) => {
    const odds = found.map((scores, index) => ({ model: answers[index].model, ...scores[place] }));
    return { id, text: token, writer: answers[side].model, odds, others: odds[1 - side] };
  });
}

/** Return a token's probability and rank under both models, in words. */
function odds(row) {
  return row.odds.map(({ model, rank, logprob }) => `${model} ${percent(Math.exp(logprob))}, rank ${count(rank)}`).join("; ");
}

function word(text) {
  return element("span", { class: "token" }, text.replaceAll("\n", "↵"));
}

/** Return tokens in a row. Those that only this answer has are marked, and the place where the answers part. */
function line(items, shared, parts, make) {
  const root = element("div", { class: "tokens compared-tokens", role: "group", "aria-label": "Compared tokens" });
  for (const [index, item] of items.entries()) {
    if (index === parts) root.append(element("span", { class: "parting" }, "parts here"));
    const made = make(item, shared[index]);
    if (!shared[index]) made.classList.add("only");
    root.append(made);
    if ((item.text ?? item).includes("\n")) root.append(element("br"));
  }
  if (parts === items.length) root.append(element("span", { class: "parting" }, "ends here"));
  return root;
}
