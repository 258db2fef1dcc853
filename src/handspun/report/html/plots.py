"""Lines and bars as SVG, by matplotlib, in colours that the page gives them."""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from handspun.errors import OutputError
from handspun.report.html.series import Line, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib writes colours out; a page that is light or dark names them. These stand for the names meanwhile.
_COLOURS = {f"#0{i}0{i}0{i}": f"var(--line-{i})" for i in range(1, 7)}
_INK, _MUTED, _GRID = "#0a0a0a", "#0b0b0b", "#0c0c0c"
_NAMES = {**_COLOURS, _INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"}
_STYLES = ["-", "--", ":", "-.", (0, (6, 1)), (0, (1, 1))]

_SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _MUTED,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": _GRID,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "path.simplify": False,  # every point that is asked for is there
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "handspun",
    "text.color": _INK,
    "text.parse_math": False,  # a run may be called $a$
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}


def line_plot(
    name: str,
    lines: Sequence[Line],
    *,
    y: str,
    label: str,
    marked: Sequence[Line] = (),
    epochs: Sequence[int] = (),
    smooth: bool = False,
    from_zero: bool = False,
) -> str:
    """An SVG element with the lines over the steps.

    name: what its ids begin with, unlike those of the page's other plots. label: what it shows, for those who do
    not see it. marked: lines of few points, which are drawn. epochs: steps at which a vertical line stands.
    smooth: draw long lines faintly behind their means. from_zero: y begins at 0.
    """
    with _settings():
        figure, axes = _axes("optimiser step", y)
        axes.xaxis.set_major_locator(_whole_numbers())
        for step in epochs:
            axes.axvline(step, color=_MUTED, linewidth=0.7, linestyle=":")
        for i, line in enumerate(lines):
            mean = smoothed(line) if smooth else None
            style = {"color": _colour(i), "linestyle": _STYLES[i % len(_STYLES)]}
            if mean is None:
                _draw(axes, line, **style)
            else:
                _draw(axes, line, color=_colour(i), linewidth=0.7, alpha=0.45)
                _draw(axes, mean, **style)
        for i, line in enumerate(marked, len(lines)):
            _draw(axes, line, color=_colour(i), marker="o", markersize=4)
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(axes.get_lines()) - len(epochs) > 1:
            axes.legend()
        return _svg(figure, name, label)


def bar_plot(
    name: str, edges: Sequence[float], counts: Sequence[int], *, x: str, label: str, log: bool = False
) -> str:
    """An SVG element with a bar of `counts` rows between every two `edges`."""
    with _settings():
        figure, axes = _axes(x, "rows")
        widths = [high - low for low, high in pairwise(edges)]
        axes.bar(edges[:-1], counts, widths, align="edge", color=_colour(0), edgecolor=_GRID, linewidth=0.5)
        axes.yaxis.set_major_locator(_whole_numbers())
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        return _svg(figure, name, label)


@contextmanager
def _settings() -> Iterator[None]:
    log = logging.getLogger("matplotlib")  # says where it keeps its fonts, which is no news of a run
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import matplotlib  # takes a moment, and only a report needs it

        with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
            # Text stays text in the SVG, and the reader's browser has the glyphs.
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            yield
    except OSError as error:
        raise OutputError(f"no picture can be drawn: {error}. Set MPLCONFIGDIR to a folder for files.") from error
    finally:
        log.setLevel(level)


def _axes(x: str, y: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.7))
    axes = figure.add_axes(
        (0.17, 0.17, 0.81, 0.79)
    )  # fitted to the labels, each picture would take twice the time
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=6)


def _colour(place: int) -> str:
    return list(_COLOURS)[place % len(_COLOURS)]


def _draw(axes: "Axes", line: Line, **style: Any) -> None:
    """A line; one point alone is a dot."""
    if len(line.x) == 1:
        style["marker"] = "o"
    axes.plot(line.x, line.y, label=line.name, gid=f"line-{line.name}", **{"linewidth": 1.5, **style})


def _svg(figure: "Figure", name: str, label: str) -> str:
    """The figure as an element of a page: in the page's size and colours, with ids of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = f'<svg {box[0]} role="img" aria-label="{escape(label)}">' + svg[svg.index(">") + 1 :]
    for before in (r'\bid="', r"url\(#", r'href="#'):
        svg = re.sub(f"({before})", rf"\1{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, css in _NAMES.items():
        svg = svg.replace(colour, css)
    return svg
