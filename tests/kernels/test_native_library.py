"""The cache of compiled kernels: only a whole library of the user's own is loaded, and a failure is told once."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from handspun.kernels import native
from handspun.kernels import native as native_library
from handspun.kernels.native import LibraryError, load_library

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler"),
]
FLAGS = ("-shared", "-fPIC")
SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library's source, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    file = tmp_path / "answer.c"
    file.write_text(SOURCE, encoding="utf-8")
    return file


def answer(source: Path) -> int:
    return int(load_library(source, FLAGS).answer())


def the_library(source: Path) -> Path:
    """Build it, and return its file. It is not loaded: damage would reach its pages in memory."""
    file = native_library._library_file(source, FLAGS, ["cc"])
    native_library._build(source, FLAGS, ["cc"], file)
    return file


def folder_of(source: Path) -> Path:
    return source.parent / "cache" / "handspun" / "native"


def compiler(tmp_path: Path, lines: str) -> tuple[Path, Path]:
    """A compiler of the tests' own, that counts its calls in a file."""
    calls, script = tmp_path / "calls", tmp_path / "my cc"
    script.write_text(f'#!/bin/sh\necho call >> "{calls}"\n{lines}\n', encoding="utf-8")
    script.chmod(0o755)
    return script, calls


def test_a_library_is_built_once_in_a_folder_of_ones_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, calls = compiler(tmp_path, 'exec cc "$@"')
    monkeypatch.setenv("CC", f"'{script}'")
    assert answer(source) == answer(source) == 42
    assert calls.read_text() == "call\n"
    [file] = folder_of(source).iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder_of(source).stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_could_read_is_closed(source: Path) -> None:
    folder_of(source).mkdir(parents=True, mode=0o755)
    folder_of(source).chmod(0o755)
    assert answer(source) == 42
    assert folder_of(source).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_any_umask_gives_a_library_that_is_loaded_again(source: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert answer(source) == 42
        [file] = folder_of(source).iterdir()
        written = file.stat().st_mtime_ns
        assert answer(source) == 42
    finally:
        os.umask(before)
    assert file.stat().st_mtime_ns == written


def damage_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_only_a_checksum(file: Path) -> None:
    file.write_bytes(file.read_bytes()[-32:])


def damage_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_symlink(file: Path) -> None:
    """To a library that is whole, in a folder that everyone can write."""
    open_to_all = file.parents[3] / "open"
    open_to_all.mkdir(mode=0o777)
    shutil.copy(file, open_to_all / "library.so")
    file.unlink()
    file.symlink_to(open_to_all / "library.so")


def damage_hard_link(file: Path) -> None:
    os.link(file, file.parents[3] / "another name")


def damage_writable_by_others(file: Path) -> None:
    file.chmod(0o666)


def damage_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    "damage",
    [
        damage_cut,
        damage_empty,
        damage_only_a_checksum,
        damage_one_bit,
        damage_symlink,
        damage_hard_link,
        damage_writable_by_others,
        damage_a_pipe,
    ],
)
def test_what_is_not_the_whole_library_of_ones_own_is_built_again(source: Path, damage: object) -> None:
    assert callable(damage)
    file = the_library(source)
    whole = file.read_bytes()
    damage(file)
    assert not native_library._is_whole_and_own(file)
    assert answer(source) == 42
    assert native_library._is_whole_and_own(file)
    assert not file.is_symlink()
    assert len(file.read_bytes()) == len(whole)


def test_a_library_of_another_owner_is_not_loaded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from the other side: the files are this user's, and the process is another's."""
    file = the_library(source)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert not native_library._is_whole_and_own(file)
    with pytest.raises(LibraryError, match="belongs to another user"):
        load_library(source, FLAGS)


def test_a_folder_that_is_a_link_is_refused(source: Path, tmp_path: Path) -> None:
    folder_of(source).parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    folder_of(source).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LibraryError, match=r"native is a link or a file, not a folder\. Remove it"):
        load_library(source, FLAGS)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_is_refused(source: Path, mode: int) -> None:
    folder_of(source).mkdir(parents=True)
    folder_of(source).chmod(mode)
    with pytest.raises(LibraryError, match=r"native is writable by others\. Remove it"):
        load_library(source, FLAGS)
    assert list(folder_of(source).iterdir()) == []


def test_a_folder_above_that_everyone_can_write_is_refused(source: Path) -> None:
    """As /tmp they may be, where only owners can rename."""
    above = source.parent / "cache"
    above.mkdir()
    above.chmod(0o777)
    with pytest.raises(LibraryError, match="cache is writable by everyone"):
        load_library(source, FLAGS)
    above.chmod(0o1777)
    assert answer(source) == 42


def test_a_cache_that_cannot_be_written_is_one_reason(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(LibraryError, match="^/proc/nowhere: No such file or directory$"):
        load_library(source, FLAGS)


def test_a_compiler_of_several_words_works(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CC="ccache gcc", and options behind the compiler's name."""
    script, calls = compiler(tmp_path, 'exec "$@"')
    monkeypatch.setenv("CC", f"'{script}' cc -O1")
    assert answer(source) == 42
    assert calls.read_text() == "call\n"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("no-such-compiler -O2", "the C compiler that CC names, no-such-compiler, does not exist"),
        ("gcc '", "CC cannot be split into words"),
    ],
)
def test_a_compiler_that_is_not_there(
    source: Path, command: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", command)
    with pytest.raises(LibraryError, match=reason):
        load_library(source, FLAGS)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("echo 'a note' >&2; echo 'file.c:1: error: no such flag' >&2; exit 1", r"file\.c:1: error: no such flag"),
        ("exit 3", "exit code 3"),
        ("exit 0", "it wrote no library"),
        ("kill -9 $$", "exit code -9"),
    ],
)
def test_a_compiler_that_fails_is_tried_once_a_day(
    source: Path, tmp_path: Path, lines: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, calls = compiler(tmp_path, lines)
    monkeypatch.setenv("CC", f"'{script}'")
    for _ in range(2):
        with pytest.raises(LibraryError, match=f"the C compiler failed: .*my cc.*: {reason}"):
            load_library(source, FLAGS)
    assert calls.read_text() == "call\n"
    [failure] = folder_of(source).iterdir()
    yesterday = time.time() - 25 * 3600
    os.utime(failure, (yesterday, yesterday))
    with pytest.raises(LibraryError, match=reason):
        load_library(source, FLAGS)
    assert calls.read_text() == "call\ncall\n"


def test_another_compiler_or_another_source_is_built_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(source) == 42
    script, _ = compiler(tmp_path, 'exec cc "$@"')
    monkeypatch.setenv("CC", f"'{script}'")
    assert answer(source) == 42
    source.write_text(SOURCE.replace("42", "43"), encoding="utf-8")
    assert answer(source) == 43
    assert len(list(folder_of(source).glob("*.so"))) == 3


def test_a_library_that_cannot_be_loaded_is_one_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that is mounted noexec."""
    script, _ = compiler(tmp_path, 'for last; do file=$before; before=$last; done; echo nothing > "$file"')
    monkeypatch.setenv("CC", f"'{script}'")
    with pytest.raises(LibraryError, match="cannot be loaded .*Set XDG_CACHE_HOME to another cache folder"):
        load_library(source, FLAGS)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CC": "no-such-compiler"}, "the C compiler that CC names, no-such-compiler, does not exist"),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "this CPU has no AVX-512 with VNNI"),
        ({"HANDSPUN_NATIVE": "0"}, None),
    ],
)
def test_users_of_int8_are_told_why_there_are_no_kernels(
    environment: dict[str, str], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but those who switched them off."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    native.forget_kernels()
    try:
        assert native.kernels() is None
        message = native.slower_without(torch.device("cpu"))
        if "CC" in environment and not native.cpu_flags() >= native._NEEDED:
            reason = "this CPU has no AVX-512 with VNNI"
        assert message == (reason and f"int8 runs without its native kernels, which is slower: {reason}")
        assert native.slower_without(torch.device("cuda")) is None
    finally:
        monkeypatch.undo()
        native.forget_kernels()
