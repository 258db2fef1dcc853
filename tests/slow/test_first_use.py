"""Several processes that use an empty cache for the first time at once: all succeed, with the same content, and
what lies there under its name is whole."""

import hashlib
import json
import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from handspun.config import DataConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import ExampleCache, load_splits
from handspun.models import embedded
from tiny import tiny_tokenizer

PROCESSES = 3
ROUNDS = 5


def use_everything(folder: str, at_once: Barrier, results: Any) -> None:
    """One process: each cache for the first time, several times over."""
    os.environ["XDG_CACHE_HOME"] = folder
    embedded.dequantize = write_slowly
    template = ChatTemplate(tiny_tokenizer())
    found: dict[str, list[str]] = {"examples": [], "embedded": []}
    for i in range(ROUNDS):
        os.environ["XDG_CACHE_HOME"] = f"{folder}/{i}"
        at_once.wait()
        found["examples"].append(examples(f"{folder}/rows.jsonl", Path(folder) / str(i) / "examples", template))
        at_once.wait()
        found["embedded"].append(content(embedded.embedded_folder()))
    results.put(found)


def write_slowly(gguf: Path, folder: Path) -> None:
    """In place of 20 seconds of dequantizing: three files, with time between them for others to look."""
    assert gguf.exists()
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        with (folder / name).open("wb") as file:
            for part in range(5):
                file.write(f"{name} {part}\n".encode() * 1000)
                file.flush()
                time.sleep(0.002)


def examples(rows: str, folder: Path, template: ChatTemplate) -> str:
    made, _ = load_splits(DataConfig(data=rows), template, max_length=100, cache=ExampleCache(folder))
    arrays = (made.examples.input_ids, made.examples.loss_mask, made.examples.starts, made.examples.rows)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def content(path: Path) -> str:
    """Of a file, or of all files of a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(200)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, list[str]]]:
    """What each process found."""
    spawn = multiprocessing.get_context("spawn")
    at_once, results = spawn.Barrier(PROCESSES, timeout=120), spawn.Queue()
    arguments = (str(folder), at_once, results)
    processes = [spawn.Process(target=use_everything, args=arguments) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    gathered = [results.get(timeout=180) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    return gathered


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["examples", "embedded"])
def test_all_processes_find_the_same_and_it_is_whole(
    found: list[dict[str, list[str]]], folder: Path, tmp_path: Path, cache: str
) -> None:
    if cache == "examples":
        whole = examples(str(folder / "rows.jsonl"), tmp_path / "alone", ChatTemplate(tiny_tokenizer()))
    else:
        write_slowly(embedded.embedded_gguf(), tmp_path / "alone")
        whole = content(tmp_path / "alone")
    assert {digest for process in found for digest in process[cache]} == {whole}
    assert [len(process[cache]) for process in found] == [ROUNDS] * PROCESSES


def test_nothing_half_made_is_left(found: list[dict[str, list[str]]], folder: Path) -> None:
    assert found
    for i in range(ROUNDS):
        [model] = (folder / str(i) / "handspun").iterdir()
        assert len(list(model.iterdir())) == 3
        [examples_set] = (folder / str(i) / "examples").iterdir()
        assert ExampleCache(folder / str(i) / "examples").find(examples_set.name) is not None
