"""The commands in README.md run as they stand there, with the embedded model; README.zh.md says the same."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from documents import FILES, README, README_ZH, SHORTER, code, commands, figures, links, names
from handspun.cli import main


@pytest.mark.slow
@pytest.mark.embedded
def test_the_readme_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, in a folder with rows and prompts alone; the hub's model is the embedded one here."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "/quit")
    # `serve` runs until it is stopped; tests/serve/ has servers of its own.
    found = [arguments for arguments in commands(README) if arguments[0] != "serve"]
    assert len(found) >= 3
    for arguments in found:
        given = [argument.replace("Qwen/Qwen2.5-0.5B", "smollm2-135m") for argument in arguments]
        assert main([*given, *SHORTER.get(arguments[0], [])]) == 0, arguments
        capsys.readouterr()


@pytest.mark.parametrize("what", [code, names, figures, links], ids=lambda what: what.__name__)
def test_both_readmes_have_the_same(what: Callable[[Path], list[Any]]) -> None:
    """Whoever changes one has to change the other. Comments in commands are translated."""
    english, chinese = Counter(what(README)), Counter(what(README_ZH))
    english -= Counter({(README_ZH.name, ""): 1})
    chinese -= Counter({(README.name, ""): 1})
    lacking = {
        README_ZH.name: [*(english - chinese).elements()],
        README.name: [*(chinese - english).elements()],
    }
    for name, missing in lacking.items():
        assert not missing, f"{name} lacks what the other README has ({what.__name__}): {missing}"


def test_commands_stand_in_the_same_order_in_both() -> None:
    assert code(README_ZH) == code(README)
