"""Commands as a person meets them."""

import pytest

from handspun.cli import main


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must fail for a person: exit code 2, and no traceback."""
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    return " ".join(printed.err.split())
