"""Users without a home, homes and cache folders that cannot be used: a run goes on without its caches."""

import pwd
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from huggingface_hub import close_session, constants

import handspun
from handspun.config import DataConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import ExampleCache, load_splits
from handspun.data.rows import stay_offline_if_unreachable
from handspun.display import captured_log
from handspun.errors import HandspunError, OutputError
from handspun.files import NO_CACHE, cache_folder
from handspun.models.embedded import embedded_folder
from tiny import tiny_tokenizer


def nobody(_: int) -> NoReturn:
    raise KeyError("getpwuid(): uid not found")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry and without HOME, as containers have."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


@pytest.mark.parametrize(
    ("home", "xdg", "expected"),
    [
        ("/home/a", "", "/home/a/.cache/handspun"),
        ("/home/a", "/caches", "/caches/handspun"),
        ("/home/a", "caches", "/home/a/.cache/handspun"),
        ("/home/a", "./caches", "/home/a/.cache/handspun"),
        ("/home/a", "~/caches", "/home/a/.cache/handspun"),
        ("/", "", "/.cache/handspun"),
        ("not/absolute", "", str(NO_CACHE)),
        ("not/absolute", "/caches", "/caches/handspun"),
    ],
)
def test_the_cache_folder_is_one_folder_wherever_a_command_starts(
    monkeypatch: pytest.MonkeyPatch, home: str, xdg: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache_folder() == Path(expected)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_nothing_is_cached_and_a_run_ends_well(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cache_folder() == NO_CACHE
    (tmp_path / "a.csv").write_text("instruction,output\nSay hi.,Hi.\n")
    handspun.train(
        handspun.TrainConfig(
            model=str(tiny_folder), data="a.csv", output_dir="output", num_epochs=1, dtype="float32",
            sample_answers=False,
        )
    )  # fmt: skip
    log = Path("output/train.log").read_text()
    assert f"not cached: cannot write to {NO_CACHE}/examples (Not a directory)." in log
    assert "report: output/report.html" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "output"]  # no folder called "~"


@pytest.mark.usefixtures("no_home")
def test_without_a_home_the_embedded_model_says_what_to_set() -> None:
    with pytest.raises(OutputError, match=r"there is no home folder .* Set XDG_CACHE_HOME to the absolute path"):
        embedded_folder()


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("name", ["~", "~/model", "~no-such-user/model"])
def test_a_name_with_a_home_that_is_not_there_is_an_error_for_people(name: str) -> None:
    with pytest.raises(HandspunError):
        handspun.load(name)
    with pytest.raises(HandspunError):
        load_splits(DataConfig(data=name), ChatTemplate(tiny_tokenizer()), max_length=100)


def file_for_a_folder(place: Path) -> None:
    place.write_text("")


def link_to_nothing(place: Path) -> None:
    place.symlink_to(place.with_name("gone") / "further")


def folder_that_takes_no_files(place: Path) -> None:
    place.symlink_to("/proc")  # also for root, who writes into folders that are to be read only


@pytest.mark.parametrize("make", [file_for_a_folder, link_to_nothing, folder_that_takes_no_files])
def test_a_cache_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "cache")
    (tmp_path / "a.csv").write_text("instruction,output\nSay hi.,Hi.\n")
    config, template = DataConfig(data=str(tmp_path / "a.csv")), ChatTemplate(tiny_tokenizer())
    cache = ExampleCache(tmp_path / "cache" / "handspun" / "examples")
    with captured_log() as log:
        made, _ = load_splits(config, template, max_length=100, cache=cache)
    assert len(made.examples) == 1
    assert "Set XDG_CACHE_HOME to use another folder" in log[0]


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_hub_behind_a_dead_proxy_is_asked_once(monkeypatch: pytest.MonkeyPatch, repo_type: Any) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the port "discard", where nothing listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    began = time.monotonic()
    with captured_log() as log:
        for _ in range(2):
            stay_offline_if_unreachable("nobody/nothing", repo_type=repo_type)
    close_session()
    assert time.monotonic() - began < 20
    assert len(log) == 1
    assert log[0].startswith("the hub does not answer (")
    assert constants.HF_HUB_OFFLINE
