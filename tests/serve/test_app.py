"""The routes that need no model, the state of the service, its log and its metrics."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from prometheus_client.parser import text_string_to_metric_families

from documents import ROOT
from handspun import __version__
from handspun.config.serving import ServeOptions
from handspun.models.load import ChatModel
from handspun.serve.app import Service, log_line, make_app
from handspun.serve.guard import Exchange, Keys
from handspun.serve.metrics import Metrics
from handspun.serve.pages import git_commit
from handspun.serve.routes import ABOUT, ENDPOINTS, with_openapi
from handspun.serve.served import ServedModel
from handspun.serve.worker import Worker, WorkerLimits
from serving import Kitchen, ask, served, wait_until

OPTIONS = ServeOptions(log_requests=False)


@pytest.fixture(scope="module")
def service(worker: Worker, chat: ChatModel) -> Service:
    models = {"tiny": ServedModel.of("tiny", chat), "a/b": ServedModel.of("a/b", chat)}
    return Service(OPTIONS, Metrics(list(models)), Keys([]), models, worker)


@pytest.fixture(scope="module")
def port(service: Service, kitchen: Kitchen) -> Iterator[int]:
    with served(make_app(service, with_openapi([*ABOUT, *kitchen.endpoints()])), OPTIONS) as port:
        yield port


@pytest.fixture
def own_worker(chat: ChatModel) -> Iterator[Worker]:
    worker = Worker({"tiny": chat}, WorkerLimits(kv_tokens=512), Metrics())
    yield worker
    worker.stop()


def test_health_follows_the_service(own_worker: Worker, kitchen: Kitchen) -> None:
    service = Service(OPTIONS, Metrics(), Keys([]))
    with served(make_app(service, [*ABOUT, *kitchen.endpoints()]), OPTIONS) as port:

        def state() -> tuple[int, str, int, str | None]:
            health, answer = ask(port, "/health"), ask(port, "/cook", {})
            return health.status, health.json()["status"], answer.status, answer.headers.get("retry-after")

        assert state() == (503, "loading", 503, "5")
        own_worker.start()
        service.worker = own_worker
        assert state() == (200, "ok", 200, None)
        own_worker.drain()
        assert state() == (503, "draining", 503, "5")
        service.is_draining = True
        assert state() == (503, "draining", 503, "5")


def test_health_says_that_the_engine_failed(chat: ChatModel, kitchen: Kitchen) -> None:
    class Broken(Worker):
        def _take_orders(self) -> None:
            raise RuntimeError("a fault of the engine")

    worker = Broken({"tiny": chat}, WorkerLimits(kv_tokens=512), Metrics())
    service = Service(OPTIONS, Metrics(), Keys([]), worker=worker)
    with served(make_app(service, [*ABOUT, *kitchen.endpoints()]), OPTIONS) as port:
        worker.start()
        wait_until(lambda: worker.state == "failed")
        reply = ask(port, "/health")
        assert (reply.status, reply.json()["status"], reply.code) == (503, "failed", "engine_failed")
        assert ask(port, "/cook", {}).code == "engine_failed"
        assert "handspun_engine_up 0" in ask(port, "/metrics").body.decode()


def test_models_lists_what_is_served(port: int) -> None:
    found = ask(port, "/v1/models").json()
    assert found["object"] == "list"
    assert [model["id"] for model in found["data"]] == ["tiny", "a/b"]
    assert found["data"][0]["object"] == "model"
    assert ask(port, "/v1/models/a/b").json() == found["data"][1]
    assert ask(port, "/v1/models/a%2Fb").json() == found["data"][1]


@pytest.mark.parametrize("name", ["other", "../../etc/passwd", "a", "%2e%2e%2fetc"])
def test_models_of_other_names_are_not_found(port: int, name: str) -> None:
    reply = ask(port, f"/v1/models/{name}")
    assert (reply.status, reply.code, reply.json()["error"]["param"]) == (404, "model_not_found", "model")
    assert "expected one of tiny, a/b" in reply.json()["error"]["message"]


def test_version_names_versions_and_weights(port: int) -> None:
    found = ask(port, "/version").json()
    assert found["version"] == __version__
    assert found["weights"] == {"tiny": "float32", "a/b": "float32"}
    assert found["threads"] >= 1
    assert {"torch", "int8_kernels"} <= set(found)
    assert found["git"] == git_commit()


def test_git_commit_is_the_checkout_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    git_commit.cache_clear()
    assert git_commit() == (head.stdout.strip() or None)
    git_commit.cache_clear()
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr("handspun.__file__", str(tmp_path / "__init__.py"))  # installed, and in no checkout
    assert git_commit() is None
    git_commit.cache_clear()


def test_a_service_can_be_served_again(worker: Worker, kitchen: Kitchen) -> None:
    """In another event loop: an answer waits for nothing that belongs to the first."""
    service = Service(OPTIONS, Metrics(), Keys([]), worker=worker)
    for _ in range(2):
        with served(make_app(service, kitchen.endpoints()), OPTIONS) as port:
            assert ask(port, "/cook", {"text": "Hi"}).json() == {"text": "Hi"}


def test_metrics_count_requests_by_route_and_never_by_a_clients_text(port: int) -> None:
    before = requests(port)
    ask(port, "/cook", {"text": "Hi", "model": "tiny"})
    ask(port, "/cook", {"text": "Hi", "model": 'x"} 1\nforged'})
    ask(port, "/secret/path")
    ask(port, "/v1/models/tiny")
    ask(port, "/v1/models/nobody")
    after = requests(port)
    assert {labels: count - before.get(labels, 0) for labels, count in after.items()} == {
        **dict.fromkeys(before, 0),
        ("/metrics", "200", ""): 1,
        ("/cook", "200", "tiny"): 1,
        ("/cook", "200", ""): 1,
        ("other", "404", ""): 1,
        ("/v1/models/{model}", "200", ""): 1,
        ("/v1/models/{model}", "404", ""): 1,
    }


def requests(port: int) -> dict[tuple[str, str, str], float]:
    reply = ask(port, "/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    [family] = [
        one for one in text_string_to_metric_families(reply.body.decode()) if one.name == "handspun_requests"
    ]
    return {
        (one.labels["endpoint"], one.labels["status"], one.labels["model"]): one.value for one in family.samples
    }


@contextmanager
def served_for_a_test(worker: Worker, kitchen: Kitchen, options: ServeOptions) -> Iterator[int]:
    """A server that ends with the block. A line of its log may be printed after the answer that it is of."""
    service = Service(options, Metrics(), Keys([]), worker=worker)
    with served(make_app(service, [*ABOUT, *kitchen.endpoints()]), options) as port:
        yield port


def test_a_request_is_one_line_of_the_log(
    worker: Worker, kitchen: Kitchen, capfd: pytest.CaptureFixture[str]
) -> None:
    with served_for_a_test(worker, kitchen, ServeOptions()) as port:
        reply = ask(port, "/cook", {"text": "secret", "model": "tiny"})
        ask(port, "/health")
        ask(port, "/metrics")
    [line] = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ POST /cook 200 \d\.\d{3}s "
        rf'{reply.headers["x-request-id"]} model="tiny" prompt_tokens=6',
        line,
    )


def test_a_client_cannot_forge_a_line_of_the_log(
    worker: Worker, kitchen: Kitchen, capfd: pytest.CaptureFixture[str]
) -> None:
    with served_for_a_test(worker, kitchen, ServeOptions()) as port:
        ask(port, "/cook", {"model": "a\n2026-01-01T00:00:00Z POST /forged 200\x1b[31m\x9b\u2028"})
        ask(port, "/a%0Ab%1B[31m%C2%9B?secret=1")
    first, second = capfd.readouterr().err.splitlines()
    assert first.isprintable()
    assert second.isprintable()
    assert 'model="a\\n2026-01-01T00:00:00Z POST /forged 200\\u001b[31m' in first
    assert "GET /a\\nb\\x1b[31m\\x9b 404" in second
    assert "secret" not in second


def test_log_line_leaves_out_what_is_unknown() -> None:
    exchange = Exchange("GET", "/x", False, log={"model": "m", "seed": None, "finish_reason": "stop"}, status=200)
    assert log_line(exchange).endswith(f's {exchange.request_id} model="m" finish_reason="stop"')


def test_no_line_is_printed_if_nobody_wants_it(
    worker: Worker, kitchen: Kitchen, capfd: pytest.CaptureFixture[str]
) -> None:
    with served_for_a_test(worker, kitchen, ServeOptions(log_requests=False)) as port:
        ask(port, "/cook", {})
    assert capfd.readouterr().err == ""


def test_openapi_describes_the_table(port: int) -> None:
    found = ask(port, "/openapi.json").json()
    assert found["openapi"] == "3.1.0"
    assert set(found["paths"]) == {
        *("/health", "/metrics", "/version", "/v1/models", "/v1/models/{model}", "/openapi.json"),
        *("/cook", "/named"),
    }
    cook = found["paths"]["/cook"]["post"]
    assert cook["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Order"}
    assert set(cook["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"400", "401", "413", "415", "429", "503"} <= set(cook["responses"])
    assert found["paths"]["/health"]["get"]["security"] == []
    assert cook["security"] == [{"key": []}]
    assert found["components"]["schemas"]["Order"]["additionalProperties"] is False


def test_openapi_of_the_product_is_valid() -> None:
    [page] = [endpoint.page for endpoint in ENDPOINTS if endpoint.path == "/openapi.json"]
    document = page(None, {}).value  # the same for every service
    OpenAPIV31SpecValidator(document).validate()
    assert len(document["paths"]) > 10


def test_openapi_of_the_product_has_no_dangling_reference() -> None:
    [page] = [endpoint.page for endpoint in ENDPOINTS if endpoint.path == "/openapi.json"]
    document = page(None, {}).value  # the same for every service
    names = re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(names) - set(document["components"]["schemas"]) == set()
    assert "Error" in names


def test_every_route_of_the_product_is_one_method_of_one_path() -> None:
    rows = [(endpoint.method, endpoint.path) for endpoint in ENDPOINTS]
    assert len(set(rows)) == len(rows) > 5
    assert all((one.page is None) == (one.handler is not None) == (one.body is not None) for one in ENDPOINTS)
