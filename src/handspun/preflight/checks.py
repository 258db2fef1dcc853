"""Check the rows of a run and the end of its turns before training."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from handspun.config import NEXT_USER, DataConfig, TrainConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.conversations import is_trained, to_conversation
from handspun.data.dataset import Dataset
from handspun.data.examples import DataReport, RowIssue
from handspun.data.messages import Message
from handspun.data.rows import DroppedRow, Row
from handspun.data.text_loss import CARRIAGE_RETURNS, EXCEL_ESCAPES
from handspun.display import printable
from handspun.errors import ConfigError
from handspun.preflight.duplicates import near_duplicate_rows

_MOST_NAMED = 12


@dataclass(frozen=True)
class Finding:
    """A warning, such as `rows that are cut`. It applies to `count` of `of` rows.

    rows: the first of these rows, each with a detail. If the warning is not about rows, count and of are 0.
    """

    what: str
    remedy: str
    count: int = 0
    of: int = 0
    rows: list[RowIssue] = field(default_factory=list)


def finding(what: str, remedy: str, notes: Sequence[RowIssue], *, of: int) -> Iterator[Finding]:
    """Yield the finding for these rows, if there are any.

    Args:
        what: the warning.
        remedy: what to do about it.
        notes: the rows, each with a detail.
        of: number of rows checked.
    """
    if notes:
        yield Finding(what, remedy, len(notes), of, list(notes[:_MOST_NAMED]))


def check_findings(found: Sequence[Finding]) -> None:
    """Raise ConfigError that lists all findings, if there are any, as --strict demands."""
    if found:
        raise ConfigError(
            f"--strict does not allow {len(found)} warning{'s' if len(found) > 1 else ''}:\n"
            + "\n".join(f"  {one.what}{counted(one)}: {one.remedy}" for one in found)
            + "\nFix what they name, or remove --strict."
        )


def headline(one: Finding) -> str:
    """Return a finding's headline: `rows that are cut: 3 of 100 (3%)`."""
    return f"{one.what}: {one.count} of {one.of} ({_percent(one.count / one.of)})" if one.of else one.what


def rows_named(one: Finding) -> str:
    """Return `rows 3 (as row 1), 17 (as row 2) and 4 more`, with file names if there are several files."""
    if not one.rows:
        return ""
    several = len({note.file for note in one.rows}) > 1
    named = [
        (f"{note.file} " if several else "") + str(note.row) + (f" ({note.text})" if note.text else "")
        for note in one.rows
    ]
    more = f" and {one.count - len(named)} more" if one.count > len(named) else ""
    return f"row{'s' if one.count > 1 else ''} {', '.join(named)}{more}"


def _percent(share: float) -> str:
    """Return a percentage: whole from 10% on, else with one significant digit."""
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.1g}%"


def counted(one: Finding) -> str:
    """Return ` (3 of 100)`, or nothing if no rows are counted."""
    return f" ({one.count} of {one.of})" if one.of else ""


@dataclass(frozen=True)
class RowText:
    """The texts of a row.

    prompts: texts of users and tools, and assistant turns that are context only. answers: texts of the assistant,
    with tool calls as JSON.
    """

    file: str
    row: int
    prompts: list[str]
    answers: list[str]

    @property
    def text(self) -> str:
        """All texts, one per line."""
        return "\n".join([*self.prompts, *self.answers])


def row_texts(rows: Sequence[Row], account: DataReport, config: DataConfig) -> Iterator[RowText]:
    """Yield the texts of each row that was kept."""
    dropped = {(note.file, note.row) for note in account.dropped}
    for row in rows:
        if (row.file, row.number) in dropped:
            continue
        try:
            messages = to_conversation(
                row, account.formats[row.file], system_prompt=config.system_prompt, role_map=config.roles
            ).messages
        except DroppedRow:  # --data has changed since the report was made
            continue
        trained = [message for message in messages if message["role"] == "assistant" and is_trained(message)]
        prompts = [m["content"] for m in messages if m["role"] in ("user", "tool") or not is_trained(m)]
        answers = [part for message in trained for part in _answered(message)]
        yield RowText(row.file, row.number, prompts, answers)


def _answered(message: Message) -> Iterator[str]:
    if message["content"]:
        yield message["content"]
    if message.get("tool_calls"):
        yield json.dumps(message["tool_calls"], ensure_ascii=False)


_PLACEHOLDERS = {
    *("noinput", "nooutput", "noresponse", "noanswer", "n/a", "none", "nan", "null", "nil", "undefined"),
    *("todo", "tbd", "fixme", "placeholder", "...", "…", "......", "……", "-", "--", "---", "?", "???"),
    *("无", "暂无", "无输入", "无输出", "空", "待补充", "略"),
}
_AROUND = "<>[](){}\"'`*\\. 。"

# Code has {{name}} in its templates and {name} in its strings. Only a name by itself in prose counts as a field.
_FIELD = re.compile(
    r"(?<![\w{$\\}%(=\"'`])(?:\{\{ ?[A-Za-z_][\w .-]{0,40}? ?\}\}|\{[A-Za-z_]\w{2,40}\})(?![\w{}(=\"'`])"
)
_CODE = re.compile(
    r"```|<[a-zA-Z/!]|\{%|[;{]\s*$|\)\s*[{:]\s*$|^\s*(?:import|from|def|class|return|var|let|const|function)\b"
    r"|\bf[\"']|\.format\(|\\\w+\{|=>",
    re.MULTILINE,
)


def findings_in_answers(texts: Sequence[RowText]) -> Iterator[Finding]:
    """Yield the findings on the answers and prompts of one set of rows."""
    yield from _those(
        texts,
        placeholder_answer,
        "answers that are a placeholder",
        "write real answers, or delete the rows: the model would learn to say just this",
    )
    yield from _those(
        texts,
        placeholder_prompt,
        "prompts that end in a placeholder",
        "empty these inputs: the model would expect such words when there is no input",
    )
    yield from _those(
        texts,
        unfilled_field,
        "answers with an unfilled field",
        "fill in the fields, or delete the rows",
    )
    yield from _those(
        texts,
        next_user,
        'answers with a line "User:", which is a stop string of chats',
        "use --no-stop-strings with generate, chat and eval --generate, which would cut such answers there",
    )


def next_user(row: RowText) -> str | None:
    """Return the line of an answer at which decoding would cut it."""
    lines = (answer.partition(NEXT_USER)[1:] for answer in row.answers)
    return next((f"{stop.strip()}{rest}".split("\n")[0] for stop, rest in lines if stop), None)


def placeholder_answer(row: RowText) -> str | None:
    """Return the first answer that is only a placeholder, or None."""
    return next((answer for answer in row.answers if _is_placeholder(answer)), None)


def placeholder_prompt(row: RowText) -> str | None:
    """Return a placeholder that is a prompt's last line (an input that says there is none), or None."""
    lasts = (prompt.rstrip().rpartition("\n")[2] for prompt in row.prompts)
    return next((last for last in lasts if _is_placeholder(last)), None)


def unfilled_field(row: RowText) -> str | None:
    """Return a field such as {{name}} in an answer that is not code, or None."""
    fields = ((_FIELD.search(answer), answer) for answer in row.answers if "{" in answer)
    return next((field[0] for field, answer in fields if field and not _CODE.search(answer)), None)


def _is_placeholder(text: str) -> bool:
    bare = text.strip().casefold()
    if len(bare) > 30:
        return False
    return "".join(bare.split()) in _PLACEHOLDERS or "".join(bare.strip(_AROUND).split()) in _PLACEHOLDERS


def _those(
    texts: Sequence[RowText], found_in: Callable[[RowText], str | None], what: str, remedy: str
) -> Iterator[Finding]:
    notes = [
        RowIssue(one.file, one.row, printable(found)) for one in texts if (found := found_in(one)) is not None
    ]
    yield from finding(what, remedy, notes, of=len(texts))


@dataclass(frozen=True)
class EndOfTurn:
    """The end-of-turn token of the training examples.

    learned: number of examples whose last target token it is. is_eos: whether it is an eos of the base model; if
    not, its embedding may be untrained. saved: the eos tokens of the tuned model.
    """

    token: str
    learned: int
    examples: int
    is_eos: bool
    saved: list[str]


@dataclass(frozen=True)
class Preflight:
    """What was predicted and doubted before the first step."""

    warnings: list[Finding] = field(default_factory=list)
    end_of_turn: EndOfTurn | None = None
    predicted_seconds: float | None = None


def end_of_turn(template: ChatTemplate, eos_token_ids: Sequence[int], training: Dataset) -> EndOfTurn:
    """Return how the training examples end. eos_token_ids: the base model's."""
    examples = training.examples
    last = examples.input_ids[examples.starts[1:] - 1]
    saved = dict.fromkeys([template.end_of_turn_id, *eos_token_ids])
    return EndOfTurn(
        token=template.end_of_turn,
        learned=int(np.count_nonzero(last == template.end_of_turn_id)),
        examples=len(examples),
        is_eos=template.end_of_turn_id in eos_token_ids,
        saved=[str(template.tokenizer.convert_ids_to_tokens(id)) for id in saved],
    )


def template_lines(template: ChatTemplate) -> Iterator[str]:
    """Yield lines on which of several templates is used, and on role markers that cannot be protected."""
    named = template.tokenizer.chat_template
    if isinstance(named, dict):
        for_tools = "tool_use for rows with tools, else default" if "tool_use" in named else "default"
        yield f"chat templates of the tokenizer: {', '.join(named)}; used: {for_tools} (--chat-template chooses)"
    if template.plain_markers:
        names = " and ".join(map(repr, template.plain_markers))
        yield f"role markers {names} are ordinary text in this chat template:"
        yield "  a user who types them begins what looks like a turn (docs/data.md, Role markers)"


def findings_in_prompts(texts: Sequence[RowText], markers: Sequence[str]) -> Iterator[Finding]:
    """Yield the finding on rows in which a user or a tool writes a role marker."""
    notes = []
    for one in texts:
        text = "\n".join(one.prompts)
        if found := [marker for marker in markers if marker in text]:
            notes.append(RowIssue(one.file, one.row, ", ".join(map(repr, found))))
    yield from finding(
        "rows in which a user or a tool writes a role marker of the template",
        "remove it, or use a template whose markers are added tokens: to the model it begins a turn",
        notes,
        of=len(texts),
    )


def check_rows(
    config: TrainConfig,
    training: Dataset,
    held_out: Dataset | None,
    *,
    max_length: int,
    markers: Sequence[str] = (),
) -> list[Finding]:
    """Return the findings on the rows of a run. The data sets must not have released their rows.

    Args:
        config: the run's options.
        training: the training set.
        held_out: the held-out set, if any.
        max_length: most tokens per example.
        markers: role markers of the chat template that are ordinary text.
    """
    texts = list(row_texts(training.rows, training.account, config))
    held = list(row_texts(held_out.rows, held_out.account, config)) if held_out else []
    found = [*_lost(training.account, max_length), *findings_in_answers(texts)]
    found += findings_in_prompts([*texts, *held], markers)
    if held_out:
        of_held_out = [*_lost(held_out.account, max_length), *findings_in_answers(held)]
        found += [replace(one, what=f"held out: {one.what}") for one in of_held_out]
    return [*found, *_repeated(texts, held)]


def _lost(account: DataReport, max_length: int) -> Iterator[Finding]:
    for reason, notes in account.dropped_by_reason().items():
        remedy = "fill them, or delete the rows" if reason.startswith("empty") else "fix them, or delete the rows"
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
            "replace them with line feeds in the file, or the model learns to write them",
            _bare([note for note in account.notes if note.text.startswith(what)]),
            of=account.rows,
        )


def _bare(notes: Sequence[RowIssue]) -> list[RowIssue]:
    return [RowIssue(note.file, note.row, "") for note in notes]


def _repeated(texts: Sequence[RowText], held: Sequence[RowText]) -> Iterator[Finding]:
    everything, known = [*texts, *held], len(texts)
    found = near_duplicate_rows([one.text for one in everything], known)

    def notes(*, same: bool, held_out: bool) -> list[RowIssue]:
        pairs = [
            (everything[one.text], everything[one.earlier])
            for one in found
            if one.same == same and (one.text >= known) == held_out
        ]
        return [RowIssue(one.file, one.row, _like(one, earlier)) for one, earlier in pairs]

    for same, what in ((True, "the same as an earlier one"), (False, "nearly the same as an earlier one")):
        remedy = "delete the later ones, unless they should count more"
        yield from finding(f"rows that are {what}", remedy, notes(same=same, held_out=False), of=known)
    for same, what in ((True, "trained on too"), (False, "nearly the same as one that is trained on")):
        remedy = "remove them from one of the two: on them, held-out loss says nothing about new rows"
        yield from finding(f"held-out rows that are {what}", remedy, notes(same=same, held_out=True), of=len(held))


def _like(one: RowText, earlier: RowText) -> str:
    return f"as row {earlier.row}" if one.file == earlier.file else f"as {earlier.file} row {earlier.row}"
