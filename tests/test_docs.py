"""The commands of docs/ run as they stand there, on a tiny model; what the pages name is there."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

from api_page import page as api_page
from documents import BATCH, FILES, PAGES, README, README_ZH, ROOT, SHORTER, anchors, commands, files, links
from handspun.cli import main
from handspun.cli.app import app
from handspun.cli.entry import expand_aliases, expand_commands
from option_table import table

MODELS = {"Qwen/Qwen2.5-0.5B", "smollm2-135m", "M", "MODEL"}
"""What pages call a model; here it is a tiny one."""
NOT_RUN = {
    "demo": "it trains for minutes",
    "serve": "it serves until it is stopped; tests/serve/ has servers of its own",
    "4096": "the tiny model reads at most 512 tokens",
    "--push": "it sends a repository to the hub",
    "enable_thinking=false": "tests/data/test_template_args.py runs it, with a template that has it",
    "verify-resume": "it starts process after process, and tests/verification/test_resume_check.py runs it",
}
"""By a word of theirs, the commands that are only parsed. So are those of torchrun, which
tests/slow/test_several_processes.py starts."""


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that pages speak of, and with a run and one of LoRA that they could have made."""
    folder = tmp_path_factory.mktemp("docs")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    common = ["--data", str(folder / "train.csv"), "--eval-ratio", "0.2", "--num-epochs", "1"]
    for name, options in (("output", ["--learning-rate", "1e-3"]), ("output-lora", ["--lora"])):
        (folder / name).mkdir(exist_ok=True)
        model = ["--model", str(tiny_folder), "--output-dir", str(folder / name)]
        assert main(["train", *model, *common, *options, *SHORTER["train"]]) == 0
        assert (folder / name / "checkpoint-best").exists()
    (folder / "output" / "nonfinite-step-17.jsonl").write_text(BATCH, encoding="utf-8")
    return folder


def as_here(arguments: list[str], tiny: Path) -> list[str]:
    """The command with the tiny model, made shorter, and into a folder that may have been used before."""
    command, *given = [str(tiny) if argument in MODELS else argument for argument in arguments]
    given += SHORTER.get(command, [])
    if command in ("train", "preflight"):
        given += [] if {"--model", "--config"} & {*given} else ["--model", str(tiny)]
    if command == "train":
        given += [] if {"--overwrite", "--dry-run"} & {*given} else ["--overwrite"]
    return [command, *given]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    page: Path,
    trained: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In their order."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "/quit")
    for name, content in files(page).items():
        Path(name).write_text(content.replace("smollm2-135m", str(tiny_folder)), encoding="utf-8")
    run = [arguments for arguments in commands(page) if not NOT_RUN.keys() & {*arguments}]
    failed = [arguments for arguments in run if main(as_here(arguments, tiny_folder)) != 0]
    assert failed == [], capsys.readouterr().err


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_commands_have_options_that_exist(page: Path) -> None:
    several = [arguments[arguments.index("handspun") + 1 :] for arguments in commands(page, program="torchrun")]
    parsed = [
        app.parse_args(
            expand_aliases(expand_commands(without_config(arguments))), exit_on_error=False, print_error=False
        )
        for arguments in commands(page) + several
    ]
    assert len(parsed) == len(commands(page)) + len(several)  # each parsed without an error


def test_there_are_commands_scripts_and_links_to_look_at() -> None:
    """The tests of pages say nothing of what their patterns do not find."""
    pages = [README, *PAGES]
    assert sum(len(commands(page)) for page in pages) > 50
    assert sum(len(commands(page, program="make")) for page in pages) > 1
    assert sum(len(commands(page, program="python")) for page in pages) > 3
    assert sum(len(links(page)) for page in pages) > 50
    assert sum(bool(anchor) for page in pages for _, anchor in links(page)) > 10


def without_config(arguments: list[str]) -> list[str]:
    """--config and its file, which are read before the other options are."""
    at = arguments.index("--config") if "--config" in arguments else len(arguments)
    return arguments[:at] + arguments[at + 2 :]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_scripts_and_targets_are_there(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [name for arguments in commands(page, program="make") for name in arguments if "=" not in name]
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)] == []
    options = [
        (script, option)
        for script, *options in commands(page, program="python")
        for option in options
        if option.startswith("--") and script != "train_inference.py"
    ]
    assert [one for one in options if f'"{one[1]}"' not in (ROOT / one[0]).read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("page", [README, README_ZH, ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [((page.parent / file).resolve() if file else page, anchor) for file, anchor in links(page)]
    assert [target for target, _ in targets if not target.exists()] == []
    assert [(target, name) for target, name in targets if name and name not in anchors(target)] == []


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / file).resolve() for file, _ in links(index)} | {index}
    assert not [page.name for page in PAGES if page not in linked]
    assert index in {(README.parent / file).resolve() for file, _ in links(README)}


def test_the_table_of_options_is_that_of_the_code() -> None:
    assert table() in (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), (
        "docs/training.md is not what `python tests/helpers/option_table.py` prints"
    )


def test_the_page_of_the_api_is_that_of_the_code() -> None:
    assert api_page() == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), (
        "docs/api.md is not what `python tests/helpers/api_page.py` prints"
    )


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert [citation[name] for name in ("version", "license")] == [project["version"], project["license"]]
