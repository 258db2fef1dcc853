// Why this word: an answer as its tokens, and how each of them was chosen.

import { ask } from "./api.js";
import { requestFor } from "./answer.js";
import { button, element } from "./dom.js";

/**
 * Return an answer as tokens, tinted by probability. A click shows how a token was chosen.
 *
 * goOn(answer, tokens): called to answer again, beginning with these tokens.
 */
export function tokenView(answer, before, goOn) {
  const details = element("div", { class: "why", "aria-live": "polite" });
  const tokens = answer.tokens.map((token, index) => tokenButton(token, () => choose(index)));
  const line = element("div", { class: "tokens", role: "group", "aria-label": "Tokens of the answer" });
  for (const [index, one] of tokens.entries()) {
    line.append(one);
    if (answer.tokens[index].token.includes("\n")) line.append(element("br"));
  }
  line.addEventListener("keydown", (event) => moveFocus(event, tokens));
  if (tokens.length) tokens[0].tabIndex = 0;

  async function choose(index) {
    for (const [place, one] of tokens.entries()) one.setAttribute("aria-pressed", String(place === index));
    details.replaceChildren("Reading …");
    try {
      const found = await explain(answer, before, index);
      details.replaceChildren(...explanation(found, index, answer, goOn));
    } catch (error) {
      details.replaceChildren(element("p", { class: "error" }, error.message));
    }
  }

  const about = "The stronger the color, the less probable. Click a token to see how it was chosen.";
  return element("div", {}, element("p", { class: "meaning" }, about), line, details);
}

function tokenButton({ token, logprob, isGiven }, onclick) {
  const chance = isGiven ? "chosen by you" : percent(Math.exp(logprob));
  const made = element("button", { type: "button", class: "token", tabIndex: -1, title: chance, onclick }, token.replaceAll("\n", "↵") || "∅");
  made.setAttribute("aria-label", `${visible(token)}, ${chance}`);
  made.dataset.tint = isGiven ? "given" : String(Math.min(5, Math.floor(-logprob / 0.8)));
  return made;
}

/** Move the focus among tokens by arrow keys: only one of them is reached by Tab. */
export function moveFocus(event, tokens) {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const next = by && tokens[tokens.indexOf(document.activeElement) + by];
  if (!next) return;
  for (const one of tokens) one.tabIndex = one === next ? 0 : -1;
  next.focus();
  event.preventDefault();
}

/** Return what the server says of an answer's token. */
function explain(answer, before, index) {
  const { max_tokens, ...body } = requestFor(answer, before);
  const ids = answer.tokens.slice(0, index).map(({ id }) => id);
  return ask("/v1/explain", { ...body, seed: answer.seed, answer_token_ids: ids });
}

function explanation(found, index, answer, goOn) {
  const { explanation: told } = found;
  const rows = [
    ["In the model's own distribution", `${percent(told.probability)}, rank ${count(told.rank)}`],
    ...told.effects.map((effect) => [
      effect.processor,
      `${effect.removed ? `removes ${count(effect.removed)} tokens of ${percent(effect.removed_mass)}; ` : ""}this one then has ${percent(effect.probability)}`,
    ]),
    ["Could be chosen", `${count(told.left)} tokens, ${percent(told.left_mass)} of the probability`],
    ["Chosen", candidate(told.chosen)],
    ["Runner-up", told.runner_up ? candidate(told.runner_up) : "none"],
  ];
  const list = element("dl", {}, ...rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  const parts = [element("h3", {}, `Token ${index + 1}: ${visible(told.chosen.text)} (id ${told.chosen.token_id})`)];
  if (told.chosen.token_id !== answer.tokens[index].id) {
    parts.push(element("p", {}, `The answer has ${visible(answer.tokens[index].token)} here; the settings alone lead to the above.`));
  }
  parts.push(list, element("h3", {}, "Most probable"), alternatives(found, index, answer, goOn));
  return parts;
}

/** A drawn token is the one whose log-probability plus noise is the highest. */
function candidate({ text, token_id, probability, noise }) {
  const draw = noise === null ? "the most probable" : `noise ${noise >= 0 ? "+" : ""}${noise.toFixed(2)}`;
  return `${visible(text)} (id ${token_id}), ${percent(probability)}, ${draw}`;
}

function alternatives(found, index, answer, goOn) {
  const rows = found.top_logprobs.map(({ token, bytes, logprob }, place) => {
    const id = found.top_token_ids[place];
    const start = answer.tokens.slice(0, index);
    const use = button("Go on with it", `Go on from here with ${visible(token)}`, () =>
      goOn(answer, [...start, { id, token, bytes, logprob, isGiven: true }]),
    );
    const chance = element("meter", { min: 0, max: 1, value: Math.exp(logprob), "aria-label": "Probability" });
    const cells = [visible(token), percent(Math.exp(logprob)), chance, id === answer.tokens[index].id ? "in the answer" : use];
    return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
  });
  const head = ["token", "probability", "", ""].map((name) => element(name ? "th" : "td", name ? { scope: "col" } : {}, name));
  return element("div", { class: "table", tabIndex: 0, role: "region", "aria-label": "Most probable tokens" }, element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
}

/** Return a token with what cannot be seen of it. */
export function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "·") || "(nothing)";
}

export const count = (number) => number.toLocaleString("en-US");

/** Return a probability as the command line shows it. */
export function percent(probability) {
  return probability > 0 && probability < 0.0005 ? "<0.1%" : `${(100 * probability).toFixed(1)}%`;
}
