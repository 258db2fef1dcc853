"""Processes that are not the same run are one error on all ranks, before anything is trained or saved."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

HELPERS = Path(__file__).parents[1] / "helpers"


def rows(count: int, word: str = "is") -> str:
    return "instruction,output\n" + "".join(f"Say {n}.,It {word} {n}.\n" for n in range(count))


def copied(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def other_models(tiny_folder: Path, folder: Path) -> dict[str, str]:
    """Copies of the model: the same; with another template; with a weight that is a little larger."""
    template = copied(tiny_folder, folder / "template") / "chat_template.jinja"
    template.write_text("{# another #}" + template.read_text())
    weights = copied(tiny_folder, folder / "weights") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    return {"same": str(copied(tiny_folder, folder / "same")), "template": str(template.parent),
            "weights": str(weights.parent)}  # fmt: skip


SAID = {  # case: what the error says besides "rank 0 has" and "rank 1 has"
    "learning rate": "--learning-rate: rank 0 has 0.001, rank 1 has 0.002",
    "epochs": "--num-epochs: rank 0 has 1, rank 1 has 2",
    "shard": "--shard: rank 0 has False, rank 1 has True",
    "system prompt": "--system-prompt: rank 0 has nothing, rank 1 has Be kind.",
    "several options": "--seed: rank 0 has 0, rank 1 has 1",
    "fewer rows": "the training rows (--data): rank 0 has 9 rows of sha256",
    "other text": "the training rows (--data): rank 0 has 9 rows of sha256",
    "held-out rows": "the held-out rows (--eval-data): rank 0 has 2 rows of sha256",
    "template": "the chat template: rank 0 has sha256",
    "weights": "the model's weights (--model): rank 0 has sha256",
    "switch": "ONEDNN_MAX_CPU_ISA: rank 0 has nothing, rank 1 has AVX2",
}


def cases(tiny_folder: Path, folder: Path) -> dict[str, dict[str, Any]]:
    for name, text in (
        ("a", rows(9)),
        ("b", rows(5)),
        ("c", rows(9, "was")),
        ("held", rows(2)),
        ("held2", rows(3)),
    ):
        (folder / f"{name}.csv").write_text(text)
    models = other_models(tiny_folder, folder)
    options = {
        "model": models["same"], "data": str(folder / "a.csv"), "eval_data": str(folder / "held.csv"),
        "threads": 1, "num_epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "dtype": "float32",
        "sample_answers": False, "report_rows": 0,
    }  # fmt: skip
    of_rank_1: dict[str, dict[str, Any]] = {
        "learning rate": {"learning_rate": 2e-3},
        "epochs": {"num_epochs": 2},
        "shard": {"shard": True},
        "system prompt": {"system_prompt": "Be kind."},
        "several options": {"seed": 1, "batch_size": 8, "eval_ratio": 0.1, "eval_data": None},
        "fewer rows": {"data": str(folder / "b.csv")},
        "other text": {"data": str(folder / "c.csv")},
        "held-out rows": {"eval_data": str(folder / "held2.csv")},
        "template": {"model": models["template"]},
        "weights": {"model": models["weights"]},
        "switch": {},
        "the same at other places": {"model": str(tiny_folder), "threads": 2, "cache_examples": False},
    }
    made = {
        name: {"options": {**options, "output_dir": str(folder / name)}, "of_rank_1": others}
        for name, others in of_rank_1.items()
    }
    made["switch"]["switches_of_rank_1"] = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    sharded = {"options": {**options, "shard": True, "output_dir": str(folder / "sharded")}}
    return {"sharded": sharded, **made}  # the first: other runs change the allocator of their process


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def two_ranks(*arguments: list[str], nodes: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
    """Yield two processes with the arguments of each rank, as torchrun would start them on so many machines."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = []
    for rank, own in enumerate(arguments):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        if nodes == 2:
            place |= {"LOCAL_RANK": "0", "GROUP_RANK": str(rank), "LOCAL_WORLD_SIZE": "1"}
        environment = {**os.environ, **shared, **place}
        command, pipe = [sys.executable, *own], subprocess.PIPE
        ranks.append(subprocess.Popen(command, text=True, env=environment, stdout=pipe, stderr=pipe))
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def outcomes(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By case: what each rank ended with."""
    folder = tmp_path_factory.mktemp("differing")
    made = cases(tiny_folder, folder)
    (folder / "cases.json").write_text(json.dumps(list(made.values())))
    driver = [str(HELPERS / "differing_ranks.py"), str(folder / "cases.json")]
    with two_ranks(driver, driver) as ranks:
        printed = [process.communicate(timeout=400) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed
    lines = [[json.loads(line) for line in out.splitlines() if line.startswith('{"type"')] for out, _ in printed]
    by_case = dict(zip(made, map(list, zip(*lines, strict=True)), strict=True))
    for name, of_ranks in by_case.items():
        checkpoints = [path.name for path in (folder / name).glob("checkpoint-*")]
        of_ranks[0]["checkpoints"] = checkpoints
    return by_case


@pytest.mark.slow
@pytest.mark.parametrize("case", SAID)
def test_ranks_that_differ_are_one_error_on_all_of_them(
    outcomes: dict[str, list[dict[str, Any]]], case: str
) -> None:
    first, second = outcomes[case]
    assert first["type"] == second["type"] == "ConfigError"
    assert first["message"] == second["message"]
    assert first["message"].startswith("the ranks do not agree on the run.\n")
    assert SAID[case] in first["message"]
    assert first["checkpoints"] == []


@pytest.mark.slow
def test_each_option_that_differs_is_named(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    message = outcomes["several options"][0]["message"]
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:-1]] == [
        "--eval-ratio", "--batch-size", "--seed",
    ]  # fmt: skip


def test_the_same_files_at_other_places_are_the_same_run(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    first, second = outcomes["the same at other places"]
    assert (first["type"], second["type"]) == (None, None)
    assert sorted(first["checkpoints"]) == ["checkpoint-best", "checkpoint-epoch-1"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_sharded_run_gives_freed_memory_back(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """Each layer's whole weights are freed after use: kept, they took a quarter more."""
    assert [rank["type"] for rank in outcomes["sharded"]] == [None, None]
    assert min(rank["faults"] for rank in outcomes["sharded"]) > 100
    assert max(rank["faults"] for rank in outcomes["the same at other places"]) < 100


def command(tiny_folder: Path, folder: Path, data: str) -> list[str]:
    return [
        *("-m", "handspun", "train", "--model", str(tiny_folder), "--data", str(folder / data), "--threads", "1"),
        *("--output-dir", str(folder / "output"), "--dtype", "float32", "--no-sample-answers"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_an_error_of_one_rank_reaches_the_others(tiny_folder: Path, tmp_path: Path, nodes: int) -> None:
    """Also from another machine, where nothing but the connection tells of a process's end."""
    (tmp_path / "a.csv").write_text(rows(9))
    commands = [command(tiny_folder, tmp_path, data) for data in ("a.csv", "missing.csv")]
    with two_ranks(*commands, nodes=nodes) as ranks:
        _, errors = ranks[0].communicate(timeout=400)
        _, own = ranks[1].communicate(timeout=200)
    assert [process.returncode for process in ranks] == [2, 2]
    cause = f"{tmp_path / 'missing.csv'}: there is no such file or folder"
    assert f"error: rank 1 failed, so this run stops: {cause}" in errors
    assert f"error on rank 1: {cause}" in own
    assert not (tmp_path / "output" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_rank_that_is_killed_before_the_loop_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    """It waits for its rows in a pipe; the other one waits for it."""
    (tmp_path / "a.csv").write_text(rows(9))
    waiting = (
        "import os, sys, time; from handspun.runs import train as run; from handspun.cli import main\n"
        "run.check_data_exists = lambda *_: (print('waits', flush=True), time.sleep(100))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    first = command(tiny_folder, tmp_path, "a.csv")
    with two_ranks(first, ["-c", waiting, *first[2:]]) as ranks:
        assert ranks[1].stdout is not None
        assert ranks[1].stdout.readline() == "waits\n"
        began = time.monotonic()
        ranks[1].send_signal(signal.SIGKILL)
        ranks[1].wait()
        _, errors = ranks[0].communicate(timeout=200)
        seconds = time.monotonic() - began
    assert ranks[0].returncode == 2
    assert f"error: rank 1 (process {ranks[1].pid}) " in errors
    assert "so this run stops" in errors
    assert seconds < 100
