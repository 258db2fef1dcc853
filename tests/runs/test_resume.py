"""A run that was ended at any moment goes on, and ends with the very weights of one that nobody disturbed."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from handspun.errors import ConfigError, OutputError, TrainingError
from handspun.runs import train as run_module
from handspun.training.checkpoint import TRAINING_STATE, is_checkpoint
from handspun.training.loop import Event, Loop, TrainingState
from interrupted_runs import ROWS, Crash, config, crash, events, train, weights

HELPERS = Path(__file__).parents[1] / "helpers"

LORA = {"lora": True, "lora_dropout": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full padded": {"batching": "padded"},
    "LoRA with dropout": LORA,
    "LoRA padded": {**LORA, "batching": "padded"},
    "LoRA on two layers, int8 base": {
        "lora": True,
        "base_weights": "int8",
        "lora_target_modules": ("q_proj", "up_proj"),
    },
    "int8 base, computed again": {"lora": True, "base_weights": "int8", "activation_checkpointing": True},
    "states in 8 bits": {"optimizer_states": "8bit"},
    "states in bfloat16": {"optimizer_states": "bfloat16"},
    "saved in bfloat16": {"save_dtype": "bfloat16"},
    "matmuls in bfloat16": {"dtype": "bfloat16"},
    "computed again": {"activation_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_a_run_that_nobody_disturbed(
    kernel_folder: Path, data: Path, crash_after: Callable[[int], None], kind: str
) -> None:
    """Ended in the middle of an epoch and right after one, and of plain weights before anything new was saved."""
    options = {**KINDS[kind], "save_steps": 3, "keep_last": 2}
    train(config(kernel_folder, data, "whole", **options))
    again = config(kernel_folder, data, "again", **options)
    ends = (4, 5, 5, 13) if kind == "full" else (5, 13)
    for step in ends:
        crash_after(step)
        crash(again)
    crash_after(15)
    said = train(again)
    whole, output = data.with_name("whole"), data.with_name("again")
    assert "resuming after step 12 of 15" in said
    assert weights(output) == weights(whole)
    assert events(output) == events(whole)
    records = [json.loads((folder / "run.json").read_text()) for folder in (whole, output)]
    for key in ("status", "evaluations", "checkpoints", "best_checkpoint", "config", "data"):
        if key == "config":
            records[1][key]["output_dir"] = records[0][key]["output_dir"]
        assert records[1][key] == records[0][key]
    assert [resumed["step"] for resumed in records[1]["resumed"]] == ([3, 5, 5, 12] if kind == "full" else [5, 12])
    assert not any(resumed["changes"] for resumed in records[1]["resumed"])


@pytest.mark.slow
def test_several_files_a_limit_and_a_last_step_resume_to_the_same_bits(
    tiny_folder: Path, data: Path, crash_after: Callable[[int], None]
) -> None:
    """20 conversations and the first 4 of 8 texts make 6 steps per epoch; the run ends one step later."""
    texts = data.with_name("texts.jsonl")
    texts.write_text("".join(f'{{"text": "It is {n}. {"So it is. " * n}"}}\n' for n in range(8)), encoding="utf-8")
    options = {"limit": 24, "max_steps": 7, "save_steps": 2, "eval_ratio": 0.0, "eval_data": str(data)}
    whole, again = (
        replace(config(tiny_folder, data, name, **options), data=(str(data), str(texts)))
        for name in ("whole", "again")
    )
    assert "24 examples x 3 epochs in batches of 4: 7 steps of 18 (--max-steps)" in train(whole)
    for step in (3, 6):
        crash_after(step)
        crash(again)
    crash_after(15)
    assert "resuming after step 6 of 7" in train(again)
    folders = [data.with_name(name) for name in ("whole", "again")]
    assert weights(folders[0]) == weights(folders[1])
    assert events(folders[0]) == events(folders[1])
    assert {path.name for path in folders[1].glob("checkpoint-epoch-*")} == {
        "checkpoint-epoch-1",
        "checkpoint-epoch-2",
    }
    records = [json.loads((folder / "run.json").read_text()) for folder in folders]
    assert records[0]["data"] == records[1]["data"]
    assert records[1]["config"]["data"] == [str(data), str(texts)]
    assert (records[1]["config"]["limit"], records[1]["plan"]["steps"]) == (24, 7)
    other = replace(again, max_steps=9)
    with pytest.raises(ConfigError, match="--max-steps: 7 then, 9 now"):
        train(replace(other, resume=True))


def test_a_finished_run_keeps_models_and_nothing_to_resume_from(tiny_folder: Path, data: Path) -> None:
    for save_steps, steps in ((None, set()), (2, {"checkpoint-step-12", "checkpoint-step-14"})):
        train(config(tiny_folder, data, "output", save_steps=save_steps, keep_last=4, overwrite=True))
        output = data.with_name("output")
        assert not list(output.glob(f"*/*{TRAINING_STATE}*"))
        names = {path.name for path in output.glob("checkpoint-*")}
        assert names == {*(f"checkpoint-epoch-{n}" for n in (1, 2, 3)), "checkpoint-best"} | steps
        assert all(map(is_checkpoint, output.glob("checkpoint-*")))


def test_only_the_last_ones_can_be_resumed_from(
    tiny_folder: Path, data: Path, crash_after: Callable[[int], None]
) -> None:
    crash_after(13)
    crash(config(tiny_folder, data, "output", save_steps=3, keep_last=2))
    output = data.with_name("output")
    with_state = {path.parent.name for path in output.glob(f"*/{TRAINING_STATE}")}
    assert with_state == {"checkpoint-step-12", "checkpoint-epoch-2"}
    assert {path.name for path in output.glob("checkpoint-*")} >= with_state | {"checkpoint-epoch-1"}
    state, model = output / "checkpoint-step-12" / TRAINING_STATE, output / "checkpoint-step-12"
    same_file = (state / "weights.safetensors").stat().st_ino == (model / "model.safetensors").stat().st_ino
    assert same_file, "the weights lie on the disk twice"


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{TRAINING_STATE}/optimizer.safetensors", "model.safetensors"])
def test_a_checkpoint_with_a_changed_byte_is_named_and_the_one_before_it_is_used(
    tiny_folder: Path, data: Path, crash_after: Callable[[int], None], name: str
) -> None:
    train(config(tiny_folder, data, "whole"))
    made = config(tiny_folder, data, "again", save_steps=3)
    crash_after(13)
    crash(made)
    damaged = data.with_name("again") / "checkpoint-step-12" / name
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    crash_after(15)
    said = train(made)
    assert (
        f"{damaged} is not as it was saved: checkpoint-step-12 is not used, but the checkpoint before it" in said
    )
    assert "resuming after step 10 of 15" in said
    expected = weights(data.with_name("whole"))
    found = weights(data.with_name("again"))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.slow
def test_without_a_checkpoint_it_begins_again(
    tiny_folder: Path, data: Path, crash_after: Callable[[int], None]
) -> None:
    train(config(tiny_folder, data, "whole"))
    made = config(tiny_folder, data, "again")
    crash_after(3)
    crash(made)
    crash_after(15)
    assert "was ended before its first checkpoint: it starts over" in train(made)
    assert weights(data.with_name("again")) == weights(data.with_name("whole"))
    assert events(data.with_name("again")) == events(data.with_name("whole"))


def test_another_configuration_is_an_error_that_lists_all_differences(
    tiny_folder: Path, data: Path, crash_after: Callable[[int], None]
) -> None:
    crash_after(7)
    crash(config(tiny_folder, data, "output"))
    data.write_text(ROWS.replace("It is 7", "It was 7"), encoding="utf-8")
    with pytest.raises(ConfigError, match="holds an unfinished run, but this run differs") as raised:
        train(config(tiny_folder, data, "output", learning_rate=2e-3, batch_size=2, max_tokens=64))
    message = str(raised.value)
    assert "--learning-rate: 0.001 then, 0.002 now" in message
    assert "--batch-size: 4 then, 2 now" in message
    assert "train rows (sha256): " in message
    assert "--max-tokens" not in message
    assert "--overwrite" in message
    assert (data.with_name("output") / "checkpoint-epoch-1" / TRAINING_STATE).exists()
    crash_after(15)
    train(config(tiny_folder, data, "output", learning_rate=2e-3, overwrite=True))


@pytest.mark.slow
def test_another_cut_of_the_batches_is_said_and_changes_only_the_rounding(
    tiny_folder: Path, data: Path, crash_after: Callable[[int], None]
) -> None:
    train(config(tiny_folder, data, "whole"))
    crash_after(7)
    crash(config(tiny_folder, data, "again"))
    crash_after(15)
    said = train(config(tiny_folder, data, "again", max_tokens=48))
    assert "--max-tokens was 96 and is 48: the weights will differ in their rounding" in said
    whole, again = data.with_name("whole"), data.with_name("again")
    assert json.loads((again / "run.json").read_text())["resumed"][0]["changes"] == {"--max-tokens": [96, 48]}
    losses = [[e["loss"] for e in events(output) if e["event"] == "step"] for output in (whole, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_resume_and_its_opposites(tiny_folder: Path, data: Path, crash_after: Callable[[int], None]) -> None:
    with pytest.raises(OutputError, match="holds no unfinished run to resume"):
        train(config(tiny_folder, data, "output", resume=True))
    crash_after(7)
    crash(config(tiny_folder, data, "output"))
    with pytest.raises(OutputError, match="holds an earlier run"):
        train(config(tiny_folder, data, "output", resume=False))
    crash_after(15)
    train(config(tiny_folder, data, "output", resume=True))
    said = train(config(tiny_folder, data, "output", resume=True))
    assert "output has finished (3 checkpoints, the best one checkpoint-best): nothing is left to do" in said
    with pytest.raises(
        ConfigError, match=r"holds a finished run, but this run differs:\n  --num-epochs: 3 then, 4"
    ):
        train(config(tiny_folder, data, "output", resume=True, num_epochs=4))
    with pytest.raises(ConfigError, match="resume=True and overwrite=True exclude each other"):
        config(tiny_folder, data, "output", resume=True, overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("left", ["train.log", "run.json", "empty run.json"])
def test_resume_of_a_run_that_had_not_saved_begins_again(
    tiny_folder: Path, data: Path, crash_after: Callable[[int], None], left: str
) -> None:
    """As a job does that is started again by the command that it was started with."""
    output = data.with_name("output")
    crash_after(2)
    crash(config(tiny_folder, data, "output", eval_ratio=0.0))
    if left == "train.log":
        for path in output.iterdir():
            if path.name != left:
                path.unlink()
    elif left == "empty run.json":
        (output / "run.json").write_bytes(b"")
    crash_after(15)
    said = train(config(tiny_folder, data, "output", eval_ratio=0.0, resume=True))
    assert "was ended before its first checkpoint: it starts over" in said
    assert [event["step"] for event in events(output) if event["event"] == "step"] == list(range(1, 16))
    assert json.loads((output / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_after_a_resume_a_worse_evaluation_does_not_replace_the_best(
    tiny_folder: Path, data: Path, crash_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out losses fall until step 3 and are higher from there on; the run is ended after step 4."""
    from handspun.training import loop as loop_module

    made = config(tiny_folder, data, "output", eval_steps=1, save_steps=1)
    best = data.with_name("output") / "checkpoint-best" / "manifest.json"

    def train_from(step: int, *, to: int) -> None:
        losses = iter([5.0, 4.0, 3.5, 3.0, 3.2, 3.1, 3.4, 3.3][step:])
        monkeypatch.setattr(loop_module, "evaluate", lambda *_, **__: (next(losses), 10))
        crash_after(to)
        crash(made)

    train_from(0, to=4)
    assert json.loads(best.read_text())["step"] == 3
    train_from(5, to=5)
    assert json.loads(best.read_text())["step"] == 3
    record = json.loads((data.with_name("output") / "run.json").read_text())
    assert [evaluation["best"] for evaluation in record["evaluations"]] == [True] * 4 + [False] * 2


@pytest.mark.slow
def test_after_a_resume_the_skipped_steps_and_the_last_losses_are_those_of_the_whole_run(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps are skipped, one before and one after the resume; no more than one may be."""
    from handspun.training import loop as loop_module

    real, skips, seen = loop_module.is_finite, {2, 7}, list[None]()

    def train_to(step: int, output: str) -> list[Any]:
        def finite(loss: float, norm: float) -> bool:
            seen.append(None)
            return number[0] not in skips and real(loss, norm)

        def watched(loop: Loop, state: TrainingState) -> Iterator[Event]:
            number[0] = state.step + 1
            for event in whole(loop, state):
                states[:] = [state.skipped, state.losses]
                if event.step > step:
                    raise Crash
                number[0] = event.step + 1
                yield event

        number, states = [1], list[Any]()
        monkeypatch.setattr(loop_module, "is_finite", finite)
        monkeypatch.setattr(run_module, "training_events", watched)
        options = {"on_nonfinite": "skip", "max_skipped_steps": 1, "save_steps": 1, "eval_ratio": 0.0}
        with pytest.raises((Crash, TrainingError)) as raised:
            train(config(tiny_folder, data, output, **options))
        return [raised.type, *states]

    whole = run_module.training_events
    assert train_to(5, "again")[0] is Crash
    again = train_to(99, "again")
    assert again == train_to(99, "whole")
    assert again[0] is TrainingError
    assert again[1] == 2
    assert len(again[2]) == 5  # steps 1, 3, 4, 5 and 6
    assert seen


def other_template(model: Path) -> None:
    """One that renders the same today."""
    file = model / "chat_template.jinja"
    file.write_text("{# of another day #}" + file.read_text())


def other_tokens(model: Path) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][-1]["content"] = "</call>"
    file.write_text(json.dumps(content))


def other_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: tensor * 1.01 for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"}
    )


def other_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


def other_generation_config(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named", "options"),
    [
        (other_template, r"chat template \(sha256\): \w{16} then, \w{16} now", {}),
        (other_tokens, r"tokenizer \(sha256\)", {}),
        (other_config, r"model's config \(sha256\)", {}),
        (other_generation_config, r"generation config \(sha256\)", {}),
        (other_weights, r"base weights \(sha256\)", {"lora": True}),
        (other_weights, r"base weights \(sha256\)", {"lora": True, "base_weights": "int8"}),
        (other_weights, None, {}),
    ],
)
def test_another_model_under_the_same_name_is_not_gone_on_with(
    tiny_folder: Path,
    data: Path,
    crash_after: Callable[[int], None],
    change: Callable[[Path], None],
    named: str | None,
    options: dict[str, Any],
) -> None:
    """Full fine-tuning goes on from its checkpoint, whatever has become of the base's weights."""
    model = data.with_name("model")
    shutil.copytree(tiny_folder, model)
    made = config(model, data, "output", **options)
    crash_after(6)
    crash(made)
    change(model)
    crash_after(15)
    if named is None:
        assert "resuming after step 5" in train(made)
        return
    with pytest.raises(ConfigError, match="this run differs") as raised:
        train(made)
    assert re.search(named, str(raised.value))
    assert (data.with_name("output") / "checkpoint-epoch-1" / TRAINING_STATE).exists()


@pytest.mark.slow
def test_a_run_of_an_earlier_version_has_no_fingerprints_and_goes_on_with_a_line(
    tiny_folder: Path, data: Path, crash_after: Callable[[int], None]
) -> None:
    made = config(tiny_folder, data, "output")
    crash_after(6)
    crash(made)
    record = data.with_name("output") / "run.json"
    facts = json.loads(record.read_text())
    del facts["fingerprints"]
    record.write_text(json.dumps(facts))
    crash_after(15)
    said = train(made)
    assert "no fingerprints of model, tokenizer and chat template" in said
    assert "resuming after step 5 of 15" in said


@pytest.mark.slow
def test_a_second_run_into_the_same_folder_is_refused_while_the_first_one_lives(
    tiny_folder: Path, data: Path
) -> None:
    output = data.with_name("output")
    code = (
        "from pathlib import Path; from handspun.runs.output_dir import lock_output_dir\n"
        f"with lock_output_dir(Path({str(output)!r})): input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) as first:
        while not (output / ".handspun" / "owner").exists():
            assert first.poll() is None
        with pytest.raises(OutputError, match=rf"another run is writing into .* \(process {first.pid}\)"):
            train(config(tiny_folder, data, "output"))
        first.kill()
    train(config(tiny_folder, data, "output"))


@pytest.mark.slow
def test_it_saves_when_the_minutes_are_over(tiny_folder: Path, data: Path) -> None:
    """Over at every step; the last nine stay, those of epochs among them."""
    train(config(tiny_folder, data, "output", save_minutes=1e-9, save_steps=100, keep_last=9))
    steps = {path.name for path in data.with_name("output").glob("checkpoint-step-*")}
    assert steps == {f"checkpoint-step-{step}" for step in (7, 8, 9, 11, 12, 13, 14)}


def ranks(processes: int, runs: list[dict[str, Any]], folder: Path) -> str:
    (folder / "configs.json").write_text(json.dumps(runs))
    script = [str(HELPERS / "several_runs.py"), str(folder / "configs.json")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            *script,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_ranks_resume_to_the_same_bits_and_on_another_number_of_them(tiny_folder: Path, data: Path) -> None:
    def options(output: str, **more: Any) -> dict[str, Any]:
        made = config(tiny_folder, data, output).__dict__
        return {**made, **more}

    held = {"replicated": {}, "sharded": {"shard": True}}
    runs = []
    for name, how in held.items():
        runs += [options(f"{name}-whole", **how), options(f"{name}-again", **how, crash_after=7)]
        runs += [options(f"{name}-again", **how), options(f"{name}-other", **how, crash_after=7)]
    said = ranks(2, runs, data.parent)
    assert said.count("resuming after step 5 of 15") == 2
    for name in held:
        assert weights(data.with_name(f"{name}-again")) == weights(data.with_name(f"{name}-whole"))
    said = ranks(3, [options("replicated-other", shard=True), options("sharded-other")], data.parent)
    assert said.count("processes was 2 and is 3: the weights will differ in their rounding") == 2
    whole = load_file(data.with_name("replicated-whole") / "checkpoint-epoch-3" / "model.safetensors")
    for name in held:
        other = load_file(data.with_name(f"{name}-other") / "checkpoint-epoch-3" / "model.safetensors")
        for key, tensor in other.items():
            torch.testing.assert_close(tensor, whole[key], rtol=1e-5, atol=1e-5)
