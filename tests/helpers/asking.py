"""The server's handlers with a real engine thread, without HTTP."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from handspun.config.serving import ServeOptions
from handspun.models.fused import fused_weights
from handspun.models.load import ChatModel
from handspun.serve import schemas
from handspun.serve.errors import ApiError
from handspun.serve.metrics import Metrics
from handspun.serve.served import Context, ServedModel
from handspun.serve.worker import Worker, WorkerLimits
from tiny import tiny_model, tiny_tokenizer

Handler = Callable[[Context, Any], Coroutine[Any, Any, dict[str, Any] | AsyncIterator[dict[str, Any]]]]


def served_chat(**config: Any) -> ChatModel:
    """A tiny model with int8 weights that samples by default, as its settings say nothing."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    values = {"initializer_range": 0.1, "max_position_embeddings": 600, **sizes, **config}
    model = tiny_model("qwen2", **values)
    return ChatModel(model, tiny_tokenizer(), "tiny", fused_weights(model, int8=True))


@dataclass
class Asker:
    """Calls handlers as the HTTP side does."""

    models: dict[str, ServedModel]
    worker: Worker
    limits: ServeOptions
    log: dict[str, Any] = field(default_factory=dict)
    """What the newest request logged."""

    def ask(self, handler: Handler, form: type[schemas.Model], /, **body: Any) -> dict[str, Any]:
        """The answer, as a dict."""

        async def answer() -> dict[str, Any]:
            found = await handler(self.context(), self._read(form, body))
            assert isinstance(found, dict)
            return found

        return asyncio.run(asyncio.wait_for(answer(), 60))

    def stream(self, handler: Handler, form: type[schemas.Model], /, **body: Any) -> list[dict[str, Any]]:
        """The events of the stream."""

        async def events() -> list[dict[str, Any]]:
            found = await handler(self.context(), self._read(form, {**body, "stream": True}))
            assert not isinstance(found, dict)
            return [event async for event in found]

        return asyncio.run(asyncio.wait_for(events(), 60))

    def refused(self, handler: Handler, form: type[schemas.Model], /, **body: Any) -> ApiError:
        """The error that the handler raises."""

        async def error() -> ApiError:
            try:
                await handler(self.context(), self._read(form, body))
            except ApiError as refusal:
                return refusal
            raise AssertionError("it was not refused")

        return asyncio.run(asyncio.wait_for(error(), 60))

    def _read(self, form: type[schemas.Model], body: dict[str, Any]) -> schemas.Model:
        schemas.check_counts(body, self.limits)
        return schemas.read(form, body)

    def context(self) -> Context:
        """What a handler is given; its log is kept."""
        self.log = {}
        return Context(self.models, self.worker, self.limits, "test", log=self.log)


@contextmanager
def served(chat: ChatModel, **limits: Any) -> Iterator[Asker]:
    """Serve one model as "tiny"."""
    worker = Worker({"tiny": chat}, WorkerLimits(rows=16, kv_tokens=8000, cache_bytes=2**22), Metrics(["tiny"]))
    worker.start()
    try:
        yield Asker({"tiny": ServedModel.of("tiny", chat)}, worker, ServeOptions(**limits))
    finally:
        worker.stop()
