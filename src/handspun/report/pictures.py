"""Draw line and bar plots as SVG with matplotlib, in colors that the page defines."""

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

from handspun.errors import OutputError, check_installed
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

# A page that can be light or dark refers to colors by CSS variables, but matplotlib only writes literal colors. So
# these placeholders are drawn, and replaced by the variables in the SVG.
_COLORS = {f"#0{i}0{i}0{i}": f"var(--line-{i})" for i in range(1, 7)}
_INK, _MUTED, _GRID = "#0a0a0a", "#0b0b0b", "#0c0c0c"
_NAMES = {**_COLORS, _INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"}
_STYLES: list[tuple[Any, str]] = [
    *(("-", "solid"), ("--", "dashed"), (":", "dotted")),
    *(("-.", "dashed"), ((0, (6, 1)), "dashed"), ((0, (1, 1)), "dotted")),
]
"""Line styles, as matplotlib and as CSS call them."""

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
    "path.simplify": False,  # draw every point
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "handspun",
    "text.color": _INK,
    "text.parse_math": False,  # a run may be named $a$
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
    """Return an SVG element with lines over optimizer steps, and their legend under it if there are several.

    Args:
        name: Prefix of the element's ids, unique on the page.
        lines: Lines to draw.
        y: Label of the y axis.
        label: Description for screen readers.
        marked: Lines with few points, whose points are marked.
        epochs: Steps with a vertical line.
        smooth: Draw long lines faintly, with their running means on top.
        from_zero: Start the y axis at 0.
    """
    legend = [(line.name, i) for i, line in enumerate([*lines, *marked])]
    with _settings():
        figure, axes = _axes("optimizer step", y)
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.yaxis.set_major_formatter(lambda value, _: _tick(value))
        for step in epochs:
            axes.axvline(step, color=_MUTED, linewidth=0.7, linestyle=":")
        for i, line in enumerate(lines):
            mean = smoothed(line) if smooth else None
            style = {"color": _color(i), "linestyle": _STYLES[i % len(_STYLES)][0]}
            if mean is None:
                _draw(axes, line, **style)
            else:
                _draw(axes, line, color=_color(i), linewidth=0.7, alpha=0.45)
                _draw(axes, mean, **style)
                legend[i] = mean.name, i
        for i, line in enumerate(marked, len(lines)):
            _draw(axes, line, color=_color(i), marker="o", markersize=4, clip_on=False)
        if from_zero:
            highest = max((value for line in [*lines, *marked] for value in line.y), default=0.0)
            axes.set_ylim(0, 1.1 * highest or 1.0)
        return _svg(figure, name, label) + (_legend(legend, len(lines)) if len(legend) > 1 else "")


def _tick(value: float) -> str:
    """Return a tick's label, such as `0.5` or `2e-5`: never with a factor that all ticks share."""
    return f"{value:,g}".replace("e-0", "e-")


def _legend(names: Sequence[tuple[str, int]], lines: int) -> str:
    """Return a legend as HTML: it wraps on a phone, and lies on no curve."""
    entries = []
    for name, place in names:
        style = _STYLES[place % len(_STYLES)][1] if place < lines else "solid"
        swatch = f'<span class="swatch" style="border-top: 3px {style} {css_color(place)}"></span>'
        entries.append(f"<li>{swatch}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def css_color(place: int) -> str:
    """Return the page's color of a line, and of the run or model that it belongs to."""
    return list(_COLORS.values())[place % len(_COLORS)]


def bar_plot(
    name: str, edges: Sequence[float], counts: Sequence[int], *, x: str, label: str, is_whole: bool = False
) -> str:
    """Return an SVG histogram: bars of `counts` rows between `edges`.

    Args:
        name: Prefix of the element's ids, unique on the page.
        edges: Edges of the bars, one more than counts.
        counts: Rows per bar.
        x: Label of the x axis.
        label: Description for screen readers.
        is_whole: Whether only whole numbers occur on the x axis.
    """
    with _settings():
        figure, axes = _axes(x, "rows")
        if is_whole:
            axes.xaxis.set_major_locator(_whole_numbers())
        widths = [high - low for low, high in pairwise(edges)]
        axes.bar(edges[:-1], counts, widths, align="edge", color=_color(0), edgecolor=_GRID, linewidth=0.5)
        axes.yaxis.set_major_locator(_whole_numbers())
        axes.xaxis.set_major_formatter(lambda value, _: _tick(value))
        return _svg(figure, name, label)


@contextmanager
def _settings() -> Iterator[None]:
    check_installed("matplotlib", "report", "a report with pictures")
    log = logging.getLogger("matplotlib")  # logs about its font cache, which does not belong in a run's log
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import matplotlib  # slow to import, and only reports need it

        with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
            # Text stays text in the SVG, so the reader's browser needs the glyphs, not matplotlib.
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            yield
    except OSError as error:
        raise OutputError(f"plots cannot be drawn: {error}. Set MPLCONFIGDIR to a writable folder.") from error
    finally:
        log.setLevel(level)


def _axes(x: str, y: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.7))
    axes = figure.add_axes(
        (0.17, 0.17, 0.79, 0.79)
    )  # fixed, since fitting the axes to their labels would double the time per plot
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=6)


def _color(place: int) -> str:
    return list(_COLORS)[place % len(_COLORS)]


def _draw(axes: "Axes", line: Line, **style: Any) -> None:
    """Draw a line; a single point as a dot."""
    if len(line.x) == 1:
        style["marker"] = "o"
    axes.plot(line.x, line.y, label=line.name, gid=f"line-{line.name}", **{"linewidth": 1.5, **style})


def _svg(figure: "Figure", name: str, label: str) -> str:
    """Return the figure as an SVG element with the page's size and colors, and with unique ids."""
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

_LOSS = "loss"
_BARS = 30


@dataclass(frozen=True)
class Picture:
    """A plot as an SVG element, with its title and caption."""

    title: str
    svg: str
    caption: str


def loss_curve(run: RunFiles) -> list[Picture]:
    """Return the plot of a run's losses; none without steps."""
    metrics = run.metrics
    caption = (
        "Training: mean over the target tokens of each batch, before its update. Held out: over all held-out rows."
        if metrics.evaluations
        else "Mean over the target tokens of each batch, before its update."
    )
    if 0 < len(metrics.evaluations) <= run.record.config["num_epochs"] + 1:
        caption += " With --eval-steps N it is computed more often."
    style: dict[str, Any] = {"marked": [held_out_line(metrics)], "epochs": epoch_ends(metrics), "smooth": True}
    return _lines("loss", "Loss", caption, [loss_line(metrics)], y=_LOSS, **style)


def curves(run: RunFiles) -> list[Picture]:
    """Return plots of what else a run's steps recorded."""
    metrics = run.metrics
    kinds = [("computed_tokens", "computed"), ("tokens", "all"), ("learned_tokens", "target")]
    rates = [rate_line(metrics, key, name) for key, name in kinds]
    rate = "Used for each step's update."
    norm = f"Before clipping to {run.record.config['max_grad_norm']:g}."
    speed = "All tokens of the rows. Computed tokens include padding, and count a shared prefix once."
    memory = "Of the process after each step."
    epochs = epoch_ends(metrics)
    return [
        *_lines("rate", "Learning rate", rate, [_rate(metrics)], y="learning rate", epochs=epochs),
        *_lines("norm", "Gradient norm", norm, [_norm(metrics)], y="norm", epochs=epochs, smooth=True),
        *_lines("speed", "Throughput", speed, rates, y="tokens per second", epochs=epochs, from_zero=True),
        *_lines("memory", "Memory", memory, [_memory(metrics)], y="GB", epochs=epochs, from_zero=True),
    ]


def curves_side_by_side(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Picture]:
    """Return the same plots for several runs, with one line per run in each plot."""

    def of_each(line_of: Callable[[Metrics], Line]) -> list[Line]:
        lines = [line_of(run.metrics) for run in runs]
        return [Line(name, line.x, line.y) for name, line in zip(names, lines, strict=True)]

    def targets(metrics: Metrics) -> Line:
        return rate_line(metrics, "learned_tokens", "target")

    held_out, memory = of_each(held_out_line), "Memory of each process after each step."
    return [
        *_lines("loss", "Training loss", "Of each batch.", of_each(loss_line), y=_LOSS, smooth=True),
        *_lines("held-out", "Held-out loss", "Over all held-out rows.", [], y=_LOSS, marked=held_out),
        *_lines("rate", "Learning rate", "Used for each step's update.", of_each(_rate), y="learning rate"),
        *_lines("norm", "Gradient norm", "Before clipping.", of_each(_norm), y="norm", smooth=True),
        *_lines(
            "speed",
            "Throughput",
            "Of each step.",
            of_each(targets),
            y="target tokens per second",
            from_zero=True,
        ),
        *_lines("memory", "Memory", memory, of_each(_memory), y="GB", from_zero=True),
    ]


def lengths(run: RunFiles) -> list[Picture]:
    """Return histograms of example lengths."""
    pictures = []
    for name, some in run.kept.get("lengths", {}).items():
        title = f"Lengths of the rows {SET_NAMES[name]}"
        edges, median = some["edges"], some["median"]
        most = some.get("most", edges[-1] - 1)
        caption = f"From {edges[0]:,} to {most:,} tokens, half of them at most {median:,}."
        label = f"{title}. {caption}"
        around = [edge - 0.5 for edge in edges]  # a bar stands around its lengths, which are whole
        svg = bar_plot(
            f"lengths-{name}", around, some["counts"], x="tokens in an example", label=label, is_whole=True
        )
        pictures.append(Picture(title, svg, caption))
    return pictures


def losses(run: RunFiles) -> list[Picture]:
    """Return histograms of row losses."""
    pictures = []
    for name, some in (run.kept.get("row_losses") or {}).items():
        if name not in SET_NAMES:  # "missing": the reason why there are none
            continue
        title = f"Losses of the rows {SET_NAMES[name]}"
        found = np.sort(some["losses"])
        median = found[(len(found) - 1) // 2]
        caption = (
            f"From {found[0]:.3f} to {found[-1]:.3f}, half of them at most {median:.3f}; the mean over all their "
            f"target tokens is {some['mean']:.3f}."
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
    """Return one plot of the lines that have points, or no plot if none has."""
    lines, marked = ([line for line in some if line.x] for some in (lines, marked))
    if not lines and not marked:
        return []
    label = f"{title} by optimizer steps. {' '.join(map(_ends, [*lines, *marked]))}"
    return [Picture(title, line_plot(id, lines, y=y, label=label, marked=marked, **style), caption)]


def _ends(line: Line) -> str:
    """Return a line's first and last value in words, for screen readers."""
    return f"{line.name}: from {line.y[0]:.4g} at step {line.x[0]:g} to {line.y[-1]:.4g} at step {line.x[-1]:g}."


def _rate(metrics: Metrics) -> Line:
    return value_line(metrics, "learning_rate", "learning rate")


def _norm(metrics: Metrics) -> Line:
    return value_line(metrics, "grad_norm", "gradient norm")


def _memory(metrics: Metrics) -> Line:
    return value_line(metrics, "memory_bytes", "memory", scale=1e-9)
