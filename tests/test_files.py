"""Files are whole or as they were, nobody else's is touched, and failures of the disk are told in words."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from handspun.errors import OutputError
from handspun.files import (
    atomic_file,
    is_partial,
    output_error,
    output_errors,
    read_json_object,
    readable_size,
    sha256_of,
    sync,
    write_json,
    write_text,
)


@pytest.fixture
def umask() -> Iterator[int]:
    """Nothing for others, all for the group: not the usual one."""
    before = os.umask(0o007)
    yield 0o007
    os.umask(before)


def test_write_text_replaces_the_file_and_leaves_nothing_else(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "run.json"
    write_text(path, "one\n")
    write_text(path, "two \ud800\n")
    assert path.read_bytes() == b"two ?\n"
    assert os.listdir(tmp_path) == ["run.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_atomic_file_leaves_the_file_as_it_was_if_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")

    def write_half() -> None:
        with atomic_file(path) as partial:
            partial.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_atomic_file_touches_no_file_that_somebody_else_called_partial(tmp_path: Path) -> None:
    strangers = [tmp_path / ".run.json.partial", tmp_path / ".run.json.old", tmp_path / "run.json.partial"]
    for stranger in strangers:
        stranger.write_text("mine")
    write_text(tmp_path / "run.json", "ours")
    assert [stranger.read_text() for stranger in strangers] == ["mine"] * 3
    assert not any(map(is_partial, strangers))


def test_atomic_file_gets_names_that_are_known_again_whatever_the_file_is_called(tmp_path: Path) -> None:
    for name in ("run.json", "模" * 80, "line\nbreak.txt", os.fsdecode(b"\xff.bin"), "x" * 250):
        with atomic_file(tmp_path / name) as partial:
            assert is_partial(partial), name
            assert len(os.fsencode(partial.name)) <= 255
        assert not is_partial(tmp_path / name)
    assert len(os.listdir(tmp_path)) == 5


def test_atomic_file_syncs_the_file_before_its_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    names = {tmp_path.stat().st_ino: "folder"}
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("fsync " + names[os.fstat(descriptor).st_ino])
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append(f"replace {Path(source).name} {Path(target).name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_file(tmp_path / "run.json") as partial:
        partial.write_text("{}")
        names[partial.stat().st_ino] = partial.name
    assert calls == [f"fsync {partial.name}", f"replace {partial.name} run.json", "fsync folder"]


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"a": 1}'])
def test_read_json_object_gives_an_object_or_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json_object(path) == ({"a": 1} if content == b'{"a": 1}' else None)


def test_write_json_is_readable_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"名": [1, None]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "名": [\n    1,\n    null\n  ]\n}\n'
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"名": [1, None]}


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_sync_of_a_folder_that_the_file_system_cannot_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("a")

    def unsupported(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unsupported)
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "a")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "no space left on the disk .* free.*--save-dtype bfloat16",
        ),
        (OSError(errno.EFBIG, "File too large"), r"larger than the system allows.*ulimit -f"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), r"File name too long\. Choose another --output-dir\."),
        (RuntimeError("I/O error: (os error 28)"), "no space left on the disk"),
        (RuntimeError("I/O error: (os error 27)"), "ulimit -f"),
    ],
)
def test_output_error_says_what_to_do(tmp_path: Path, error: Exception, message: str) -> None:
    with pytest.raises(OutputError, match=message), output_errors(tmp_path / "missing" / "file"):
        raise error


def test_output_error_names_the_option_that_chose_the_place(tmp_path: Path) -> None:
    error = output_error(tmp_path / "rows", OSError(errno.ENOSPC, "No space"), option="--per-row")
    assert "Free some space, or choose another --per-row." in str(error)
    assert "--output-dir" not in str(error)


def test_output_errors_lets_errors_pass_that_are_not_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyError), output_errors(tmp_path):
        raise KeyError("a fault of the program")


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (12_345_678, "12 MB"),
        (3.44e9, "3.4 GB"),
        (9e10, "90 GB"),
    ],
)
def test_readable_size(count: float, shown: str) -> None:
    assert readable_size(count) == shown
