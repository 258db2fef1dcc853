"""The commands in README.md run as they stand there, with the embedded model."""

from pathlib import Path

import pytest

from documents import README, commands
from handspun.cli import main
from test_docs import FILES, SHORTER


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
    found = commands(README)
    assert len(found) >= 5
    for arguments in found:
        given = [argument.replace("Qwen/Qwen2.5-0.5B", "smollm2-135m") for argument in arguments]
        assert main([*given, *SHORTER.get(arguments[0], [])]) == 0, arguments
        capsys.readouterr()
