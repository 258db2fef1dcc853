"""What is known before the first step, for people: examples, warnings, the end of turn, what the run will cost."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.preflight.end_of_turn import EndOfTurn
from handspun.preflight.findings import Finding, headline, refuse_findings, rows_named
from handspun.preflight.rates import MEASURED_ON
from handspun.report.duration import duration
from handspun.report.log import RunLog
from handspun.report.preview import bracketed, coloured, spread

_WIDTH = 80
_EXAMPLES = 3
_MOST_CHARACTERS = 600
"""Of a run of tokens that are all learned, or all not: `handspun preview` shows them whole."""


def show_examples(log: RunLog, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Three rendered examples from the whole of the set, with what is learned in colour, or between brackets."""
    log.styled(Text("what is learned is green"), "what is learned is between ⟦ and ⟧")
    for example in spread(examples, _EXAMPLES):
        title = f"{example.file}, row {example.row}: {len(example)} tokens, {example.learned_tokens} learned"
        log.styled(Text(f"─── {title}"), f"--- {title}")
        shown = coloured(example, tokenizer, most=_MOST_CHARACTERS)
        log.styled(shown, bracketed(example, tokenizer, most=_MOST_CHARACTERS))
    log.styled(Text("─" * 3), "---")


def show_preflight(
    log: RunLog, config: TrainConfig, found: Sequence[Finding], ending: EndOfTurn, seconds: float | None
) -> dict[str, Any]:
    """The end of turn, the time, the warnings; and all of that for run.json. Raises ConfigError under --strict, if
    there is a warning."""
    for line in (*time_lines(seconds), *end_of_turn_lines(ending, config), *warning_lines(found)):
        log.line(line)
    if config.strict:
        refuse_findings(found)
    return {
        "warnings": [asdict(one) for one in found],
        "end_of_turn": asdict(ending),
        "predicted_seconds": seconds,
    }


def doubts_about_memory(doubts: Sequence[str]) -> list[Finding]:
    """What was said of memory, its first line what it is about and the others the remedies."""
    parts = [doubt.partition("\n") for doubt in doubts]
    return [
        Finding(what.rstrip("."), rest.replace("\n  ", " ", 1).replace("\n  ", "; ")) for what, _, rest in parts
    ]


def end_of_turn_lines(found: EndOfTurn, config: TrainConfig) -> Iterator[str]:
    """Where the end of turn is, and where it will be."""
    known = "an eos of the base model" if found.is_eos else "no eos of the base model, which may never have met it"
    yield f"end of turn {found.token}: {known};"
    yield f"  the last learned token of {found.learned} of {found.examples} examples;"
    if config.lora and not found.is_eos:
        yield "  its embedding is trained beside the adapters, which alone could not teach it;"
    yield f"  eos of what is saved, in generation_config too: {' '.join(found.saved)}"


def time_lines(seconds: float | None) -> Iterator[str]:
    """The predicted time, and what it is worth."""
    if seconds is None:
        yield "predicted time: known after two steps (no rates were measured on this device)"
        return
    yield f"predicted time {duration(seconds)} of steps, a guess by rates that were measured on"
    yield f"  {MEASURED_ON}; the first two steps correct it"


def corrected_line(left: float, step: int) -> str:
    """What the first steps say."""
    return f"by the first steps, those after step {step} will take {duration(left)}"


def warning_lines(found: Sequence[Finding]) -> Iterator[str]:
    """Each with its rows and its remedy, in lines of at most 80 characters."""
    if not found:
        yield "warnings: none"
        return
    yield f"warnings: {len(found)} (--strict makes an error of them)"
    for number, one in enumerate(found, 1):
        yield from _wrapped(f"{number}. {headline(one)}", "  ", "     ")
        yield from _wrapped(rows_named(one), "     ", "     ")
        yield from _wrapped(f"-> {one.remedy}", "     ", "        ")


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
