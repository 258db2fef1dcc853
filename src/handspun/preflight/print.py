"""The lines before a run's first step: the account of rows, the plan, warnings, and the predicted time."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise

import numpy as np
import torch
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from handspun.config import TrainConfig
from handspun.data.dataset import Dataset
from handspun.data.examples import (
    FEWEST_TO_HOLD_OUT,
    HELD_OUT_SHARE,
    MOST_HELD_OUT,
    DataReport,
    Example,
    RowIssue,
    learned_tokens_of,
    lengths_of,
    notes_by_text,
)
from handspun.data.preview import bracketed, colored, spread
from handspun.display import count_of, duration, join_names, logger, printable
from handspun.files import readable_size
from handspun.preflight.checks import EndOfTurn, Finding, Preflight, check_findings, headline, rows_named
from handspun.preflight.time_estimate import SLOW, rates_here
from handspun.training.batching import steps_of_epoch
from handspun.training.memory import Plan, disk_at_most

_SHOWN = 12
_MOST_REASONS = 30


def log_lines(*groups: Iterable[str]) -> None:
    """Log lines one by one."""
    for line in chain(*groups):
        logger.info(line)


def account_lines(account: DataReport, *, max_length: int) -> list[str]:
    """Return lines on rows kept, truncated, and dropped, with reasons and row numbers."""
    lines = [f"{file}: {name} format" for file, name in account.formats.items()]
    lines += [f"{file}: {note}" for file, notes in account.file_notes.items() for note in notes]
    for file, columns in account.unused_columns.items():
        lines.append(f"{file}: columns not read: {join_names(columns)}")
    lines.append(f"rows: {account.rows} read, {account.kept} kept, {len(account.dropped)} dropped")
    by_reason = account.dropped_by_reason()
    for reason, notes in islice(by_reason.items(), _MOST_REASONS):
        lines.append(f"  dropped, {reason}: {len(notes)} ({row_numbers(notes)})")
    if len(by_reason) > _MOST_REASONS:
        others = [note for notes in islice(by_reason.values(), _MOST_REASONS, None) for note in notes]
        reasons = len(by_reason) - _MOST_REASONS
        lines.append(f"  dropped for {reasons} more reasons: {len(others)} ({row_numbers(others)})")
    if advice := account.advice():
        lines.append(f"  {advice}")
    if account.truncated:
        where = row_numbers(account.truncated)
        lines.append(f"  truncated to {max_length} tokens: {len(account.truncated)} ({where})")
    for text, noted in notes_by_text(account.notes).items():
        lines.append(f"  {text}: {len(noted)} ({row_numbers(noted)})")
    return lines


def row_numbers(notes: Sequence[RowIssue]) -> str:
    """Return `rows 3, 17 and 4 more`, with the file if there are several."""
    files = dict.fromkeys(note.file for note in notes)
    if len(files) > 1:
        return "; ".join(f"{file} {row_numbers([n for n in notes if n.file == file])}" for file in files)
    shown = ", ".join(str(note.row) for note in notes[:_SHOWN])
    more = f" and {len(notes) - _SHOWN} more" if len(notes) > _SHOWN else ""
    return f"row{'s' if len(notes) > 1 else ''} {shown}{more}"


def length_lines(examples: Sequence[Example], *, is_brief: bool = False) -> list[str]:
    """Return quantiles of the lengths, a small histogram unless brief, and the share of target tokens."""
    lengths: list[int] = np.sort(lengths_of(examples)).tolist()
    targets = learned_tokens_of(examples)
    quantiles = "  ".join(f"{name} {_quantile(lengths, q)}" for name, q in _QUANTILES)
    return [
        f"tokens in an example: {quantiles}",
        *([] if is_brief else _histogram(lengths)),
        f"target tokens: {targets} of {sum(lengths)} ({targets / sum(lengths):.0%})",
    ]


_QUANTILES = [("least", 0.0), ("median", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("most", 1.0)]


def _quantile(ordered: Sequence[int], q: float) -> int:
    """Return the smallest length that at least a share q of the examples does not exceed."""
    return ordered[max(-int(-q * len(ordered) // 1) - 1, 0)]


def _histogram(ordered: Sequence[int], width: int = 40) -> list[str]:
    """Return one line per doubling of the length."""
    bounds = [0, 16]
    while bounds[-1] < ordered[-1]:
        bounds.append(bounds[-1] * 2)
    bounds = [bound for bound, next_bound in pairwise(bounds) if next_bound >= ordered[0]] + bounds[-1:]
    counts = [sum(low < length <= high for length in ordered) for low, high in pairwise(bounds)]
    tallest = max(counts)
    return [
        f"  {low + 1:>6}-{high:<6} {'█' * -(-count * width // tallest):<{width}} {count}"
        for (low, high), count in zip(pairwise(bounds), counts, strict=True)
    ]


def plan_lines(plan: Plan, config: TrainConfig, max_length: int) -> list[str]:
    """Return lines on steps, tokens, memory, and disk: all of them in a dry run, and the main ones in a run.

    In a run they would push the rendered examples out of sight.
    """
    what = f"LoRA rank {config.lora_rank}, " if config.lora else ""
    head = [
        f"model {config.model}: {plan.parameters / 1e6:.1f}M parameters, {what}"
        f"{plan.trainable / 1e6:.1f}M trained",
        f"plan: {count_of(plan.examples, 'example')} x {count_of(config.num_epochs, 'epoch')} in batches of "
        f"{config.batch_size}: {count_of(plan.steps, 'step')}{_cut_by_max_steps(plan, config)}",
    ]
    memory = f"predicted peak memory {plan.peak_memory / 1e9:.1f} GB{' without --shard' if config.shard else ''}"
    disk = readable_size(disk_at_most(plan, config))
    rate = (
        f"learning rate {config.peak_learning_rate:g}, {config.lr_schedule} after {config.warmup_ratio:.0%} "
        f"warm-up; seed {config.seed}"
    )
    if not config.dry_run:
        return [*head, rate, f"{memory}; disk: at most {disk}"]
    return [
        *head,
        f"tokens per epoch: {plan.tokens}, {plan.learned_tokens} of them targets,",
        f"  {plan.computed_tokens} computed ({plan.batching}); rows of at most {max_length}",
        f"  in {plan.micro_batches:,} micro-batch{'es' if plan.micro_batches != 1 else ''} of at most "
        f"{config.max_tokens} tokens",
        rate,
        memory,
        f"disk: each checkpoint {readable_size(plan.checkpoint_size)}, the last {config.keep_last} with "
        f"{readable_size(plan.training_state_size)} to resume from;",
        f"  at most {disk} in all",
    ]


def _cut_by_max_steps(plan: Plan, config: TrainConfig) -> str:
    steps = steps_of_epoch(plan.examples, config) * config.num_epochs
    return f" of {steps} (--max-steps)" if plan.steps < steps else ""


def held_out_lines(training: Dataset, held_out: Dataset | None, config: TrainConfig) -> Iterator[str]:
    """Yield how many rows are held out, and why so many."""
    if held_out is None:
        fewest = FEWEST_TO_HOLD_OUT if config.eval_ratio is None else 0
        why = f": fewer than {fewest} rows (--eval-ratio 0.1 would hold some out)" if fewest else ""
        yield f"held out: no rows{why}"
        return
    count = held_out.account.rows
    if config.eval_data is not None:
        yield f"held out: {count} rows of {', '.join(map(printable, config.eval_sources))}"
        return
    yield f"held out: {count} of {count + training.account.rows} rows, chosen with seed {config.seed}"
    if config.eval_ratio is None:
        yield f"  ({HELD_OUT_SHARE:.0%}, at most {MOST_HELD_OUT}, by default; --eval-ratio 0 trains on all)"


_WIDTH = 80
_EXAMPLES = 3
_MOST_CHARACTERS = 600
"""Longest shown stretch of tokens that are all targets, or all not; `handspun preview` shows it whole."""


def show_examples(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print three rendered examples from across the set, with target tokens in color or between brackets."""
    _log_styled("tokens trained on are between ⟦ and ⟧", Text("tokens trained on are green"))
    for example in spread(examples, _EXAMPLES):
        title = f"{example.file}, row {example.row}: {len(example)} tokens, {example.learned_tokens} trained on"
        _log_styled(f"--- {title}", Text(f"─── {title}"))
        shown = colored(example, tokenizer, most=_MOST_CHARACTERS)
        _log_styled(bracketed(example, tokenizer, most=_MOST_CHARACTERS), shown)
    _log_styled("---", Text("─" * 3))


def _log_styled(plain: str, styled: Text) -> None:
    """Log a text, which a terminal that has colors shows styled."""
    logger.info(plain, extra={"styled": styled})


def show_preflight(
    config: TrainConfig, found: Sequence[Finding], ending: EndOfTurn, seconds: float | None
) -> Preflight:
    """Print the end of turn, the time, and the warnings; return all of them for run.json.

    Raises ConfigError under --strict if there is a warning.
    """
    log_lines(
        time_lines(seconds, is_brief=not config.dry_run), end_of_turn_lines(ending, config), warning_lines(found)
    )
    if config.strict:
        check_findings(found)
    return Preflight(list(found), ending, seconds)


def doubts_about_memory(doubts: Sequence[str]) -> list[Finding]:
    """Return memory warnings as findings: the first line says what it is about, the others are remedies."""
    parts = [doubt.partition("\n") for doubt in doubts]
    return [
        Finding(what.rstrip("."), rest.replace("\n  ", " ", 1).replace("\n  ", "; ")) for what, _, rest in parts
    ]


def end_of_turn_lines(found: EndOfTurn, config: TrainConfig) -> Iterator[str]:
    """Yield what the end of turn is, and where it will be saved. A run is brief about one that is in order."""
    if not config.dry_run and found.is_eos and found.learned == found.examples:
        yield f"end of turn {found.token}: an eos of the base model, and the last target token of all examples"
        return
    known = "an eos of the base model" if found.is_eos else "not an eos of the base model, which may not know it"
    yield f"end of turn {found.token}: {known};"
    yield f"  the last target token of {found.learned} of {found.examples} examples;"
    if config.lora and not found.is_eos:
        yield "  its embedding is trained along with the adapters, which alone could not teach it;"
    yield f"  eos of what is saved, in generation_config too: {' '.join(found.saved)}"


def time_lines(seconds: float | None, *, is_brief: bool = False) -> Iterator[str]:
    """Yield the predicted time, and how reliable it is."""
    if seconds is None:
        yield "predicted time: known after two steps (no rates were measured on this device)"
        return
    if is_brief:
        yield f"predicted time {duration(seconds)} of steps, a guess that the first two steps correct"
        return
    yield f"predicted time {duration(seconds)} of steps, a guess by rates that were measured on"
    yield f"  {rates_here().measured_on}; the first two steps correct it"


def corrected_line(left: float, step: int) -> str:
    """Return the time left as the first steps predict it."""
    return f"by the first steps, those after step {step} will take {duration(left)}"


def slow_lines(times: float, config: TrainConfig, dtype: torch.dtype) -> Iterator[str]:
    """Yield a warning about steps that take many times as long as predicted, with what may help."""
    if times < SLOW:
        return
    if config.base_weights == "int8":
        remedy = "int8 layers may be slow on this CPU: try without --base-weights int8"
    elif dtype == torch.bfloat16 and config.dtype == "bfloat16":  # chosen by the user, not by a probe
        remedy = "bfloat16 may be slow on this CPU: try --dtype float32"
    else:
        remedy = "see whether other programs use the CPU (top), or plan a shorter run: fewer --num-epochs" + (
            "" if config.lora else ", or --lora"
        )
    yield f"warning: steps take {times:.0f} times as long as predicted"
    yield from _wrapped(f"-> {remedy}; Ctrl-C stops after a step and saves", "  ", "     ")


def warning_lines(found: Sequence[Finding]) -> Iterator[str]:
    """Yield each warning with its rows and its remedy, in lines of at most 80 characters."""
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
