"""What is odd in the rows of a run, put together from all that is looked for."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from handspun.config import TrainConfig
from handspun.data.examples import RowAccount, RowNote
from handspun.data.mojibake import CARRIAGE_RETURNS, EXCEL_ESCAPES
from handspun.data.prepare import ExampleSet
from handspun.preflight.answers import findings_in_answers
from handspun.preflight.duplicates import alike
from handspun.preflight.findings import Finding, finding
from handspun.preflight.role_markers import findings_in_prompts
from handspun.preflight.said import Said, said_in


def look_at_rows(
    config: TrainConfig,
    training: ExampleSet,
    held_out: ExampleSet | None,
    *,
    max_length: int,
    markers: Sequence[str] = (),
) -> list[Finding]:
    """What is odd in the rows of a run, which the sets still hold.

    markers: role markers of the chat template that are ordinary text.
    """
    said = list(said_in(training.rows, training.account, config))
    held = list(said_in(held_out.rows, held_out.account, config)) if held_out else []
    found = [*_lost(training.account, max_length), *findings_in_answers(said)]
    found += findings_in_prompts([*said, *held], markers)
    if held_out:
        of_held_out = [*_lost(held_out.account, max_length), *findings_in_answers(held)]
        found += [replace(one, what=f"held out: {one.what}") for one in of_held_out]
    return [*found, *_repeated(said, held)]


def _lost(account: RowAccount, max_length: int) -> Iterator[Finding]:
    for reason, notes in account.dropped_by_reason().items():
        remedy = "fill them, or delete the rows" if reason.startswith("empty") else "mend them, or delete the rows"
        yield from finding(f"rows that are dropped, {reason}", remedy, _bare(notes), of=account.rows)
    yield from finding(
        f"rows that are cut to {max_length} tokens",
        "raise --max-length, or shorten the rows: cut answers do not end",
        account.truncated,
        of=account.rows,
    )
    for what in (CARRIAGE_RETURNS, EXCEL_ESCAPES):
        yield from finding(
            f"rows with {what} in a text",
            "replace them by line feeds in the file, or the model learns to write them",
            _bare([note for note in account.notes if note.text.startswith(what)]),
            of=account.rows,
        )


def _bare(notes: Sequence[RowNote]) -> list[RowNote]:
    return [RowNote(note.file, note.row, "") for note in notes]


def _repeated(said: Sequence[Said], held: Sequence[Said]) -> Iterator[Finding]:
    everything, known = [*said, *held], len(said)
    found = alike([one.text for one in everything], known)

    def notes(*, same: bool, held_out: bool) -> list[RowNote]:
        pairs = [
            (everything[one.text], everything[one.earlier])
            for one in found
            if one.same == same and (one.text >= known) == held_out
        ]
        return [RowNote(one.file, one.row, _like(one, earlier)) for one, earlier in pairs]

    for same, what in ((True, "the same as an earlier one"), (False, "nearly the same as an earlier one")):
        remedy = "delete the later ones, unless they are meant to count more"
        yield from finding(f"rows that are {what}", remedy, notes(same=same, held_out=False), of=known)
    for same, what in ((True, "trained on too"), (False, "nearly the same as one that is trained on")):
        remedy = "take them out of one of the two: on them, held-out loss says nothing of new rows"
        yield from finding(f"held-out rows that are {what}", remedy, notes(same=same, held_out=True), of=len(held))


def _like(one: Said, earlier: Said) -> str:
    return f"as row {earlier.row}" if one.file == earlier.file else f"as {earlier.file} row {earlier.row}"
