"""Two and three processes give what one gives, replicated and sharded: losses, gradient norms, weights, files."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import handspun
from handspun.data.examples import Example
from handspun.errors import ConfigError
from handspun.models.lora import add_lora
from handspun.training.batching import Batching
from handspun.training.distributed import EMPTY_EXAMPLE, Distributed, partition_by_tokens, processes_of_this_run
from handspun.training.runner import BatchRunner, select_runner
from tiny import tiny_model

HELPERS = Path(__file__).parents[1] / "helpers"

ROWS = "instruction,input,output\n" + "".join(
    f"Say {n} {'and more ' * (n % 5)}.,,It is {n}{' or so' * (n % 4)}.\n" for n in range(41)
)
BATCHING = {"packed": {}, "padded": {"batching": "padded"}}
TRAINED = {"full": {}, "LoRA": {"lora": True}}
HELD = {
    "replicated": {},
    "sharded": {"shard": True},
    "sharded, computed again": {"shard": True, "activation_checkpointing": True},
}
CASES = [
    *itertools.product(BATCHING, TRAINED, ["replicated", "sharded"]),
    ("packed", "full", "sharded, computed again"),
]
UNEVEN = [("packed", "full", "replicated"), ("packed", "full", "sharded"), ("padded", "LoRA", "sharded")]
"""What three processes try too: their shares of a batch are uneven."""
RUNS = [*((2, *case) for case in CASES), *((3, *case) for case in UNEVEN)]


def example(length: int, row: int) -> Example:
    return Example([1] * length, [False] + [True] * (length - 1), "a", row)


def test_a_deal_balances_tokens_and_loses_no_row() -> None:
    rows = [example(length, row) for row, length in enumerate([9, 2, 3, 8, 5, 7])]
    hands = partition_by_tokens(rows, 2)
    assert sorted(e.row for hand in hands for e in hand) == list(range(6))
    assert [sum(map(len, hand)) for hand in hands] == [17, 17]
    assert [len(hand) for hand in partition_by_tokens(rows[:1], 3)] == [1, 0, 0]


def test_one_process_keeps_the_order() -> None:
    rows = [example(length, row) for row, length in enumerate([2, 9, 3])]
    assert Distributed().local_micro_batches(rows, Batching("packed"), 100) == [rows]


def test_sharded_ranks_have_equally_many_micro_batches_some_of_them_empty() -> None:
    rows = [example(9, 0), example(8, 1), example(3, 2)]

    for sharded, counts in ((False, [1, 1, 1, 0]), (True, [1, 1, 1, 1])):
        made = [
            Distributed(rank, 4, sharded).local_micro_batches(rows, Batching("packed"), 1) for rank in range(4)
        ]
        assert list(map(len, made)) == counts
    assert made[3] == [[EMPTY_EXAMPLE]]


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with (
        pytest.raises(ConfigError, match="started 2 processes, but this machine has 1 GPUs"),
        processes_of_this_run(torch.device("cuda")),
    ):
        pass


@pytest.mark.parametrize(("batching", "lora"), list(itertools.product(BATCHING, (False, True))))
def test_an_empty_micro_batch_has_a_gradient_of_zeros_for_all_that_is_trained(batching: Any, lora: bool) -> None:
    """A rank that left one out would wait for the others in another collective than they for it."""
    model = tiny_model("qwen2")
    if lora:
        model = add_lora(model, "tiny", rank=4, alpha=8, dropout=0.0, new_token_ids=[5])
    config = handspun.TrainConfig(batching=batching, lora=lora)
    runner: BatchRunner
    with select_runner(
        model, config, [example(5, 0), example(7, 1)], dtype=torch.float32, pad_token_id=0
    ) as runner:
        assert runner.loss([EMPTY_EXAMPLE]) == runner.backward([EMPTY_EXAMPLE], 5) == 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": True}, "shard=True splits the model over several processes, but this is a single process"),
        ({"shard": True, "lora": True, "base_weights": "int8"}, "shard=True cannot split int8 weights"),
    ],
)
def test_what_cannot_be_sharded_is_said(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        handspun.train(handspun.TrainConfig(output_dir=str(tmp_path / "output"), **options))
    assert not (tmp_path / "output").exists()


def configs(
    kernel_folder: Path, folder: Path, processes: int, cases: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], Any]:
    """By case: options of 10 steps. An epoch's last batch is one row, and micro-batches hold one to five."""
    (folder / "train.csv").write_text(ROWS, encoding="utf-8")
    common = {
        "model": str(kernel_folder),
        "data": str(folder / "train.csv"),
        "eval_ratio": 0.1,
        "dtype": "float32",
    }
    common |= {"num_epochs": 2, "batch_size": 9, "max_tokens": 128, "learning_rate": 1e-3, "threads": 1}
    common |= {"sample_answers": False, "report_rows": 0}
    return {
        case: {
            **common,
            **BATCHING[case[0]],
            **TRAINED[case[1]],
            **HELD[case[2]],
            "output_dir": str(folder / f"{processes}-{'-'.join(case)}"),
        }
        for case in cases
    }


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments]
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def made(kernel_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of all cases with two and three processes, and of one process."""
    folder = tmp_path_factory.mktemp("runs")
    for options in configs(kernel_folder, folder, 1, [case for case in CASES if case[2] == "replicated"]).values():
        handspun.train(handspun.TrainConfig(**options))
    for processes in (2, 3):
        runs = list(
            configs(kernel_folder, folder, processes, [case[1:] for case in RUNS if case[0] == processes]).values()
        )
        (folder / "configs.json").write_text(json.dumps(runs))
        done = torchrun(processes, str(HELPERS / "several_runs.py"), str(folder / "configs.json"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("finished in") == len(runs)  # one log a run
    return folder


def steps(output: Path) -> list[dict[str, float]]:
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "batching", "trained", "held"), RUNS)
def test_processes_change_nothing(made: Path, processes: int, batching: str, trained: str, held: str) -> None:
    alone = made / f"1-{batching}-{trained}-replicated"
    output = made / f"{processes}-{batching}-{trained}-{held}"
    expected, found = steps(alone), steps(output)
    assert len(expected) == 10
    for key in ("loss", "grad_norm"):
        assert [s[key] for s in found] == pytest.approx([s[key] for s in expected], rel=1e-5)
    assert [s["learned_tokens"] for s in found] == [s["learned_tokens"] for s in expected]
    assert {str(p.relative_to(output)) for p in output.rglob("*")} == {
        str(p.relative_to(alone)) for p in alone.rglob("*")
    }
    name = "adapter_model.safetensors" if trained == "LoRA" else "model.safetensors"
    weights = load_file(alone / "checkpoint-epoch-2" / name)
    saved = load_file(output / "checkpoint-epoch-2" / name)
    assert saved.keys() == weights.keys()
    for key, tensor in saved.items():
        torch.testing.assert_close(tensor, weights[key], rtol=1e-5, atol=1e-5)
    records = [json.loads((folder / "run.json").read_text()) for folder in (alone, output)]
    assert records[1]["processes"] == processes
    losses = [[evaluation["loss"] for evaluation in record["evaluations"]] for record in records]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
