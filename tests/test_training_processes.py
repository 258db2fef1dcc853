"""Two and three processes give what one gives: losses, gradient norms, weights, and the same files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from handspun.data.examples import Example
from handspun.training.processes import Processes, deal

ROWS = "instruction,input,output\n" + "".join(
    f"Say {n} {'and more ' * (n % 5)}.,,It is {n}{' or so' * (n % 4)}.\n" for n in range(41)
)


def example(length: int, row: int) -> Example:
    return Example([1] * length, [False] + [True] * (length - 1), "a", row)


def test_a_deal_balances_tokens_and_loses_no_row() -> None:
    rows = [example(length, row) for row, length in enumerate([9, 2, 3, 8, 5, 7])]
    hands = deal(rows, 2)
    assert sorted(e.row for hand in hands for e in hand) == list(range(6))
    assert [sum(map(len, hand)) for hand in hands] == [17, 17]
    assert [len(hand) for hand in deal(rows[:1], 3)] == [1, 0, 0]


def test_one_process_keeps_the_order() -> None:
    rows = [example(length, row) for row, length in enumerate([2, 9, 3])]
    assert Processes().deal(rows) == rows


def run(tiny_folder: Path, folder: Path, processes: int, *options: str) -> Path:
    """`handspun train` under torchrun; its output folder."""
    output = folder / f"output-{processes}"
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    command = [
        *(sys.executable, *launcher, "-m", "handspun", "train", "--model", str(tiny_folder)),
        *("--data", str(folder / "train.csv"), "--output-dir", str(output), "--num-epochs", "4"),
        *("--batch-size", "8", "--learning-rate", "1e-3", "--eval-ratio", "0.1", "--dtype", "float32", *options),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished in") == 1  # one log
    return output


def steps(output: Path) -> list[dict[str, float]]:
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "step"]


@pytest.mark.parametrize("options", [(), ("--batching", "padded", "--lora")], ids=["packed, full", "padded, LoRA"])
def test_processes_change_nothing(tiny_folder: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Twenty steps; the last batch of an epoch has fewer rows than there are processes times two."""
    (tmp_path / "train.csv").write_text(ROWS, encoding="utf-8")
    alone = run(tiny_folder, tmp_path, 1, *options)
    expected = steps(alone)
    assert len(expected) == 20
    name = "adapter_model.safetensors" if "--lora" in options else "model.safetensors"
    weights = load_file(alone / "checkpoint-epoch-4" / name)
    for processes in (2, 3):
        output = run(tiny_folder, tmp_path, processes, *options)
        found = steps(output)
        for key in ("loss", "grad_norm"):
            assert [s[key] for s in found] == pytest.approx([s[key] for s in expected], rel=1e-5)
        assert [s["learned_tokens"] for s in found] == [s["learned_tokens"] for s in expected]
        assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in alone.iterdir())
        for key, tensor in load_file(output / "checkpoint-epoch-4" / name).items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-5, atol=1e-5)
        assert json.loads((output / "run.json").read_text())["processes"] == processes
