"""The PyTorch releases that pyproject.toml allows are those that were tried, from the oldest to the newest."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    assert found is not None
    return int(found[1]), int(found[2])


def test_the_range_of_torch_is_what_make_test_versions_tries() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [wanted] = [name for name in project["dependencies"] if re.match(r"torch\b", name)]
    tried = dict(
        re.findall(r"^(OLDEST|NEWEST)_TORCH := (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    )
    oldest, newest = minor(tried["OLDEST"]), minor(tried["NEWEST"])
    assert wanted == f"torch>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"


@pytest.mark.cpu
def test_this_torch_is_in_the_range() -> None:
    """The suite itself runs with one of them."""
    tried = re.findall(r"^(?:OLDEST|NEWEST)_TORCH := (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert minor(tried[0]) <= minor(torch.__version__) <= minor(tried[1])
