// The server's interface: requests with the API key, and streams of server-sent events.

import { byId } from "./dom.js";

/** An error that the server answered with; its message is for people. */
export class ServerError extends Error {}

/** Return a JSON answer. body: of a POST request; without one it is GET. */
export async function ask(path, body) {
  return (await request(path, body)).json();
}

/** Yield the events of a streamed answer. signal: an AbortSignal that ends it. */
export async function* stream(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("The connection ended before the answer was complete. Answer again.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // comments keep the connection open
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new ServerError(parsed.error.message);
      yield parsed;
    }
  }
}

async function request(path, body, signal) {
  for (;;) {
    const headers = body === undefined ? {} : { "Content-Type": "application/json" };
    const key = sessionStorage.getItem("key");
    if (key) headers.Authorization = `Bearer ${key}`;
    const method = body === undefined ? "GET" : "POST";
    const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
    if (response.ok) return response;
    if (response.status === 401) await askForKey(Boolean(key));
    else throw new ServerError(await errorText(response));
  }
}

async function errorText(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

function askForKey(wasWrong) {
  const dialog = byId("key-dialog");
  if (wasWrong) byId("key-text").textContent = "The key is wrong. Type another.";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      // Only visible ASCII can be in a header.
      sessionStorage.setItem("key", byId("key").value.replace(/[^!-~]/g, ""));
      resolve();
    }, { once: true });
  });
}
