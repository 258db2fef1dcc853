"""`export --overwrite`: the folder or file that goes is Handspun's own, unchanged, and none that is read."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from handspun.config import ExportConfig
from handspun.errors import HandspunError, OutputError
from handspun.exports.export import export
from handspun.exports.gguf_file import is_written_here
from handspun.training.checkpoint import is_checkpoint


def snapshot(folder: Path) -> dict[str, str]:
    """Every file's content by its path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def exported_once(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a merged folder with a GGUF file in it."""
    folder = tmp_path_factory.mktemp("once") / "merged"
    export(ExportConfig(model=str(tiny_folder), output_dir=str(folder), merge=True, gguf="f32"))
    return folder


@pytest.fixture
def merged(exported_once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(exported_once, tmp_path / "merged")
    return tmp_path / "merged"


def again(model: Path | str, folder: Path, *, merge: bool = True, overwrite: bool = True) -> None:
    wanted = ExportConfig(
        model=str(model), output_dir=str(folder), merge=merge, gguf=None if merge else "f32", overwrite=overwrite
    )
    export(wanted)


def test_our_own_is_replaced_and_nothing_is_left_beside_it(tiny_folder: Path, merged: Path) -> None:
    assert is_written_here(merged / "tiny-qwen2-f32.gguf")
    again(tiny_folder, merged)
    assert is_checkpoint(merged)
    assert not (merged / "tiny-qwen2-f32.gguf").exists()  # all of the folder is replaced
    assert os.listdir(merged.parent) == ["merged"]


def test_a_gguf_file_in_a_folder_is_replaced_alone(tiny_folder: Path, merged: Path) -> None:
    before = snapshot(merged)
    (merged / "mine.txt").write_text("mine")
    again(tiny_folder, merged, merge=False)
    after = snapshot(merged)
    assert after.pop("mine.txt")
    assert after == before
    again(tiny_folder, merged.parent / "other", merge=False)
    assert sorted(os.listdir(merged.parent / "other")) == ["tiny-qwen2-f32.Modelfile", "tiny-qwen2-f32.gguf"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "notes.txt").write_text("mine"), "notes.txt"),
        (lambda folder: (folder / "README.md").write_text("mine"), "README.md"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "config.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "config.json"),
        (lambda folder: (folder / "mine.gguf").write_bytes(b"GGUF of another"), "mine.gguf"),
        (lambda folder: (folder / "link").symlink_to(folder), "link"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(
    tiny_folder: Path, merged: Path, change: Callable[[Path], object], named: str
) -> None:
    change(merged)
    before = snapshot(merged)
    with pytest.raises(OutputError, match=rf"did not write, or that have changed since: .*{named}"):
        again(tiny_folder, merged)
    assert snapshot(merged) == before
    assert os.listdir(merged.parent) == ["merged"]


def test_a_gguf_file_of_another_program_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny-qwen2-f32.gguf"
    file.write_bytes(b"GGUF of another")
    with pytest.raises(OutputError, match="was not written by Handspun"):
        again(tiny_folder, tmp_path, merge=False)
    assert file.read_bytes() == b"GGUF of another"
    assert os.listdir(tmp_path) == [file.name]


def adapter_on(base: Path, folder: Path) -> Path:
    """An adapter's folder as far as it is looked at before anything is loaded."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)})
    )
    shutil.copy(base / "model.safetensors", folder / "adapter_model.safetensors")
    return folder


def linked(base: Path, folder: Path) -> Path:
    """A model whose weights are a link."""
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(base / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "how", ["itself", "an adapter's base", "inside", "a link to it", "its weights by a link", "its GGUF file"]
)
def test_a_model_inside_of_what_would_go_is_refused(merged: Path, how: str) -> None:
    place = merged.parent
    model, folder = merged, merged
    if how == "an adapter's base":
        model = adapter_on(merged, place / "adapter")
    elif how == "inside":
        folder = place
    elif how == "a link to it":
        (place / "link").symlink_to(merged)
        folder = place / "link"
    elif how == "its weights by a link":
        model = linked(merged, place / "linked")
    elif how == "its GGUF file":
        model = merged / "tiny-qwen2-f32.gguf"
    before = snapshot(place)
    with pytest.raises(OutputError, match="would be replaced"):
        again(model, folder)
    assert snapshot(place) == before


@pytest.mark.parametrize("model", ["nothing/there", "a file", "broken weights"])
def test_a_model_that_cannot_be_read_takes_nothing_away(tiny_folder: Path, merged: Path, model: str) -> None:
    place = merged.parent
    if model == "a file":
        (place / model).write_text("text")
    elif model == "broken weights":
        shutil.copytree(tiny_folder, place / model)
        (place / model / "model.safetensors").write_bytes(b"\0" * 100)
    before = snapshot(place)
    with pytest.raises(HandspunError):
        again(place / model, merged)
    assert snapshot(place) == before


def test_a_folder_by_a_link_is_replaced_and_the_link_stays(tiny_folder: Path, merged: Path) -> None:
    (merged.parent / "link").symlink_to("merged")
    again(tiny_folder, merged.parent / "link")
    assert (merged.parent / "link").is_symlink()
    assert is_checkpoint(merged)


def test_the_working_folder_can_be_named_by_a_dot(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    again(tiny_folder, Path(), overwrite=False)
    assert is_checkpoint(tmp_path / "here")
    assert load_file(tmp_path / "here" / "model.safetensors")
