// What an answer has besides its text: the prompt that the model read, and the beams of its search.

import { TreeView } from "./beams.js";
import { button, element } from "./dom.js";
import { promptView } from "./prompt.js";

/** Panels under an answer and the buttons that open them. actions: as of MessageView. */
export class Extras {
  constructor(node, actions) {
    this.node = node;
    this.root = element("div", { class: "extras" });
    this.prompt = toggle("Prompt", "What the model read: the prompt, token by token", (shows) => {
      if (shows) this.root.prepend((this.panel = promptView(node, actions.before(node))));
      else this.panel.remove();
    });
    this.tree = new TreeView(node, (changes) => actions.adopt(node, changes));
    this.beams = toggle("Beams", "The beams of the search, as a tree", (shows) => (this.tree.root.hidden = !shows));
    this.beams.setAttribute("aria-pressed", "true");
    this.root.append(this.tree.root);
    this.buttons = [this.prompt, this.beams];
  }

  /** Show what is new. isFinal: nothing more will come. */
  update(isFinal) {
    this.beams.hidden = !this.node.beams;
    this.tree.root.hidden = !this.node.beams || this.beams.getAttribute("aria-pressed") === "false";
    if (this.node.beams) this.tree.update(isFinal);
  }
}

/** Return a button that is pressed or not. onchange(isPressed). */
export function toggle(text, about, onchange) {
  const made = button(text, about, () => {
    const isPressed = made.getAttribute("aria-pressed") === "false";
    made.setAttribute("aria-pressed", String(isPressed));
    onchange(isPressed);
  });
  made.setAttribute("aria-pressed", "false");
  return made;
}
