"""`handspun verify-resume`: kills that come, weights that are compared, and a difference that is said."""

import json
import random
from pathlib import Path

import pytest

import handspun
from handspun.cli import main
from handspun.display import captured_log
from handspun.errors import TrainingError
from handspun.verification import resume_check as killed
from handspun.verification.resume_check import Comparison, kill_and_compare

ROWS = "instruction,input,output\n" + "".join(f"Say {n}.,,It is {n}.\n" for n in range(60))


@pytest.mark.slow
def test_a_run_that_is_killed_twice_is_compared_with_one_that_is_not(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(ROWS, encoding="utf-8")
    config = handspun.TrainConfig(
        model=str(tiny_folder), data=str(tmp_path / "train.csv"), threads=1, batch_size=4, dtype="float32"
    )
    with captured_log() as log:
        compared = kill_and_compare(config, steps=10, kills=2, rng=random.Random(0))
    assert compared.same
    assert list(compared.undisturbed) == [f"checkpoint-epoch-{n}/model.safetensors" for n in (1, 2)]
    assert compared.kills
    assert all(step >= 1 for step in compared.kills)
    assert log[0] == "uninterrupted run: 10 steps"
    assert not (tmp_path / "output").exists()


def test_a_run_that_is_killed_while_it_writes_its_report_has_finished(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started again it would be refused: its weights are there to be compared."""
    (tmp_path / "train.csv").write_text(ROWS, encoding="utf-8")
    config = handspun.TrainConfig(model=str(tiny_folder), data=str(tmp_path / "train.csv"), batch_size=4)
    started: list[str] = []

    def train(made: handspun.TrainConfig, _work: Path, *, kill_after: object = None) -> int:
        started.append(made.output_dir)
        Path(made.output_dir).mkdir()
        event = {"event": "step", "step": 3, "seconds": 0.01}
        (Path(made.output_dir) / "metrics.jsonl").write_text(json.dumps(event) + "\n")
        (Path(made.output_dir) / "run.json").write_text('{"status": "finished"}')
        return -9 if kill_after else 0

    monkeypatch.setattr(killed, "_train", train)
    with captured_log() as log:
        compared = kill_and_compare(config, steps=4, kills=2, rng=random.Random(0))
    assert compared.same
    assert compared.kills == []
    assert log[-1] == "the run finished before the next kill"
    assert [Path(name).name for name in started] == ["undisturbed", "killed"]


@pytest.mark.slow
def test_a_run_that_fails_by_itself_is_said_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(ROWS, encoding="utf-8")
    config = handspun.TrainConfig(model=str(tmp_path / "nothing"), data=str(tmp_path / "train.csv"))
    with pytest.raises(
        TrainingError, match=r"failed by itself with exit code 2\. Its last output:\nerror: there is no model"
    ):
        kill_and_compare(config, steps=4, kills=1, rng=random.Random(0))


@pytest.mark.parametrize("same", [True, False])
def test_a_difference_is_exit_code_1(
    same: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "checkpoint-epoch-1/model.safetensors"
    compared = Comparison([3, 7], {name: "a" * 64}, {name: ("a" if same else "b") * 64})
    monkeypatch.setattr(killed, "kill_and_compare", lambda *_, **__: compared)
    assert compared.same == same
    if same:
        assert main(["verify-resume", "--model", "M", "--data", "D"]) == 0
    else:
        with pytest.raises(SystemExit, match="1"):
            main(["verify-resume", "--model", "M", "--data", "D"])
    printed = capsys.readouterr().out
    assert ("After 2 kills, the weights are bit-identical" in printed) == same
    assert ("DIFFERENT" in printed) != same
