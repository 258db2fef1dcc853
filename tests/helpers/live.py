"""The real server over a tiny model with int8 weights: uvicorn on a free port, the engine's thread, all routes."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from asking import served_chat
from handspun.config.serving import ServeOptions
from handspun.models.load import ChatModel
from handspun.serve.app import Service, make_app
from handspun.serve.guard import Keys
from handspun.serve.metrics import Metrics
from handspun.serve.routes import routes
from handspun.serve.served import ServedModel
from handspun.serve.worker import Worker, WorkerLimits
from serving import Client, Reply, ask, served

HI = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDLESS = {"prompt": "Hi", "max_tokens": 2000, "min_tokens": 2000, "seed": 1}


@dataclass
class Remote:
    """A server that runs, in this process or in another one."""

    port: int

    @property
    def url(self) -> str:
        """The base URL of OpenAI's clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    def post(self, path: str, **body: Any) -> Reply:
        """Send a request on a connection of its own."""
        return ask(self.port, path, body)

    def answer(self, path: str, **body: Any) -> Any:
        """The body of an answer with status 200."""
        reply = self.post(path, **body)
        assert reply.status == 200, reply.body
        return reply.json()

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which ends with [DONE]."""
        reply = self.post(path, stream=True, **body)
        assert reply.status == 200, reply.body
        *events, done, rest = reply.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]

    def begin(self, path: str, **body: Any) -> Client:
        """A client that has sent a request and reads nothing yet."""
        client, data = Client(self.port), json.dumps(body).encode()
        client.send(client.head("POST", path, data) + data)
        return client

    def figure(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = ask(self.port, "/metrics").body.decode().splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        assert values, name
        return sum(values)

    def is_idle(self) -> bool:
        """Whether nothing runs, nothing waits, and no memory is reserved."""
        names = ("handspun_running", "handspun_waiting", "handspun_kv_tokens_used")
        return all(self.figure(name) == 0 for name in names)


@dataclass
class Live(Remote):
    """A server that runs in this process."""

    service: Service


def live_chat() -> ChatModel:
    """The model that is served."""
    return served_chat(max_position_embeddings=4096)


@contextmanager
def live(
    chat: ChatModel,
    options: ServeOptions | None = None,
    *,
    keys: Sequence[str] = (),
    names: Sequence[str] = ("tiny",),
    **limits: Any,
) -> Iterator[Live]:
    """Serve one model under some names. limits: of the engine."""
    metrics, options = Metrics(list(names)), options or ServeOptions(log_requests=False)
    values = {"rows": 16, "kv_tokens": 16_000, "cache_bytes": 2**22, **limits}
    worker = Worker(dict.fromkeys(names, chat), WorkerLimits(**values), metrics)
    worker.start()
    models = {name: ServedModel.of(name, chat) for name in names}
    service = Service(options, metrics, Keys(keys), models, worker)
    try:
        with served(make_app(service, routes(options)), options) as port:
            yield Live(port, service)
    finally:
        worker.stop()
