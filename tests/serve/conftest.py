"""A tiny model's engine, handlers that answer without it, and a server of all routes."""

from collections.abc import Iterator

import pytest

from handspun.config.serving import KEY_VARIABLE, ServeOptions
from handspun.models.load import ChatModel
from handspun.serve.app import Service, make_app
from handspun.serve.guard import Keys
from handspun.serve.metrics import Metrics
from handspun.serve.routes import ENDPOINTS
from handspun.serve.served import ServedModel
from handspun.serve.worker import Worker, WorkerLimits
from serving import Kitchen, served
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture(scope="session")
def chat() -> ChatModel:
    return ChatModel(tiny_model("qwen2", initializer_range=0.02), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def worker(chat: ChatModel) -> Iterator[Worker]:
    worker = Worker({"tiny": chat}, WorkerLimits(kv_tokens=512), Metrics(["tiny"]))
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def kitchen() -> Kitchen:
    return Kitchen()


@pytest.fixture(scope="module")
def product(chat: ChatModel) -> Iterator[int]:
    """The port of a server with all routes and two models."""
    models = {name: ServedModel.of(name, chat) for name in ("tuned", "base")}
    metrics = Metrics(list(models))
    worker = Worker({name: one.chat for name, one in models.items()}, WorkerLimits(kv_tokens=4096), metrics)
    worker.start()
    options = ServeOptions(log_requests=False)
    with served(make_app(Service(options, metrics, Keys([]), models, worker), ENDPOINTS), options) as port:
        yield port
    worker.stop()
