"""Render how an answer's tokens were chosen, as a table of 80 columns, and a beam search's tree."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from handspun.decoding.explain import Candidate, Effect, Explanation, TreeNode
from handspun.display import escaped

_MAX_GUIDE_WIDTH = 40
"""Maximum width of a tree's guides. Deeper trees show only the last columns."""


def explanation_table(explanation: Sequence[Explanation]) -> Table:
    """Return a table with one row per token.

    The column "processors" has one line per processor with an effect: the number of tokens that it excluded, and
    the chosen token's probability after it.
    """
    is_drawn = any(step.chosen.noise is not None for step in explanation)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("token", max_width=12, no_wrap=True, style="bold")
    table.add_column("model", justify="right", no_wrap=True)
    table.add_column("processors", ratio=1)
    table.add_column("left", justify="right", no_wrap=True)
    if is_drawn:
        table.add_column("draw", justify="right", no_wrap=True)
    table.add_column("runner-up", max_width=13, no_wrap=True)
    for number, step in enumerate(explanation, start=1):
        cells = [
            str(number),
            _quoted(step.chosen.text),
            f"{_percent(step.probability)}\n#{step.rank:,}",
            "\n".join(map(_effect, step.effects)),
            f"{step.left:,}\n{_percent(step.left_mass)}",
            *([_noise(step.chosen)] if is_drawn else []),
            _runner_up(step.runner_up),
        ]
        table.add_row(*map(Text, cells))  # Text, since rich would read brackets in tokens as markup
    return table


def search_tree(nodes: Sequence[TreeNode]) -> Text:
    """Return a beam search's tree, one line per stretch without a branch.

    A line has the accumulated log-probability, the tokens, and the answer's number or the reason it ended.
    """
    children: dict[int | None, list[int]] = {}
    for place, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(place)
    lines = [Text("log-probability of each beam so far", style="dim")]
    branches = _branches(children.get(None, []), "")
    while branches:
        place, guide, is_last = branches.pop()
        text = nodes[place].text
        while len(children.get(place, [])) == 1:
            place = children[place][0]
            text += nodes[place].text
        drawn = guide + ("└ " if is_last else "├ ")
        line = Text(f"{nodes[place].score:8.2f} ", style="dim")
        line.append(drawn if len(drawn) <= _MAX_GUIDE_WIDTH else "…" + drawn[1 - _MAX_GUIDE_WIDTH :])
        line.append(_quoted(text), style="not dim bold" if nodes[place].return_index is not None else "not dim")
        line.append(_ending(nodes[place], place in children))
        lines.append(line)
        branches += _branches(children.get(place, []), guide + ("  " if is_last else "│ "))
    return Text("\n").join(lines)


def _branches(places: Sequence[int], guide: str) -> list[tuple[int, str, bool]]:
    """Return (index, guide, is last sibling) of siblings, in reverse order for a stack."""
    return [(place, guide, place == places[-1]) for place in reversed(places)]


def _ending(node: TreeNode, goes_on: bool) -> str:
    if node.return_index is not None:
        return f"  answer {node.return_index + 1}"
    if goes_on:
        return ""
    return "  ended" if node.ended else "  given up"


def _effect(effect: Effect) -> str:
    removed = f"-{effect.removed:,} " if effect.removed else ""
    return f"{effect.processor} {removed}→ {_percent(effect.probability)}"


def _runner_up(candidate: Candidate | None) -> str:
    if candidate is None:
        return "none"
    noise = "" if candidate.noise is None else f" {_noise(candidate)}"
    return f"{_quoted(candidate.text)}\n{_percent(candidate.probability)}{noise}"


def _noise(candidate: Candidate) -> str:
    return "" if candidate.noise is None else f"{candidate.noise:+.2f}"


def _quoted(text: str) -> str:
    """Return a token in quotes, with unprintable characters such as newlines escaped."""
    return f"'{escaped(text)}'"


def _percent(probability: float) -> str:
    if 0 < probability < 0.0005:
        return "<0.1%"
    return f"{100 * probability:.1f}%"
