"""A run on a terminal: one steady panel below the lines of the log.

`LiveState` is what is seen, `panel` draws it, and `shown` keeps it on the terminal.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from handspun.display import duration, is_unicode, visible
from handspun.runs.sample_answers import Samples
from handspun.training.loop import Evaluation, Step

_RECENT = 20
"""Steps over which the loss and the rates are averaged."""

_CELLS = 512
"""Most cells of a trace: more than a terminal has columns."""

_DRAWN_A_SECOND = 2

_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_NAMES = 15
"""Columns of the names, and the gap after them."""


@dataclass
class Trace:
    """A series of any length in fewer than 512 cells, each the mean of equally many neighbors."""

    cells: list[float] = field(default_factory=list)
    size: int = 1
    _waiting: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Add a value. A full trace becomes half as fine."""
        self._waiting.append(value)
        if len(self._waiting) < self.size:
            return
        self.cells.append(_mean(self._waiting))
        self._waiting.clear()
        if len(self.cells) == _CELLS:
            self.cells = [_mean(self.cells[place : place + 2]) for place in range(0, _CELLS, 2)]
            self.size *= 2


@dataclass
class LiveState:
    """What the panel shows of a run.

    Attributes:
        held_out: whether there will be evaluations.
        prompts: the sample prompts that will be answered.
    """

    total_steps: int
    num_epochs: int
    held_out: bool = False
    prompts: tuple[str, ...] = ()
    step: int = 0
    epoch: int = 1
    losses: Trace = field(default_factory=Trace)
    recent: deque[Step] = field(default_factory=lambda: deque(maxlen=_RECENT))
    evaluations: list[Evaluation] = field(default_factory=list)
    answered: Samples | None = None
    memory: int | None = None
    seconds_left: float | None = None
    stopping: Callable[[], bool] = lambda: False

    def see(self, event: object, *, memory: int | None = None, seconds_left: float | None = None) -> None:
        """Update from an event of the run. Memory and the time left come with a step."""
        if isinstance(event, Step):
            self.step, self.epoch, self.memory, self.seconds_left = event.step, event.epoch, memory, seconds_left
            self.recent.append(event)
            self.losses.add(self.loss)
        elif isinstance(event, Evaluation):
            self.evaluations.append(event)
        elif isinstance(event, Samples):
            self.answered = event

    @property
    def loss(self) -> float:
        """Mean loss over the target tokens of the last 20 steps."""
        learned = sum(step.learned_tokens for step in self.recent)
        return sum(step.loss * step.learned_tokens for step in self.recent) / learned

    def rate(self, tokens: Callable[[Step], int]) -> float:
        """Return tokens per second over the last 20 steps."""
        return sum(map(tokens, self.recent)) / sum(step.seconds for step in self.recent)


@contextmanager
def shown(state: LiveState, console: Console, *, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Show the panel below what is printed; its last state stays.

    The cursor is not hidden: a process that is killed could not bring it back.
    """
    began = clock()

    def draw() -> RenderableType:
        size, elapsed = console.size, clock() - began
        return panel(state, width=size.width, height=size.height, encoding=console.encoding, elapsed=elapsed)

    with Live(console=console, get_renderable=draw, refresh_per_second=_DRAWN_A_SECOND):
        console.show_cursor(True)
        yield


def panel(
    state: LiveState, *, width: int, height: int = 24, encoding: str = "utf-8", elapsed: float = 0.0
) -> RenderableType:
    """Return the panel, of the same height throughout the run.

    With fewer than 12 lines it has the bar and the loss alone; with 32 or more, three answers instead of one.
    elapsed: seconds since it was first drawn.
    """
    inner = max(width - 4, 20)  # without border and margin
    rows: list[RenderableType] = [_bar(state, elapsed), _loss(state, inner, encoding)]
    if height >= 12:
        rows += [_held_out(state)] if state.held_out else []
        rows.append(_figures(state))
        rows += _answers(state, inner, encoding, most=3 if height >= 32 else 1)
    title = f"step {state.step} of {state.total_steps}, epoch {state.epoch} of {state.num_epochs}"
    if state.stopping():
        title = "stops after this step; Ctrl-C again leaves at once"
    return Panel(Group(*rows), title=title, title_align="left", border_style="dim", width=width)


def _bar(state: LiveState, elapsed: float) -> RenderableType:
    left = "" if state.seconds_left is None else f", {duration(state.seconds_left)} left"
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    share = f"{state.step / state.total_steps:.0%} in {duration(elapsed)}{left}"
    row.add_row(ProgressBar(state.total_steps, state.step), share)
    return row


def _loss(state: LiveState, inner: int, encoding: str) -> RenderableType:
    if not state.recent:
        return _named("loss", "not yet")
    value = Text(f"{state.loss:.4f}  ", style="bold")
    drawn = sparkline(state.losses.cells, inner - _NAMES - len(value), ascii_only=not is_unicode(encoding))
    return _named("loss", value.append(drawn, style="not bold cyan"))


def _held_out(state: LiveState) -> RenderableType:
    if not state.evaluations:
        return _named("held-out loss", "not yet")
    first, last = state.evaluations[0], state.evaluations[-1]
    best = min(state.evaluations, key=lambda evaluation: evaluation.loss)
    if last is first:
        return _named("held-out loss", f"{last.loss:.4f} at step {last.step}")
    best_so_far = "the best so far" if best is last else f"best {best.loss:.4f} at step {best.step}"
    text = f"{last.loss:.4f} at step {last.step}, {best_so_far}; {first.loss:.4f} at step {first.step}"
    return _named("held-out loss", text)


def _figures(state: LiveState) -> RenderableType:
    rate = norm = tokens = "not yet"
    if state.recent:
        step = state.recent[-1]
        rate, norm = f"{step.learning_rate:.2e}", f"{step.grad_norm:.2f}"
        real, targets = state.rate(lambda step: step.tokens), state.rate(lambda step: step.learned_tokens)
        tokens = f"{real:,.0f}, {targets:,.0f} target"
    table = Table.grid(padding=(0, 2, 0, 0))
    for width, style in ((_NAMES - 2, "dim"), (12, ""), (None, "dim"), (None, "")):
        table.add_column(min_width=width, style=style, no_wrap=True)
    table.add_row("learning rate", rate, "tokens/s", tokens)
    table.add_row("gradient norm", norm, "memory", f"{state.memory / 1e9:.1f} GB" if state.memory else "unknown")
    return table


def _answers(state: LiveState, inner: int, encoding: str, *, most: int) -> list[RenderableType]:
    """Return one line per prompt, and its answer in two."""
    width, rows = inner - _NAMES, list[RenderableType]()
    texts = [answer.text for answer in state.answered.answers] if state.answered else []
    for number, prompt in enumerate(state.prompts[:most]):
        asked = wrapped(one_line(prompt, encoding), width, 1)[0]
        said = wrapped(one_line(texts[number], encoding), width, 2) if texts else ["(not yet)"]
        name = f"at step {state.answered.step}" if state.answered and number == 0 else ""
        text = Text(f"{asked}\n", style="dim").append("\n".join([*said, ""][:2]), style="not dim")
        rows.append(_named(name, text))
    return rows


def _named(name: str, value: str | Text) -> RenderableType:
    row = Table.grid()
    row.add_column(style="dim", width=_NAMES, no_wrap=True)
    row.add_column(no_wrap=True)
    row.add_row(name, value)
    return row


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Return the values between their minimum and maximum, in at most `width` columns. Equal ones are low."""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    columns = max(min(width, len(values)), 0)
    edges = [place * len(values) // max(columns, 1) for place in range(columns + 1)]
    means = [_mean(values[start:end]) for start, end in pairwise(edges)]
    least, most = min(means, default=0.0), max(means, default=0.0)
    reach = (most - least) or 1.0
    return "".join(blocks[min(int((mean - least) / reach * len(blocks)), len(blocks) - 1)] for mean in means)


def one_line(text: str, encoding: str = "utf-8") -> str:
    """Return what a model said on one line, harmless to a terminal, with "?" for what it cannot show."""
    seen = visible(" ".join(text.split()))
    return seen.encode(encoding, "replace").decode(encoding) or "(nothing)"


def wrapped(text: str, width: int, most: int) -> list[str]:
    """Return the text in at most `most` lines of at most `width` columns; "..." marks the cut."""
    lines = [""]
    for word in text.split(" "):
        for piece in chop_cells(word, width):
            joined = f"{lines[-1]} {piece}" if lines[-1] else piece
            if cell_len(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    if len(lines) <= most:
        return lines
    last = f"{lines[most - 1]} {lines[most]}"
    return [*lines[: most - 1], set_cell_size(last, width - 3).rstrip() + "..."]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
