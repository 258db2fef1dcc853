"""Plots of a report go through their points, and what is thinned or smoothed says the same."""

import json
import re
import warnings
from html import escape
from pathlib import Path
from typing import Any

import pytest

from handspun.report.pictures import bar_plot, line_plot
from handspun.runs.metrics import Line, Metrics, loss_line, rate_line, read_metrics, smoothed, thinned
from html_page import points_of


def test_a_line_goes_through_its_points() -> None:
    """The picture's y grows downwards; distances keep their proportions, whatever the axes' limits."""
    svg = line_plot("p", [Line("loss", [1, 2, 4, 5], [4.0, 3.0, 1.0, 2.0])], y="loss", label="")
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = points_of(svg, "loss")
    assert (x3 - x1) / (x2 - x1) == pytest.approx(3, rel=1e-4)
    assert (x4 - x1) / (x2 - x1) == pytest.approx(4, rel=1e-4)
    assert (y3 - y1) / (y2 - y1) == pytest.approx(3, rel=1e-4)
    assert (y4 - y1) / (y2 - y1) == pytest.approx(2, rel=1e-4)
    assert y1 < y2 < y3


def test_bars_are_as_tall_as_their_counts() -> None:
    svg = bar_plot("p", [1, 2, 4], [3, 6], x="tokens", label="")
    bars = re.findall(r'<path d="M ([\d.]+) ([\d.]+)\s+L ([\d.]+) [\d.]+\s+L [\d.]+ ([\d.]+)', svg)
    sizes = [(float(x2) - float(x1), float(y1) - float(y2)) for x1, y1, x2, y2 in bars]
    (narrow, low), (wide, high) = [size for size in sizes if size[1] > 0][-2:]
    assert wide / narrow == pytest.approx(2, rel=1e-4)
    assert high / low == pytest.approx(2, rel=1e-4)


def test_a_plots_text_and_name_are_escaped_and_its_colors_are_the_pages() -> None:
    svg = line_plot("p", [Line("<b>$&$", [1, 2], [1.0, 2.0]), Line("b", [1], [1.0])], y="<i>", label='"<script>')
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert "&lt;b&gt;$&amp;$" in svg
    assert 'aria-label="&quot;&lt;script&gt;"' in svg
    assert "var(--line-1)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b(?!\))", re.sub(r'="[^"]*#p-[^"]*"', "", svg))


def test_legends_and_ticks() -> None:
    """A legend is text under the plot, ticks have no common factor, and the highest line is not at the edge."""
    flat = Line("a", [1, 2], [4e-5, 4e-5])
    svg = line_plot("p", [flat, Line("b", [1, 2], [1e-5, 2e-5])], y="rate", label="", from_zero=True)
    assert re.findall(r"</span>(\w)</li>", svg) == ["a", "b"]
    assert ">4e-5<" in re.sub(r"\s", "", svg)
    assert "1e−5" not in svg
    alone = line_plot("p", [flat], y="rate", label="", from_zero=True)
    assert "legend" not in alone
    top = min(float(y) for y in re.findall(r"M [\d.]+ ([\d.]+)", alone))
    assert points_of(alone, "a")[0][1] > top + 5


def step(number: int, **values: Any) -> dict[str, Any]:
    basic = {"event": "step", "step": number, "epoch": 1, "loss": 1.0, "learned_tokens": 1, "seconds": 1.0}
    others = dict.fromkeys(("total_steps", "learning_rate", "grad_norm", "rows", "tokens", "computed_tokens"), 1)
    return {**basic, **others, **values}


def test_of_a_step_made_twice_the_later_line_counts(tmp_path: Path) -> None:
    """A run that was killed behind its last checkpoint and resumed; the killed one left half a line."""
    file = tmp_path / "metrics.jsonl"
    lines = [step(1, loss=3.0), step(2, loss=2.0), step(3, loss=9.0)]
    text = "".join(json.dumps(event) + "\n" for event in lines) + '{"event": "step", "st\n'
    file.write_text(text + json.dumps(step(3, loss=1.0)) + "\n", encoding="utf-8")
    assert loss_line(read_metrics(file)).y == [3.0, 2.0, 1.0]
    assert read_metrics(tmp_path / "none.jsonl") == Metrics()


def test_neighboring_steps_of_a_long_run_become_one_point() -> None:
    steps = [step(n, loss=float(n), learned_tokens=n, tokens=4, seconds=0.5) for n in range(1, 802)]
    metrics = Metrics(steps)
    assert len(thinned(steps)) == 267
    loss, rate = loss_line(metrics), rate_line(metrics, "tokens", "real")
    assert loss.x[:2] == [3, 6]
    assert loss.y[0] == pytest.approx((1 * 1 + 2 * 2 + 3 * 3) / (1 + 2 + 3))
    assert rate.y[0] == pytest.approx(3 * 4 / 1.5)
    assert loss.x[-1] == 801


def test_a_smoothed_line_is_the_mean_around_each_point() -> None:
    line = Line("loss", [float(n) for n in range(40)], [float(n % 2) for n in range(40)])
    mean = smoothed(line)
    assert mean is not None
    assert mean.y[0] == 0.5
    assert mean.y[1] == pytest.approx(1 / 3)
    assert mean.y[2] == pytest.approx(2 / 3)
    assert smoothed(Line("loss", [1.0], [1.0])) is None


@pytest.mark.parametrize("name", ["输出 文件夹", "लिखित", "$a_b$ <x>", "👩‍👩‍👧"])
def test_a_name_that_the_font_lacks_is_drawn_without_a_warning(name: str) -> None:
    """matplotlib warns of each character; the text is the browser's to draw."""
    lines = [Line(name, [1, 2], [1.0, 2.0]), Line("b", [1, 2], [2.0, 1.0])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = line_plot("p", lines, y="loss", label=name)
    assert escape(name, quote=False) in svg
