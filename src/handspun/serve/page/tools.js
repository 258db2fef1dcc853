// Calls of tools in an answer, and the results that a person gives back.

import { button, element } from "./dom.js";

/** Return the calls of an answer as elements: the function's name, and its arguments as indented JSON. */
export function callViews(calls) {
  return calls.map(({ function: { name, arguments: text } }) =>
    element("div", { class: "code call" }, element("div", { class: "row" }, element("span", {}, `calls ${name}`)), pre(indented(text))),
  );
}

/** Return the results of tools as elements. */
export function resultViews(results) {
  return results.map(({ name, content }) =>
    element("div", { class: "code call" }, element("div", { class: "row" }, element("span", {}, `${name || "tool"} gives`)), pre(indented(content))),
  );
}

/** Return a form with a field per call. onsend(results) is called with [{id, name, content}]; oncancel may be missing. */
export function resultForm(calls, results, onsend, oncancel) {
  const boxes = calls.map(({ function: { name } }, index) =>
    element("textarea", { rows: 2, value: results?.[index]?.content ?? "", placeholder: `What ${name} gives back`, "aria-label": `Result of ${name}` }),
  );
  const send = () => onsend(calls.map(({ id, function: { name } }, index) => ({ id, name, content: boxes[index].value })));
  const form = element("form", { class: "results", onsubmit: (event) => (event.preventDefault(), send()) }, ...boxes);
  const cancel = oncancel ? [button("Cancel", "Cancel", oncancel)] : [];
  const submit = element("button", { class: "primary", title: "Give the results to the model and have it go on" }, "Go on");
  form.append(element("div", { class: "row" }, element("span", { class: "grow" }), ...cancel, submit));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && oncancel) oncancel();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target.tagName === "TEXTAREA") send();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return form;
}

function pre(text) {
  return element("pre", { tabIndex: 0 }, text);
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
