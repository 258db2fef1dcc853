"""Lines and bars as SVG, by matplotlib, in colors that the page gives them."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from handspun.errors import OutputError
from handspun.runs.metrics import (
    Line,
    Metrics,
    RunFiles,
    epoch_ends,
    held_out_line,
    loss_line,
    rate_line,
    smoothed,
    value_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib writes colors out; a page that is light or dark names them. These stand for the names meanwhile.
_COLORS = {f"#0{i}0{i}0{i}": f"var(--line-{i})" for i in range(1, 7)}
_INK, _MUTED, _GRID = "#0a0a0a", "#0b0b0b", "#0c0c0c"
_NAMES = {**_COLORS, _INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"}
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
        figure, axes = _axes("optimizer step", y)
        axes.xaxis.set_major_locator(_whole_numbers())
        for step in epochs:
            axes.axvline(step, color=_MUTED, linewidth=0.7, linestyle=":")
        for i, line in enumerate(lines):
            mean = smoothed(line) if smooth else None
            style = {"color": _color(i), "linestyle": _STYLES[i % len(_STYLES)]}
            if mean is None:
                _draw(axes, line, **style)
            else:
                _draw(axes, line, color=_color(i), linewidth=0.7, alpha=0.45)
                _draw(axes, mean, **style)
        for i, line in enumerate(marked, len(lines)):
            _draw(axes, line, color=_color(i), marker="o", markersize=4)
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
        axes.bar(edges[:-1], counts, widths, align="edge", color=_color(0), edgecolor=_GRID, linewidth=0.5)
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


def _color(place: int) -> str:
    return list(_COLORS)[place % len(_COLORS)]


def _draw(axes: "Axes", line: Line, **style: Any) -> None:
    """A line; one point alone is a dot."""
    if len(line.x) == 1:
        style["marker"] = "o"
    axes.plot(line.x, line.y, label=line.name, gid=f"line-{line.name}", **{"linewidth": 1.5, **style})


def _svg(figure: "Figure", name: str, label: str) -> str:
    """The figure as an element of a page: in the page's size and colors, with ids of its own."""
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
    for color, css in _NAMES.items():
        svg = svg.replace(color, css)
    return svg


SET_NAMES = {"train": "trained on", "held_out": "held out"}
"""As in "rows trained on"."""

_LOSS = "loss a learned token"
_BARS = 30


@dataclass(frozen=True)
class Picture:
    """A plot as an SVG element, with what stands above and below it."""

    title: str
    svg: str
    caption: str


def curves(run: RunFiles) -> list[Picture]:
    """What a run's steps have recorded; what they have not is left out."""
    metrics = run.metrics
    kinds = [("computed_tokens", "computed"), ("tokens", "real"), ("learned_tokens", "learned")]
    rates = [rate_line(metrics, key, name) for key, name in kinds]
    loss = (
        "Mean over the learned tokens of each batch, before its update; held-out loss is over all held-out rows."
    )
    norm = f"Before clipping to {run.facts['config']['max_grad_norm']:g}."
    speed = "Real tokens are those of the rows; padding is computed too, and a shared prefix only once."
    memory = "What the process held in memory after each step."
    marked, epochs = [held_out_line(metrics)], epoch_ends(metrics)
    return [
        *_lines("loss", "Loss", loss, [loss_line(metrics)], y=_LOSS, marked=marked, epochs=epochs, smooth=True),
        *_lines(
            "rate", "Learning rate", "Of each step's update.", [_rate(metrics)], y="learning rate", epochs=epochs
        ),
        *_lines("norm", "Gradient norm", norm, [_norm(metrics)], y="norm", epochs=epochs, smooth=True),
        *_lines("speed", "Throughput", speed, rates, y="tokens a second", epochs=epochs, from_zero=True),
        *_lines("memory", "Memory", memory, [_memory(metrics)], y="GB", epochs=epochs, from_zero=True),
    ]


def curves_side_by_side(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Picture]:
    """The same of several runs, a line for each in every picture."""

    def of_each(line_of: Callable[[Metrics], Line]) -> list[Line]:
        lines = [line_of(run.metrics) for run in runs]
        return [Line(name, line.x, line.y) for name, line in zip(names, lines, strict=True)]

    def learned(metrics: Metrics) -> Line:
        return rate_line(metrics, "learned_tokens", "learned")

    held_out, memory = of_each(held_out_line), "What each process held in memory after each step."
    return [
        *_lines("loss", "Training loss", "Of each batch.", of_each(loss_line), y=_LOSS, smooth=True),
        *_lines("held-out", "Held-out loss", "Over all held-out rows.", [], y=_LOSS, marked=held_out),
        *_lines("rate", "Learning rate", "Of each step's update.", of_each(_rate), y="learning rate"),
        *_lines("norm", "Gradient norm", "Before clipping.", of_each(_norm), y="norm", smooth=True),
        *_lines(
            "speed", "Throughput", "Of each step.", of_each(learned), y="learned tokens a second", from_zero=True
        ),
        *_lines("memory", "Memory", memory, of_each(_memory), y="GB", from_zero=True),
    ]


def lengths(run: RunFiles) -> list[Picture]:
    """Histograms of the lengths of examples, with bars that grow with the length."""
    pictures = []
    for name, some in run.kept.get("lengths", {}).items():
        title = f"Lengths of the rows {SET_NAMES[name]}"
        edges, median = some["edges"], some["median"]
        caption = f"From {edges[0]:,} to {edges[-1] - 1:,} tokens, half of them at most {median:,}."
        label = f"{title}. {caption}"
        svg = bar_plot(f"lengths-{name}", edges, some["counts"], x="tokens in an example", label=label, log=True)
        pictures.append(Picture(title, svg, caption))
    return pictures


def losses(run: RunFiles) -> list[Picture]:
    """Histograms of the losses of rows."""
    pictures = []
    for name, some in (run.kept.get("row_losses") or {}).items():
        if name not in SET_NAMES:  # why there are none
            continue
        title = f"Losses of the rows {SET_NAMES[name]}"
        found = np.sort(some["losses"])
        median = found[(len(found) - 1) // 2]
        caption = (
            f"From {found[0]:.3f} to {found[-1]:.3f}, half of them at most {median:.3f}; the mean over all their "
            f"learned tokens is {some['mean']:.3f}."
        )
        counts, edges = np.histogram(found, _BARS)
        svg = bar_plot(f"losses-{name}", edges.tolist(), counts.tolist(), x=_LOSS, label=f"{title}. {caption}")
        pictures.append(Picture(title, svg, caption))
    return pictures


def _lines(
    id: str,
    title: str,
    caption: str,
    lines: Sequence[Line],
    *,
    y: str,
    marked: Sequence[Line] = (),
    **style: Any,
) -> list[Picture]:
    """One picture of those lines that have points; none if none has."""
    lines, marked = ([line for line in some if line.x] for some in (lines, marked))
    if not lines and not marked:
        return []
    label = f"{title} by optimizer steps. {' '.join(map(_ends, [*lines, *marked]))}"
    return [Picture(title, line_plot(id, lines, y=y, label=label, marked=marked, **style), caption)]


def _ends(line: Line) -> str:
    """What a line comes to, for those who do not see it."""
    return f"{line.name}: from {line.y[0]:.4g} at step {line.x[0]:g} to {line.y[-1]:.4g} at step {line.x[-1]:g}."


def _rate(metrics: Metrics) -> Line:
    return value_line(metrics, "learning_rate", "learning rate")


def _norm(metrics: Metrics) -> Line:
    return value_line(metrics, "grad_norm", "gradient norm")


def _memory(metrics: Metrics) -> Line:
    return value_line(metrics, "memory_bytes", "memory", scale=1e-9)
