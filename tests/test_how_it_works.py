"""docs/how_it_works.md prints the numbers of its row."""

import re

import pytest

from documents import ROOT
from one_row import blocks

NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?"


@pytest.mark.slow
@pytest.mark.embedded
def test_the_numbers_are_those_of_the_command() -> None:
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    printed = re.findall(r"```text\n(.*?)\n```", page, flags=re.DOTALL)
    found = list(blocks())
    assert len(printed) == len(found) == 8
    for text, (title, block) in zip(printed, found, strict=True):
        assert re.sub(NUMBER, "", text) == re.sub(NUMBER, "", block), title
        # Other CPUs round otherwise, in the last digit that is printed.
        assert numbers(text) == pytest.approx(numbers(block), rel=2e-3, abs=1.5e-4), title


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, text)]
