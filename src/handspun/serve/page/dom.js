// Small helpers for elements. Texts are set as text, never parsed as HTML.

/** Return an element. A property that begins with "on" is a listener; `class` and aria-… are attributes. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && !name.startsWith("aria")) made[name] = value;
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Return the element with an id. */
export const byId = (id) => document.getElementById(id);

/** Return a button with a text; about is what it does, for the pointer and for screen readers. */
export function button(text, about, onclick) {
  return element("button", { type: "button", title: about, "aria-label": about, onclick }, text);
}

/** Return a button that copies what text() returns. */
export function copyButton(name, about, text) {
  const made = button(name, about, async () => {
    await navigator.clipboard.writeText(text());
    made.textContent = "Copied";
    setTimeout(() => (made.textContent = name), 1500);
  });
  return made;
}

/** Have the browser save a text as a file. */
export function saveFile(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
