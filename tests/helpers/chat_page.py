"""The chat page without a model behind it: a server whose answers are scripted, and words to steer the page."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chromium import Chromium
from handspun.config.serving import ServeOptions
from handspun.models.load import ChatModel
from handspun.serve.app import Service, make_app
from handspun.serve.guard import Keys
from handspun.serve.metrics import Metrics
from handspun.serve.routes import routes
from handspun.serve.schemas import ChatRequest
from handspun.serve.served import Context, ServedModel
from handspun.serve.worker import Worker, WorkerLimits
from serving import served

LAST = "document.querySelector('.assistant:last-child')"


@dataclass
class Actor:
    """Answers with the last message, or calls a tool if it begins with "call", or writes what it was told to.

    text: what is answered to "go"; seconds: time between two tokens.
    """

    text: str = ""
    size: int = 4
    seconds: float = 0.0
    bodies: list[ChatRequest] = field(default_factory=list)

    async def answer(self, _: Context, body: ChatRequest) -> AsyncIterator[dict[str, Any]]:
        """Answer a streamed chat request."""
        self.bodies.append(body)
        return self._events(body)

    async def _events(self, body: ChatRequest) -> AsyncIterator[dict[str, Any]]:
        said = str(body.messages[-1].content)
        text = self.text if said == "go" else "" if said.startswith("call") else said
        yield _event({"role": "assistant", "content": ""}, handspun={"seed": 7})
        began = time.monotonic()
        pieces = [text[start : start + self.size] for start in range(0, len(text), self.size)]
        for number, piece in enumerate(pieces):
            content = {"token": piece, "logprob": -0.5, "bytes": list(piece.encode()), "top_logprobs": []}
            yield _event({"content": piece}, logprobs={"content": [content]}, token_ids=[number])
            await asyncio.sleep(max(0.0, began + (number + 1) * self.seconds - time.monotonic()))
        if said.startswith("call"):
            names = said.split()[1:]
            calls = [
                {
                    "index": index,
                    "id": f"call_{index}",
                    "type": "function",
                    "function": {"name": name, "arguments": '{"city": "Oslo"}'},
                }
                for index, name in enumerate(names)
            ]
            yield _event({"tool_calls": calls}, token_ids=[1])
        yield _event({}, finish_reason="tool_calls" if said.startswith("call") else "stop")
        counts = {"prompt_tokens": 9, "completion_tokens": len(pieces), "total_tokens": 9 + len(pieces)}
        yield {"choices": [], "usage": {**counts, "prompt_tokens_details": {"cached_tokens": 4}}}


def _event(delta: dict[str, Any], *, handspun: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    return {"choices": [choice], **({"handspun": handspun} if handspun else {})}


@contextmanager
def acted(chat: ChatModel, actor: Actor, options: ServeOptions) -> Iterator[str]:
    """Serve the page with an actor in the model's place, and yield its address."""
    models = {name: ServedModel.of(name, chat) for name in ("tuned", "base")}
    worker = Worker({name: one.chat for name, one in models.items()}, WorkerLimits(kv_tokens=4096), Metrics())
    worker.start()
    table = [
        replace(one, handler=actor.answer) if one.path == "/v1/chat/completions" else one
        for one in routes(options)
    ]
    service = Service(options, Metrics(list(models)), Keys([]), models, worker)
    try:
        with served(make_app(service, table), options) as port:
            yield f"http://127.0.0.1:{port}/"
    finally:
        worker.stop()


def last_answer(tab: Chromium, seconds: float = 20.0) -> str:
    """The text of the last answer, once it is complete."""
    tab.until(
        f"document.querySelector('#stop').hidden && {LAST}?.querySelector('.facts').textContent", seconds=seconds
    )
    assert tab.run(f"{LAST}.querySelector('.error').textContent") == ""
    return str(tab.run(f"{LAST}.querySelector('.body').textContent")).strip()


def say(tab: Chromium, text: str) -> None:
    """Write a message and send it."""
    tab.run("document.querySelector('#prompt').focus()")
    tab.type(text)
    tab.press("Enter")


def fill(tab: Chromium, name: str, value: str) -> None:
    """Change an option."""
    tab.run(
        f"field = document.querySelector('#{name}'), field.value = {json.dumps(value)}, "
        "field.dispatchEvent(new Event('change'))"
    )


def choose_file(tab: Chromium, text: str) -> None:
    """Import a file with this text."""
    tab.run(
        f"files = new DataTransfer(), files.items.add(new File([{json.dumps(text)}], 'rows.jsonl')),"
        "field = document.querySelector('#import-file'), field.files = files.files,"
        "field.dispatchEvent(new Event('change'))"
    )


def saved_rows(file: Path, seconds: float = 10.0) -> list[dict[str, Any]]:
    """The rows of a file that the browser saves; it is gone then."""
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.02)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    file.unlink()
    return rows
