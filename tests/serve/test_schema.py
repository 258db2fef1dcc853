"""/openapi.json: valid, and true. Requests made from it, right and wrong ones, are answered as it says."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openapi_spec_validator import validate

from asking import served_chat
from live import Live, live
from serving import ask, wait_until

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
KEY = "the-key"
NOT_CHECKED = "positive_data_acceptance"
"""A document says which values a field takes, but not which fields exclude each other, or how many tokens fit."""


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(served_chat(max_position_embeddings=96), kv_tokens=4000, keys=[KEY]) as server:
        yield server


def test_the_document_is_valid_and_has_every_route(server: Live) -> None:
    document = ask(server.port, "/openapi.json", None, ("X-Api-Key", KEY)).json()
    validate(document)
    assert document["openapi"].startswith("3.1")
    assert len(document["paths"]) == 15


@pytest.mark.parametrize(
    "options",
    [
        ["--phases", "fuzzing", "--max-examples", "10", "--no-shrink", "--suppress-health-check", "all"],
        ["--phases", "coverage", "--include-path", "/detokenize"],
    ],
    ids=["fuzzing", "coverage"],
)
def test_requests_made_from_the_document_are_answered_as_it_says(
    server: Live, options: list[str], tmp_path: Path
) -> None:
    """Statuses, types and forms of answers; wrong bodies, methods and keys are refused; nothing fails."""
    command = [str(SCHEMATHESIS), "run", f"http://127.0.0.1:{server.port}/openapi.json", "--mode", "all", *options]
    more = ["--checks", "all", "--exclude-checks", NOT_CHECKED, "--header", f"Authorization: Bearer {KEY}"]
    more += ["--seed", "1", "--continue-on-failure"]
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    [sent] = re.findall(r"(\d+) generated, \1 passed(?:, \d+ skipped)?", done.stdout)
    assert int(sent) > 30
    assert server.service.state == "ready"
    headers = ("X-Api-Key", KEY)
    wait_until(lambda: "\nhandspun_running 0\n" in ask(server.port, "/metrics", None, headers).body.decode())
