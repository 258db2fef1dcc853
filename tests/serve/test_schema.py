"""/openapi.json: valid, and true. Requests made from it, right and wrong ones, never make the server fail."""

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


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(served_chat(max_position_embeddings=96), kv_tokens=4000) as server:
        yield server


def test_the_document_is_valid_and_has_every_route(server: Live) -> None:
    document = ask(server.port, "/openapi.json").json()
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
def test_no_request_made_from_the_document_makes_the_server_fail(
    server: Live, options: list[str], tmp_path: Path
) -> None:
    command = [str(SCHEMATHESIS), "run", f"http://127.0.0.1:{server.port}/openapi.json", "--mode", "all", *options]
    more = ["--checks", "not_a_server_error", "--seed", "1", "--continue-on-failure"]
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    [sent] = re.findall(r"(\d+) generated, \1 passed", done.stdout)
    assert int(sent) > 30
    assert server.service.state == "ready"
    wait_until(server.is_idle)
