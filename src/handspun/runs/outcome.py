"""What a run came to: figures before and after, a verdict in words, and what to do next."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from handspun.display import count_of
from handspun.runs.live import one_line, wrapped
from handspun.runs.metrics import HARDEST, HELD_OUT, REPORT, RunFiles
from handspun.runs.record import option_words

_FLAT = 0.02
"""A change of the held-out loss by less than 2 % is none: with a few hundred target tokens, other held-out rows
would have moved it as much."""
_FALLING = 0.05
"""The learning rate is near zero in the last epoch. If that epoch lowers the held-out loss by 5 % all the same,
a longer run lowers it further."""
_CERTAIN = 0.05
"""Below this loss, the model gives each expected token a probability of 95 %: there is nothing left to learn."""
_BY_HEART = 0.5
"""If the training rows' loss is half of the held-out rows', the model knows its rows better than what they have in
common. It is 0.8 to 1 in a short run on varied rows."""

_OF_ROWS = ("data_format", "system_prompt", "role_map", "max_length")
"""Options by which rows are read, so evaluation needs them too."""

_WIDTH = 80
"""Columns of a line with a prompt or an answer, its label included."""


@dataclass(frozen=True)
class Verdict:
    """What the losses mean, and what to do about it."""

    text: str
    advice: str = ""


def verdict(run: RunFiles) -> Verdict | None:
    """Return what became of a finished run; None if it did not finish, or made no step."""
    steps, found = run.metrics.steps, run.metrics.evaluations
    if run.record.status != "finished" or not steps:
        return None
    training = epoch_losses(steps)
    epochs = max(training)
    if not found:
        return _without_held_out_rows(training, steps)
    if len(found) < 2 or found[0]["step"] != 0:
        return _without_both_ends(found, training)
    first, last = found[0]["loss"], found[-1]["loss"]
    best = min(found, key=lambda event: event["loss"])
    losses = f"{first:.4f} before, {last:.4f} after"
    if last > best["loss"] * (1 + _FLAT) and best["step"] > 0:
        return _risen(best, last, training)
    if last > first * (1 + _FLAT):
        return Verdict(
            f"Worse than before: the held-out loss rose ({losses}).",
            f"Lower the learning rate (--learning-rate {run.record.config['learning_rate'] / 5:g}), and check the "
            "rows (handspun preview).",
        )
    if last > first * (1 - _FLAT):
        return Verdict(
            f"Nothing learned: the held-out loss stayed about the same ({losses}).",
            "Check that the rows teach what you want (handspun preview), then raise the learning rate or the "
            "number of epochs.",
        )
    fall = f"the held-out loss fell by {1 - last / first:.0%}"
    before_last = _before_last_epoch(found)
    if last < _CERTAIN:
        return Verdict(f"Learned: the held-out loss fell from {first:.4f} to {last:.4f}, which is nearly none.")
    if epochs > 1 and last < before_last * (1 - _FALLING):
        return Verdict(
            f"Still falling: {fall}, and from {before_last:.4f} to {last:.4f} in the last epoch alone.",
            f"Train for longer ({_longer(run, epochs * 2)}).",
        )
    if training[max(training)] < last * _BY_HEART:
        return Verdict(
            f"Learned: {fall}. The training rows are known almost by heart "
            f"({training[max(training)]:.4f} against {last:.4f}).",
            "More epochs will not help; more, and more varied, rows will.",
        )
    if epochs == 1 and run.record.config.get("max_steps"):
        return Verdict(
            f"Learned: {fall} in {count_of(len(steps), 'step')}.",
            f"Two or three epochs usually learn more: raise --max-steps ({_longer(run, 3)}), or leave it out.",
        )
    if epochs == 1:
        return Verdict(
            f"Learned: {fall} in one epoch.", "Two or three epochs usually learn more (--num-epochs 3)."
        )
    return Verdict(f"Learned: {fall}, and has leveled off.")


def _longer(run: RunFiles, epochs: int) -> str:
    """Return the option of a longer run."""
    steps = run.record.config.get("max_steps")
    return f"--max-steps {steps * 2}" if steps else f"--num-epochs {epochs}"


def _risen(best: dict[str, Any], last: float, training: dict[int, float]) -> Verdict:
    """Return the verdict on a held-out loss that rose after its best."""
    rise = f"the held-out loss rose from {best['loss']:.4f} (step {best['step']}) to {last:.4f}"
    if training[max(training)] < training[min(training)]:
        return Verdict(
            f"Overfitted: {rise}, while the training loss fell.",
            "Use checkpoint-best, which is from before that. Train for fewer epochs, or add rows.",
        )
    return Verdict(f"Unstable: {rise}, and so did the training loss.", "Lower the learning rate.")


def _without_both_ends(found: Sequence[dict[str, Any]], training: dict[int, float]) -> Verdict:
    """Return the verdict on held-out losses without the one before training, or without any after it."""
    first, last = found[0], found[-1]
    if last["step"] == 0:
        return Verdict(
            f"The held-out loss was {last['loss']:.4f} before training; none after it was recorded.",
            "Compute it (handspun eval).",
        )
    best = min(found, key=lambda event: event["loss"])
    if last["loss"] > best["loss"] * (1 + _FLAT):
        return _risen(best, last["loss"], training)
    known = f"The held-out loss was {last['loss']:.4f} after step {last['step']}"
    if first is not last:
        known = (
            f"The held-out loss went from {first['loss']:.4f} (step {first['step']}) to {last['loss']:.4f} "
            f"(step {last['step']})"
        )
    return Verdict(
        f"{known}; the one before training was not recorded.",
        "Compute it with the model that was trained (handspun eval) to see what was learned.",
    )


def _without_held_out_rows(training: dict[int, float], steps: Sequence[dict[str, Any]]) -> Verdict:
    if len(training) > 1:
        first, last = training[min(training)], training[max(training)]
        change = f"from {first:.4f} in the first epoch to {last:.4f} in the last"
    else:
        part = max(len(steps) // 10, 1)
        first, last = _mean_loss(steps[:part]), _mean_loss(steps[-part:])
        change = f"from {first:.4f} in the first steps to {last:.4f} in the last"
    if last > first * (1 - _FLAT):
        text = f"Nothing learned: the training loss did not fall ({change})."
        return Verdict(text, "Check the rows (handspun preview), then raise the learning rate.")
    return Verdict(
        f"The training loss fell {change}.",
        "Without held-out rows nobody can tell whether new prompts are answered better: hold some out "
        "(--eval-ratio 0.05).",
    )


def epoch_losses(steps: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Return the mean training loss per target token of each epoch, before each step's update."""
    epochs = dict.fromkeys(step["epoch"] for step in steps)
    return {epoch: _mean_loss([step for step in steps if step["epoch"] == epoch]) for epoch in epochs}


def _mean_loss(steps: Sequence[dict[str, Any]]) -> float:
    tokens = sum(step["learned_tokens"] for step in steps)
    return float(sum(step["loss"] * step["learned_tokens"] for step in steps) / tokens)


def _before_last_epoch(evaluations: Sequence[dict[str, Any]]) -> float:
    """Return the last held-out loss from before the last epoch."""
    last = evaluations[-1]["epoch"]
    return float([event["loss"] for event in evaluations if event["epoch"] < last][-1])


def perplexity(loss: float) -> str:
    """Return exp(loss): among how many tokens, equally probable, the model seems to choose."""
    if loss > 700:
        return "infinite"
    return f"{math.exp(loss):,.{2 if loss < math.log(100) else 0}f}"


@dataclass(frozen=True)
class Matches:
    """Exact matches of answers to the same held-out rows. of: the rows that were held out."""

    before: int
    after: int
    asked: int
    of: int


def matches(run: RunFiles) -> Matches | None:
    """Return the exact matches before and after training; None if they were not counted."""
    answers = run.kept.get("row_answers", {})
    after = {(one["file"], one["row"]): one["is_right"] for one in answers.get("after", [])}
    both = [one for one in answers.get("before", []) if (one["file"], one["row"]) in after]
    if not both or run.record.data.held_out is None:
        return None
    return Matches(
        sum(one["is_right"] for one in both), sum(after.values()), len(both), run.record.data.held_out.rows.kept
    )


def checkpoint(run: RunFiles) -> str | None:
    """Return the path of the checkpoint to use: the best one, or the last."""
    names = [run.record.best_checkpoint] if run.record.best_checkpoint else run.record.checkpoints[-1:]
    return str(run.folder / names[0]) if names else None


def next_commands(run: RunFiles, handspun: str = "handspun") -> list[tuple[str, str]]:
    """Return (what for, command), with this run's paths. handspun: what to type for it."""
    if (path := checkpoint(run)) is None:
        return []
    data = str(run.folder / HELD_OUT) if HELD_OUT in run.kept else run.record.config.get("eval_data") or []
    rows = [part for source in ([data] if isinstance(data, str) else data) for part in ("--data", source)]
    given = {name: value for name, value in run.record.given.items() if name in _OF_ROWS}
    export = ["export", "--model", path, "--gguf", "q8_0", "--output-dir", str(run.folder / "export")]
    commands = [
        ("talk to it", ["chat", "--model", path]),
        *([("score it", ["eval", "--model", path, *rows, *option_words(given), "--generate"])] if rows else []),
        ("for Ollama, llama.cpp, LM Studio", export),
    ]
    return [(what, f"{handspun} {shlex.join(words)}") for what, words in commands]


def end_lines(run: RunFiles) -> Iterator[str]:
    """Yield the end of a run's log: answers and figures before and after, the verdict, the files to look at."""
    yield from _answer_lines(run)
    found = run.metrics.evaluations
    if len(found) > 1:
        best = min(found, key=lambda event: event["loss"])
        at = "" if best is found[-1] else f"; best {best['loss']:.4f} at step {best['step']}"
        when = "before" if found[0]["step"] == 0 else f"at step {found[0]['step']}"
        yield f"held-out loss {found[0]['loss']:.4f} {when}, {found[-1]['loss']:.4f} after{at}"
    if (training := epoch_losses(run.metrics.steps)) and len(training) > 1:
        first, last = training[min(training)], training[max(training)]
        yield f"training loss {first:.4f} in the first epoch, {last:.4f} in the last"
    if (count := matches(run)) is not None:
        of = "" if count.asked == count.of else f" of {count.of:,}"
        rows = f"{count.asked:,}{of} held-out rows"
        yield f"exact matches: {count.before:,} of {rows} before, {count.after:,} after"
    if (found_verdict := verdict(run)) is not None:
        yield found_verdict.text
        if found_verdict.advice:
            yield f"  {found_verdict.advice}"
    yield f"report: {run.folder / REPORT}"
    if HARDEST in run.kept:
        yield f"hardest rows: {run.folder / HARDEST}"


def _answer_lines(run: RunFiles) -> Iterator[str]:
    """Yield the sample prompts, each with the expected answer and those before and after, in short."""
    columns = [
        ("before", {one["prompt"]: one for one in run.kept.get("before", {}).get("answers", [])}),
        ("after", {one["prompt"]: one for one in run.kept.get("after", {}).get("answers", [])}),
    ]
    if not all(answers for _, answers in columns):
        return
    for prompt, answer in columns[1][1].items():
        yield f"> {wrapped(one_line(prompt), _WIDTH - 2, 1)[0]}"
        if answer.get("expected") is not None:
            yield from _labeled("expected", answer["expected"])
        for name, answers in columns:
            if prompt in answers:
                is_cut = answers[prompt]["finish_reason"] in ("length", "cancelled")
                yield from _labeled(name, answers[prompt]["text"] + " (cut off)" * is_cut)


def _labeled(name: str, text: str) -> Iterator[str]:
    for place, part in enumerate(wrapped(one_line(text), _WIDTH - 12, 2)):
        yield f"  {name if place == 0 else '':<9} {part}"
