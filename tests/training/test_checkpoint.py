"""A checkpoint is whole or is not there."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from handspun.errors import OutputError
from handspun.files import make_work_folder, output_errors, recover_all
from handspun.models.end_of_turn import make_end_of_turn_eos
from handspun.models.load import ChatModel
from handspun.training.checkpoint import (
    is_checkpoint,
    is_checkpoint_name,
    link_checkpoint,
    read_manifest,
    save_checkpoint,
    step_of,
    unknown_files,
)


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
