"""Commands are parsed as in a process of their own."""

import sys

import pytest


@pytest.fixture(autouse=True)
def without_pydantic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide pydantic. If other tests have imported it, cyclopts checks values with it, in words of its own."""
    monkeypatch.delitem(sys.modules, "pydantic", raising=False)
