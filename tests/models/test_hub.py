"""A hub's model over real sockets: a small server answers as the hub does."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from handspun.cli import main
from handspun.errors import ModelError
from handspun.models.load import model_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves one folder as nobody/tiny, and keeps what was asked."""

    def __init__(self, folder: Path):
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(b"")

            def do_GET(self) -> None:
                self.answer(None)

            def answer(self, body: bytes | None) -> None:
                asked.append(f"{self.command} {self.path}")
                head = body is not None
                if self.path.startswith("/api/models/nobody/tiny"):
                    files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                    content = json.dumps({"id": "nobody/tiny", "sha": COMMIT, "siblings": files}).encode()
                    if "/tree/" in self.path:
                        content = b"[]"
                elif self.path.startswith("/nobody/tiny/resolve/") and (folder / Path(self.path).name).is_file():
                    content = (folder / Path(self.path).name).read_bytes()
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if not head:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.asked = asked
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[Hub]:
    hub = Hub(tiny_folder)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def run(arguments: list[str], endpoint: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "TQDM_POSITION": "-1"}  # bars as on a terminal
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_models_weights_are_downloaded_once_with_a_bar(hub: Hub, tmp_path: Path) -> None:
    arguments = ["-m", "handspun", "generate", "--model", "nobody/tiny", "--max-new-tokens", "2", "Hi"]
    first = run(arguments, hub.address, tmp_path)
    assert first.returncode == 0, first.stderr
    assert "model.safetensors" in first.stderr or "Fetching" in first.stderr
    downloads = [line for line in hub.asked if line.startswith("GET") and line.endswith("model.safetensors")]
    assert len(downloads) == 1
    assert run(arguments, hub.address, tmp_path).stdout == first.stdout
    assert [line for line in hub.asked if line.startswith("GET") and line.endswith(".safetensors")] == downloads


# Each in a process of its own, forked from one that has imported what takes seconds.
EACH = """
import os, sys
import torch, transformers
from handspun.cli import main
for command in (one.split() for one in sys.argv[1:]):
    if (process := os.fork()) == 0:
        with open(f"{command[0]}.log", "wb", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            status = main([command[0], "--model", "nobody/tiny", *command[1:]])
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_hub_that_is_not_there_is_asked_once(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("instruction,output\n" + "Say hi.,Hi.\nSay no.,No.\n" * 4)
    commands = ["generate Hi", "eval --data train.csv", "preflight --data train.csv"]
    commands += ["train --data train.csv --output-dir out", "export --merge --output-dir out"]
    done = run(["-c", EACH, *commands], "http://127.0.0.1:9", tmp_path)
    assert done.stdout.split() == ["2"] * len(commands), done.stderr
    for command in commands:
        said = (tmp_path / f"{command.split()[0]}.log").read_text()
        assert "Retry" not in said
        assert "thrown while requesting" not in said
        assert said.count("the hub does not answer") == 1
        assert said.count("nobody/tiny cannot be downloaded from the hub") == 1


@pytest.mark.parametrize("command", ["preview", "train"])
@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"Frage;Antwort\nWo?;Da\n", "the columns fit no format"),
        ("question,answer\nMünchen?,Ja\n".encode("latin-1"), "UTF-8"),
        (b"PK\x03\x04", "it is a workbook"),
    ],
    ids=["columns", "encoding", "Excel"],
)
def test_rows_that_cannot_be_used_are_an_error_before_the_hub_is_asked(
    command: str, content: bytes, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ("rows.xlsx" if content.startswith(b"PK") else "rows.csv")
    file.write_bytes(content)
    output = ["--output-dir", str(tmp_path / "output")] if command == "train" else []
    assert main([command, str(file), "--model", "nobody/tiny", *output]) == 2
    printed = capsys.readouterr()
    assert error in printed.err
    assert "hub" not in printed.out + printed.err.replace("dataset on the hub", "")
    assert not (tmp_path / "output").exists()


def test_what_looks_like_a_path_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint-best", "checkpoint-epoch-10", "checkpoint-epoch-9", "notes"):
        (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(ModelError, match="in out: checkpoint-best, checkpoint-epoch-9, checkpoint-epoch-10\\)"):
        model_source("out/checkpoint-epoch-11")
    with pytest.raises(ModelError, match="no such folder or file, and not a hub id"):
        model_source("absent/checkpoint-best")
    with pytest.raises(ModelError, match="no such folder or file, and not a hub id"):
        model_source("./absent")
