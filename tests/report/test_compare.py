"""Two models' answers as a page: names, speeds, and the words that differ."""

import itertools
import os
from pathlib import Path

import pytest

from handspun.config import GenerationOptions
from handspun.decoding.results import GenerationResult
from handspun.evaluation.compare import Comparison, speed
from handspun.report.compare import comparison_html, marked_differences
from html_page import Page
from report_in_a_browser import SCHEMES, WIDTHS, browser, overflow, violations


def answer(text: str, tokens: int = 3) -> list[GenerationResult]:
    return [GenerationResult(text=text, token_ids=[0] * tokens, prompt_token_ids=[0], finish_reason="eos")]


COMPARISON = Comparison(
    models=["smollm2-135m", "my/output/checkpoint-best"],
    prompts=["Who?", "What <b>?", "Hm?"],
    answers=[
        [answer("I am a small model."), answer("No."), answer("")],
        [answer("I am a hand-spun model."), answer("No."), answer("Aha, so it is indeed.")],
    ],
    seconds=[2.0, 0.5],
)


def test_comparison_html_names_models_speeds_and_differences() -> None:
    html = comparison_html(COMPARISON, GenerationOptions(max_new_tokens=8))
    text = Page(html).text
    assert "smollm2-135m 9 tokens in 2.0 s, 4.5 tokens/s" in text
    assert "checkpoint-best my/output/checkpoint-best 9 tokens in 0.5 s, 18.0 tokens/s" in text
    assert "1 of 3 prompts answered identically" in text
    assert 'I am a <mark class="differs">small </mark>model.' in html
    assert 'I am a <mark class="differs">hand-spun </mark>model.' in html
    assert "What &lt;b&gt;?" in html
    assert "(nothing)" in text
    assert html.count('<mark class="differs">') == 2 + 1  # and in the line that explains it
    assert html.count('style="color: var(--line-1)">smollm2-135m') == 1 + 3


@pytest.mark.skipif(browser() is None or "AXE" not in os.environ, reason="needs Chromium, and $AXE: axe.min.js")
@pytest.mark.parametrize(("device", "scheme"), list(itertools.product(WIDTHS, SCHEMES)))
def test_axe_finds_nothing_in_a_comparison(tmp_path: Path, device: str, scheme: str) -> None:
    page = tmp_path / "compare.html"
    page.write_text(comparison_html(COMPARISON, GenerationOptions()), encoding="utf-8")
    assert violations(page, Path(os.environ["AXE"]), width=WIDTHS[device], scheme=scheme) == []
    assert overflow(page, width=WIDTHS[device]) == 0


def test_marked_differences_of_unlike_answers_are_none() -> None:
    assert marked_differences("one two", "three four five") == ([("one two", False)], [("three four five", False)])
    assert marked_differences("a b c", "a b c d") == ([("a b c", False)], [("a b c ", False), ("d", True)])


def test_speed_of_a_comparison_without_times() -> None:
    assert speed(Comparison(["a"], [], [[]]), 0) == ""
