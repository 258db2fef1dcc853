"""/openapi.json: valid, and true. Requests made from it, right and wrong ones, never make the server fail."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from openapi_spec_validator import validate
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from live import Live, live, live_chat
from serving import ask


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(live_chat()) as server:
        yield server


@pytest.fixture(scope="module")
def document(server: Live) -> dict[str, Any]:
    found: dict[str, Any] = ask(server.port, "/openapi.json").json()
    return found


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)
