"""A tiny model's engine, which no request of these tests reaches, and the handlers that answer instead."""

from collections.abc import Iterator

import pytest

from handspun.config.serving import KEY_VARIABLE
from handspun.models.load import ChatModel
from handspun.serve.metrics import Metrics
from handspun.serve.worker import Worker, WorkerLimits
from serving import Kitchen
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
