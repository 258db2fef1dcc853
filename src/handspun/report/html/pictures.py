"""The pictures of a report: what was measured in every step, and how long and how hard rows are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from handspun.report.html.folder import RunFiles
from handspun.report.html.plots import bar_plot, line_plot
from handspun.report.html.series import (
    Line,
    Metrics,
    epoch_ends,
    held_out_line,
    loss_line,
    rate_line,
    value_line,
)

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
    label = f"{title} by optimiser steps. {' '.join(map(_ends, [*lines, *marked]))}"
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
