// Beam search: its answers, and its tree while it grows.
//
// An answer's `beams` is {nodes, answers}: the tree as the server describes it, and all answers that were found, best
// first. `taken` is the number of the one that is shown.

import { button, element } from "./dom.js";

/** Return what collects an answer's search, or null if it has none. */
export function startSearch(answer) {
  const width = Number(answer.options.num_beams ?? 1);
  answer.beams = null;
  return width > 1 ? new Search(answer, width) : null;
}

/** Return tokens with their ids. There may be more ids: an answer's last tokens may not be shown. */
export function withIds(tokens, ids) {
  return tokens.map(({ token, logprob, bytes }, index) => ({ id: ids[index], token, logprob, bytes }));
}

class Search {
  constructor(answer, width) {
    this.answer = answer;
    this.fields = { n: width, show_tree: true };
    answer.beams = { nodes: [], answers: [] };
  }

  /** Note a choice of an event. Return whether it belongs to the answer that is shown. */
  push(choice) {
    const { beams, taken = 0 } = this.answer;
    if (choice.tree_nodes) beams.nodes.push(...choice.tree_nodes);
    if (choice.tree) beams.nodes = choice.tree;
    const found = (beams.answers[choice.index] ??= { content: "", ids: [], tokens: [], finish: null });
    found.content += choice.delta.content ?? "";
    found.ids.push(...(choice.token_ids ?? []));
    found.tokens.push(...(choice.logprobs?.content ?? []));
    found.finish = choice.finish_reason ?? found.finish;
    return choice.index === taken;
  }
}

/** Shows the tree of an answer's search. take(changes): called with what changes if another answer is taken. */
export class TreeView {
  constructor(answer, take) {
    this.answer = answer;
    this.take = take;
    this.all = button("", "Show the beams that were given up, too", () => {
      this.all.setAttribute("aria-pressed", String(this.all.getAttribute("aria-pressed") === "false"));
      this.draw(true);
    });
    this.all.setAttribute("aria-pressed", "false");
    this.scrolled = 0; // where the tree was put; the reader may have scrolled since
    this.about = element("p", { class: "meaning" });
    this.box = element("div", { class: "box", tabIndex: 0, role: "group", "aria-label": "Beams as a tree" });
    this.root = element("div", { class: "panel tree" }, element("div", { class: "row" }, this.about, this.all), this.box);
  }

  update(isFinal) {
    this.root.classList.toggle("growing", !isFinal);
    this.draw(isFinal);
  }

  draw(isFinal) {
    const { box } = this;
    const showsAll = this.all.getAttribute("aria-pressed") === "true";
    const tree = new Tree(this.answer.beams.nodes, showsAll);
    this.about.textContent = `${tree.summary} The number is a beam's log-probability so far. The best comes first.`;
    this.all.textContent = `${showsAll ? "Hide" : "Show"} ${tree.lost} given up`;
    this.all.setAttribute("aria-label", `${this.all.textContent} beams`);
    this.all.disabled = tree.lost === 0;
    const follows = box.scrollTop === this.scrolled;
    box.replaceChildren(...tree.children(null).map((place) => this.path(tree, tree.path(place))));
    if (follows) box.scrollTop = isFinal ? 0 : Math.max(0, (box.firstChild?.offsetHeight ?? 0) - box.clientHeight + 40);
    this.scrolled = box.scrollTop;
  }

  /** Return a path as a list of its stretches without a branch, each followed by what branches off there. */
  path(tree, stretches) {
    return element("ol", { class: "path" }, ...stretches.map((one) => this.stretch(tree, one)));
  }

  stretch(tree, { nodes, branches }) {
    const end = nodes.at(-1);
    const ending = tree.children(end).length ? [] : [this.ending(tree, end)];
    const text = element("span", { class: "text" }, textOf(nodes.map((place) => tree.nodes[place])));
    const score = element("span", { class: "score" }, minus(tree.nodes[end].score.toFixed(2)));
    const item = element("li", {}, element("div", { class: "stretch" }, text, ...ending, score));
    if (branches.length) item.append(element("ul", { class: "sides" }, ...branches.map((path) => element("li", {}, this.path(tree, path)))));
    return item;
  }

  ending(tree, place) {
    const node = tree.nodes[place];
    if (tree.live.has(place)) return element("span", { class: "ending" }, "…");
    if (node.return_index === null) return element("span", { class: "ending" }, node.ended ? (tree.isDone ? "ended, beaten" : "ended") : "given up");
    const number = node.return_index;
    const isTaken = number === (this.answer.taken ?? 0);
    const mean = minus((node.score / tree.depth(place)).toFixed(2));
    const name = isTaken ? `Answer ${number + 1} ✓` : `Take answer ${number + 1}`;
    const about = `${name}${isTaken ? " is shown" : ", on a branch of its own"}: log-probability ${minus(node.score.toFixed(2))}, per token ${mean}`;
    const made = button(name, about, () => {
      const { content, tokens, ids, finish } = this.answer.beams.answers[number];
      if (!isTaken) this.take({ content, tokens: withIds(tokens, ids), count: ids.length, finish, taken: number });
    });
    made.setAttribute("aria-pressed", String(isTaken));
    made.classList.add("take");
    return made;
  }
}

const minus = (text) => text.replace("-", "−");

/** Return the text of tokens in a row. A character may be made of several. */
function textOf(nodes) {
  const text = new TextDecoder().decode(new Uint8Array(nodes.flatMap(({ bytes }) => bytes)));
  return text.replaceAll("\n", "↵") || "∅";
}

/** The nodes of a search, and which of them are shown. */
class Tree {
  constructor(nodes, showsAll) {
    this.nodes = nodes;
    this.isDone = nodes.some((node) => node.return_index !== null);
    this.byParent = Map.groupBy(nodes.keys(), (place) => nodes[place].parent);
    const depths = [];
    for (const [place, { parent }] of nodes.entries()) depths[place] = parent === null ? 1 : depths[parent] + 1;
    this.depths = depths;
    const deepest = Math.max(0, ...depths);
    const places = [...nodes.keys()];
    this.live = new Set(this.isDone ? [] : places.filter((place) => depths[place] === deepest && !nodes[place].ended));
    const isKept = (place) => this.live.has(place) || (this.isDone ? nodes[place].return_index !== null : nodes[place].ended);
    this.best = new Map(); // of the kept nodes: how good the best end behind them is
    for (const place of places.filter(isKept)) this.keep(place, this.worth(place));
    const ends = places.filter((place) => !this.byParent.has(place));
    this.lost = ends.filter((place) => !this.best.has(place)).length;
    if (showsAll) for (const place of ends.filter((one) => !this.best.has(one))) this.keep(place, this.worth(place) - 1e6);
    const answers = places.filter((place) => nodes[place].return_index !== null).length;
    this.summary = this.isDone ? `${answers} ${answers === 1 ? "answer" : "answers"} found.` : `${this.live.size} beams at token ${deepest}.`;
  }

  depth(place) {
    return this.depths[place];
  }

  /** Answers by their number, then ends by their mean log-probability. */
  worth(place) {
    const { return_index: number, score } = this.nodes[place];
    return number === null ? score / this.depths[place] : 1000 - number;
  }

  keep(place, worth) {
    for (let at = place; at !== null; at = this.nodes[at].parent) {
      if ((this.best.get(at) ?? -Infinity) >= worth) return;
      this.best.set(at, worth);
    }
  }

  /** Return the children of a node that are shown, the one with the best end first. */
  children(place) {
    const found = (this.byParent.get(place) ?? []).filter((child) => this.best.has(child));
    return found.sort((one, other) => this.best.get(other) - this.best.get(one));
  }

  /** Return the way from a node to its best end: stretches, each with the paths that branch off behind it. */
  path(first) {
    const stretches = [];
    for (let place = first; place !== undefined; ) {
      const nodes = [place];
      let next = this.children(place);
      while (next.length === 1) {
        nodes.push(next[0]);
        next = this.children(next[0]);
      }
      stretches.push({ nodes, branches: next.slice(1).map((child) => this.path(child)) });
      place = next[0];
    }
    return stretches;
  }
}
