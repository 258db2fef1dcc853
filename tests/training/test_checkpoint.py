"""A checkpoint is whole or is not there."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from handspun.config import TrainConfig
from handspun.errors import OutputError
from handspun.files import make_work_folder, output_errors, recover_all
from handspun.models.end_of_turn import make_end_of_turn_eos
from handspun.models.load import ChatModel
from handspun.training import checkpoint as checkpoint_module
from handspun.training.checkpoint import (
    collect_state,
    edited_files,
    is_checkpoint,
    is_checkpoint_name,
    keep_aside,
    link_checkpoint,
    read_facts,
    read_manifest,
    read_optimizer,
    read_weights,
    remove_checkpoint,
    save_checkpoint,
    step_of,
    unknown_files,
    write_manifest,
    write_state,
)
from handspun.training.optim import make_optimizer


def save_tiny(chat: ChatModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_checkpoint(chat, folder, dtype=dtype, facts={"step": 3})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_an_ordinary_transformers_folder(tiny_chat: ChatModel, tmp_path: Path, dtype: torch.dtype) -> None:
    make_end_of_turn_eos(tiny_chat)
    folder = save_tiny(tiny_chat, tmp_path / "checkpoint-epoch-1", dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == dtype
    assert model.config.tie_word_embeddings
    for name, tensor in tiny_chat.model.state_dict().items():
        rounding = 2**-7 if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(model.state_dict()[name].float(), tensor, rtol=rounding, atol=0)
    assert tiny_chat.model.dtype == torch.float32  # the model in training is as it was
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny_chat.tokenizer.chat_template
    end_of_turn, end_of_text = map(tokenizer.convert_tokens_to_ids, ["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [end_of_turn, end_of_text]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [end_of_turn, end_of_text]
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt"))


def test_bfloat16_keeps_in_the_mean_what_training_changed(tiny_chat: ChatModel, tmp_path: Path) -> None:
    """Small steps from weights that bfloat16 holds: rounded to the nearest, every one of them would be lost."""
    weight = tiny_chat.model.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        held = weight.bfloat16().float()
        weight.copy_(held * (1 + 2**-10))
    folder = save_tiny(tiny_chat, tmp_path / "checkpoint", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    saved = model.get_parameter("model.embed_tokens.weight").float()
    growth = (saved.abs().sum() / held.abs().sum() - 1).item()
    assert growth == pytest.approx(2**-10, rel=0.3)
    again = save_tiny(tiny_chat, tmp_path / "again", torch.bfloat16)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_changed_byte_is_noticed(tiny_chat: ChatModel, tmp_path: Path) -> None:
    folder = save_tiny(tiny_chat, tmp_path / "checkpoint")
    assert is_checkpoint(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not is_checkpoint(folder)


def test_a_folder_without_a_manifest_is_no_checkpoint(tiny_chat: ChatModel, tmp_path: Path) -> None:
    folder = save_tiny(tiny_chat, tmp_path / "checkpoint")
    (folder / "manifest.json").unlink()
    assert not is_checkpoint(folder)
    assert not is_checkpoint(tmp_path / "nothing")


def test_a_failed_save_leaves_the_earlier_checkpoint_and_nothing_else(
    tiny_chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tiny_chat, tmp_path / "checkpoint-best")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tiny_chat.tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OutputError, match="no space left on the disk"):
        save_tiny(tiny_chat, folder)
    assert is_checkpoint(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best"]


def test_a_full_disk_under_safetensors_is_an_error_for_people(tmp_path: Path) -> None:
    """safetensors wraps the system's error in its own, with these words."""
    with pytest.raises(OutputError, match="no space left on the disk"), output_errors(tmp_path / "checkpoint"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_second_name_shares_the_files(tiny_chat: ChatModel, tmp_path: Path) -> None:
    best = save_tiny(tiny_chat, tmp_path / "checkpoint-best")
    link_checkpoint(best, tmp_path / "checkpoint-epoch-1", facts={})
    again = tmp_path / "checkpoint-epoch-1"
    assert is_checkpoint(again)
    assert (again / "model.safetensors").stat().st_ino == (best / "model.safetensors").stat().st_ino
    save_tiny(tiny_chat, best)  # replacing one name leaves the other
    shutil.rmtree(best)
    assert is_checkpoint(again)


def write_two(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"weights")
    (folder / "state.json").write_bytes(b"{}")


def test_all_is_synced_before_the_name_and_the_old_one_goes_after_it(
    tiny_chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name: each file and folder of the new one, the rename, the folder around it, and then the deletion."""
    folder = save_tiny(tiny_chat, tmp_path / "checkpoint-best")
    work = tmp_path / ".checkpoint-best.handspun"
    calls: list[str] = []
    synced: set[int] = set()
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def logged_fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            calls.append("sync around it")
        fsync(descriptor)

    def logged_rename(source: Path, target: Path, **_: object) -> None:
        calls.append(f"{Path(source).name} -> {Path(target).name}")
        if Path(source) == work / "new":
            inside = [Path(source), *Path(source).rglob("*")]
            assert [path.name for path in inside if path.stat().st_ino not in synced] == []
            assert len(inside) > 8
            assert is_checkpoint(work / "old")
        rename(source, target)

    def logged_rmtree(path: Path) -> None:
        calls.append(f"delete {Path(path).name}")
        assert is_checkpoint(folder)
        rmtree(path)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    monkeypatch.setattr(shutil, "rmtree", logged_rmtree)
    save_checkpoint(
        tiny_chat,
        folder,
        dtype=torch.float32,
        facts={"step": 4},
        training_state=write_two,
    )
    assert calls == [
        "checkpoint-best -> old",
        "new -> checkpoint-best",
        "sync around it",
        "delete old",
    ]
    assert is_checkpoint(folder / "training_state")


def test_files_have_the_mode_that_the_umask_gives(tiny_chat: ChatModel, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_checkpoint(
            tiny_chat,
            tmp_path / "checkpoint",
            dtype=torch.float32,
            facts={},
            training_state=write_two,
        )
        link_checkpoint(tmp_path / "checkpoint", tmp_path / "linked", facts={})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 12
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {"0o640"}


@pytest.mark.parametrize("moment", ["before the new has the name", "after it", "somebody made another"])
def test_what_a_killed_replacement_left_is_put_right(tiny_chat: ChatModel, tmp_path: Path, moment: str) -> None:
    folder = save_tiny(tiny_chat, tmp_path / "checkpoint-best")
    work = tmp_path / ".checkpoint-best.handspun"
    make_work_folder(work)
    shutil.copytree(folder, work / "old")
    (work / "old" / "which").write_text("old")
    if moment == "before the new has the name":
        shutil.rmtree(folder)
        (work / "new").mkdir()
    elif moment == "somebody made another":
        (work / "new").mkdir()
        with pytest.raises(
            OutputError, match=r"Another checkpoint-best has been created since\. Move one of them away"
        ):
            recover_all(tmp_path, is_ours=is_checkpoint_name)
        assert (work / "old" / "which").read_text() == "old"
        assert is_checkpoint(folder)
        return
    recover_all(tmp_path, is_ours=is_checkpoint_name)
    assert (folder / "which").exists() == (moment == "before the new has the name")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best"]


def test_a_work_folder_of_somebody_else_is_refused_and_stays(tiny_chat: ChatModel, tmp_path: Path) -> None:
    work = tmp_path / ".checkpoint-best.handspun"
    work.mkdir()
    (work / "old").write_text("mine")
    with pytest.raises(OutputError, match="was not made by Handspun"):
        save_tiny(tiny_chat, tmp_path / "checkpoint-best")
    recover_all(tmp_path, is_ours=is_checkpoint_name)
    assert (work / "old").read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"files": 3}',
        b'{"files": {"a": 3}}',
        b'{"files": {"a": "not a checksum"}}',
        b"[" * 99_999,
    ],
)
def test_a_manifest_of_another_kind_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    (tmp_path / "a").write_text("a")
    assert read_manifest(tmp_path) is None
    assert step_of(tmp_path) is None
    assert not is_checkpoint(tmp_path)
    assert {path.name for path in unknown_files(tmp_path)} == {"a", "manifest.json"}


class Trained(torch.nn.Module):
    """A matrix that is trained, of which a model file may hold the weights, and a frozen one."""

    def __init__(self, *, value: float = 0.0) -> None:
        super().__init__()
        self.trained = torch.nn.Parameter(torch.full((2, 300), value))
        self.frozen = torch.nn.Parameter(torch.full((2, 3), value), requires_grad=False)


def after_two_steps(states: Literal["float32", "bfloat16", "8bit"]) -> tuple[Any, torch.optim.Optimizer]:
    model: Any = Trained(value=1.0)
    optimizer = make_optimizer(model, TrainConfig(optimizer_states=states, learning_rate=0.1))
    for step in (1, 2):
        model.trained.grad = torch.linspace(-step, step, 600).view(2, 300)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
def test_a_training_state_that_is_read_is_the_one_that_was_written(
    states: Literal["float32", "bfloat16", "8bit"], tmp_path: Path
) -> None:
    model, optimizer = after_two_steps(states)
    write_state(tmp_path, collect_state(model, optimizer, keep=True), {"step": 2, "note": "é"})
    assert read_facts(tmp_path) == {"version": 1, "step": 2, "note": "é"}
    again: Any = Trained()
    fresh = make_optimizer(again, TrainConfig(optimizer_states=states, learning_rate=0.1))
    held = dict(fresh.state[again.trained])
    read_weights(again, tmp_path)
    read_optimizer(again, fresh, tmp_path, torch.device("cpu"))
    assert torch.equal(again.trained, model.trained)
    assert not again.frozen.any()
    expected, found = optimizer.state[model.trained], fresh.state[again.trained]
    assert found.keys() == expected.keys()
    assert expected["step"] == found["step"] == 2
    for name, value in expected.items():
        assert type(found[name]) is type(value)
        if isinstance(value, torch.Tensor):
            assert found[name] is held[name], "read in place"
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)


def test_collect_state_keeps_nothing_where_nothing_is_written() -> None:
    assert collect_state(*after_two_steps("float32"), keep=False) == {}


def test_read_optimizer_without_a_folder_keeps_room_for_what_the_first_process_sends() -> None:
    model, optimizer = after_two_steps("8bit")
    shapes = {name: getattr(value, "shape", None) for name, value in optimizer.state[model.trained].items()}
    read_optimizer(model, optimizer, None, torch.device("cpu"))
    state = optimizer.state[model.trained]
    assert {name: getattr(value, "shape", None) for name, value in state.items()} == shapes


@pytest.mark.parametrize(("key", "other"), [("trained.step", torch.ones(2)), ("trained.step", torch.tensor(2))])
def test_a_training_state_of_another_shape_or_type_is_refused(
    key: str, other: torch.Tensor, tmp_path: Path
) -> None:
    model, optimizer = after_two_steps("float32")
    gathered = collect_state(model, optimizer, keep=True)
    gathered["optimizer.safetensors"][key] = other
    write_state(tmp_path, gathered, {})
    with pytest.raises(
        OutputError, match=r"belongs to another run: trained\.step is .* \(expected \(\) torch\.float32"
    ):
        read_optimizer(model, optimizer, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("saved", "shared"),
    [
        ({"trained": torch.ones(2, 300), "frozen": torch.ones(2, 3)}, True),
        ({"trained": torch.ones(2, 300, dtype=torch.bfloat16)}, False),
        ({"trained": torch.ones(300, 2)}, False),
        ({"other": torch.ones(2, 300)}, False),
        (None, False),
    ],
    ids=["the same", "another type", "another shape", "another name", "no file"],
)
def test_the_state_shares_the_weights_of_a_model_file_that_holds_the_same(
    saved: dict[str, torch.Tensor] | None, shared: bool, tmp_path: Path
) -> None:
    if saved is not None:
        save_file(saved, tmp_path / "model.safetensors")
    folder = tmp_path / "training_state"
    folder.mkdir()
    weights = {"trained": torch.ones(2, 300)}
    write_state(folder, {"weights.safetensors": weights, "optimizer.safetensors": {}}, {})
    assert torch.equal(load_file(folder / "weights.safetensors")["trained"], weights["trained"])
    assert (folder / "weights.safetensors").stat().st_nlink == (2 if shared else 1)


def write_more(folder: Path) -> None:
    (folder / "more.txt").write_text("more")


def test_save_checkpoint_writes_the_card_and_what_else_is_asked_for(tiny_chat: ChatModel, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-step-7"
    save_checkpoint(
        tiny_chat,
        folder,
        dtype=torch.float32,
        facts={"step": 7},
        card="Trained on é.",
        more=write_more,
        training_state=write_two,
    )
    assert (folder / "README.md").read_text(encoding="utf-8") == "Trained on é."
    manifest = read_manifest(folder)
    assert manifest is not None
    assert {"README.md", "more.txt", "config.json", "model.safetensors"} <= manifest["files"].keys()
    assert step_of(folder) == step_of(folder / "training_state") == 7
    assert unknown_files(folder) == edited_files(folder) == []
    link_checkpoint(folder, tmp_path / "linked", facts={"step": 8}, training_state=write_two)
    assert step_of(tmp_path / "linked") == 7
    assert step_of(tmp_path / "linked" / "training_state") == 8


def a_folder(path: Path, **facts: Any) -> Path:
    """A folder as a checkpoint is, with a file and a training state."""
    (path / "training_state").mkdir(parents=True)
    (path / "a.txt").write_text("written by Handspun")
    write_manifest(path, facts)
    write_two(path / "training_state")
    write_manifest(path / "training_state", facts)
    return path


def test_step_of_a_truth_value_is_none(tmp_path: Path) -> None:
    assert step_of(a_folder(tmp_path / "a", step=True)) is None
    assert step_of(a_folder(tmp_path / "b", step=0)) == 0
    assert step_of(a_folder(tmp_path / "c")) is None


def test_unknown_files_are_those_of_no_manifest(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "checkpoint-step-1")
    assert unknown_files(folder) == []
    added = [folder / "notes.txt", folder / "training_state" / "mine.txt"]
    for path in added:
        path.write_text("mine")
    assert unknown_files(folder) == added
    assert unknown_files(folder / "a.txt") == [folder / "a.txt"]
    remove_checkpoint(folder)
    assert all(path.exists() for path in added)


@pytest.mark.parametrize("name", ["checkpoint-step-1", "training_state"])
def test_remove_checkpoint_leaves_nothing_of_it(name: str, tmp_path: Path) -> None:
    around = tmp_path / "checkpoint-best"
    folder = a_folder(around / name)
    remove_checkpoint(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best"]
    assert list(around.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("checkpoint-step-1", "checkpoint-best/.checkpoint-step-1.handspun"),
        ("training_state", ".checkpoint-best.handspun"),
    ],
)
def test_remove_checkpoint_that_is_interrupted_leaves_no_half_of_it_under_its_name(
    name: str, work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_folder(tmp_path / "checkpoint-best" / name)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(OutputError):
        remove_checkpoint(folder)
    assert not folder.exists()
    assert [path for path in tmp_path.rglob("a.txt") if path.is_relative_to(tmp_path / work)]


def test_link_checkpoint_links_files_in_folders_of_it(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint-best"
    (source / "templates" / "more").mkdir(parents=True)
    for name in ("a.txt", "templates/b.txt", "templates/more/c.txt"):
        (source / name).write_text(name)
    write_manifest(source, {"step": 3})
    (source / "notes.txt").write_text("a user's")
    link_checkpoint(source, tmp_path / "linked", facts={})
    assert is_checkpoint(tmp_path / "linked")
    assert (tmp_path / "linked" / "templates" / "more" / "c.txt").stat().st_nlink == 2
    assert not (tmp_path / "linked" / "notes.txt").exists()


def test_edited_files_by_their_content_and_large_ones_by_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_folder(tmp_path / "checkpoint-step-1")
    small, large = folder / "a.txt", folder / "training_state" / "weights.safetensors"
    monkeypatch.setattr(checkpoint_module, "_SMALL", 7)  # "weights" has 7 bytes
    saved = (large.parent / "manifest.json").stat().st_mtime_ns
    for path in (small, large):
        path.write_bytes(path.read_bytes()[::-1])
        os.utime(path, ns=(saved, saved))
    assert edited_files(folder) == [small, large]
    monkeypatch.setattr(checkpoint_module, "_SMALL", 6)
    os.utime(small, ns=(0, 0))
    assert edited_files(folder) == []  # both are larger, and no newer than their manifests
    os.utime(large, ns=(saved + 1, saved + 1))
    assert large in edited_files(folder)
    large.write_bytes(b"")
    assert large not in edited_files(folder)


def test_keep_aside_takes_the_first_free_name(tmp_path: Path) -> None:
    for name in ("kept-a", "kept-a-2", "kept-a-3"):
        (tmp_path / "a").mkdir()
        assert keep_aside(tmp_path / "a", "kept") == tmp_path / name
    assert {path.name for path in tmp_path.iterdir()} == {"kept-a", "kept-a-2", "kept-a-3"}


def test_a_folder_with_a_users_files_is_renamed_and_not_replaced(tiny_chat: ChatModel, tmp_path: Path) -> None:
    folder = save_tiny(tiny_chat, tmp_path / "checkpoint-best")
    (folder / "notes.txt").write_text("mine")
    save_tiny(tiny_chat, folder)
    assert not (folder / "notes.txt").exists()
    assert (tmp_path / "kept-checkpoint-best" / "notes.txt").read_text() == "mine"
