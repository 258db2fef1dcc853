"""Score a model on rows: loss, perplexity, exact matches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from handspun.config import DataConfig
from handspun.data.dataset import ExampleCache, example_set, fingerprint, resolve_max_length
from handspun.data.examples import DataReport
from handspun.data.rows import Row, read_sources
from handspun.decoding.results import GenerationResult
from handspun.display import count_of, progress
from handspun.errors import ConfigError
from handspun.evaluation.answers import Question, greedy_answers, is_right, question_of
from handspun.evaluation.losses import RowKey, row_losses
from handspun.files import cache_folder
from handspun.models.embedding_rows import check_examples, embedding_rows
from handspun.models.load import ChatModel, context_length


@dataclass(frozen=True)
class RowScore:
    """The score of one row.

    loss_sum: loss summed over its target tokens; None if it has none. answer: the model's answer; None if the
    model was not asked.
    """

    question: Question
    loss_sum: float | None
    tokens: int
    answer: GenerationResult | None

    @property
    def loss(self) -> float | None:
        """Mean loss per target token."""
        return None if self.loss_sum is None else self.loss_sum / self.tokens

    @property
    def exact_match(self) -> bool | None:
        """True if the answer matches the row's output or its trained text; None if the model was not asked."""
        if self.answer is None:
            return None
        return is_right(self.question, self.answer.text)


@dataclass(frozen=True, repr=False)
class Scores:
    """A model's scores on a set of rows."""

    model: str
    data: str
    fingerprint: str
    """Hash of the rows."""
    max_length: int
    rows: list[RowScore]
    """Each row's question, loss, answer, and whether it matches."""
    account: DataReport
    """Rows read, kept and dropped."""

    @property
    def tokens(self) -> int:
        """Number of target tokens that the loss is a mean over."""
        return sum(row.tokens for row in self.rows)

    @property
    def loss(self) -> float | None:
        """Mean loss per target token over all rows (not a mean of per-row or per-batch means)."""
        if not self.tokens:
            return None
        return math.fsum(row.loss_sum for row in self.rows if row.loss_sum is not None) / self.tokens

    @property
    def perplexity(self) -> float | None:
        """Perplexity, exp(loss)."""
        if self.loss is None:
            return None
        return math.inf if self.loss > 700 else math.exp(self.loss)

    @property
    def exact_match(self) -> float | None:
        """Share of the answers that match; None if the model was not asked."""
        matches = [row.exact_match for row in self.rows if row.exact_match is not None]
        return sum(matches) / len(matches) if matches else None

    def __repr__(self) -> str:
        """Return one line: the model, the rows, and the scores."""
        loss = f", loss {self.loss:.4f}" if self.loss is not None else ""
        share = f", exact match {self.exact_match:.1%}" if self.exact_match is not None else ""
        return f"Scores({self.model!r}, {count_of(len(self.rows), 'row')}{loss}{share})"


def score(
    chat: ChatModel,
    config: DataConfig,
    *,
    batch_size: int = 8,
    ask: bool = False,
    max_new_tokens: int = 512,
) -> Scores:
    """Return a model's scores on the rows of `config.data`.

    Args:
        chat: The model.
        config: The rows and how to read them.
        batch_size: Rows computed together. It does not change the scores.
        ask: Also answer every prompt greedily and compare.
        max_new_tokens: Maximum number of tokens per answer.

    Raises DataError for rows that cannot be used, and ConfigError if there is nothing to score.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}: expected at least 1.")
    file_notes: dict[str, list[str]] = {}
    rows = read_sources(config.sources, file_notes, config.column_names, config.limit)
    max_length = resolve_max_length(config.max_length, context_length(chat.model.config))
    made = example_set(
        rows,
        config,
        chat.template,
        max_length=max_length,
        file_notes=file_notes,
        cache=ExampleCache(cache_folder() / "examples"),
    )
    check_examples(made.examples, embedding_rows(chat.model), chat.tokenizer, chat.name)
    what = f"computing the losses of {count_of(len(made.examples), 'example')}"
    with progress(what, len(made.examples)) as on_example:
        losses = row_losses(chat, made.examples, batch_size=batch_size, on_example=on_example)
    questions = _questions(rows, made.account, config, chat if ask else None)
    answers: dict[RowKey, GenerationResult] = {}
    if ask:
        asked = [question for question in questions if question.messages and not question.needs_tools]
        with progress(f"answering {count_of(len(asked), 'prompt')}", len(asked)) as on_answer:
            found = greedy_answers(
                chat,
                asked,
                system_prompt=config.system_prompt,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_answer=on_answer,
            )
        answers = {(q.file, q.row): answer for q, answer in zip(asked, found, strict=True)}
    scored = [_row_score(question, losses, answers) for question in questions]
    return Scores(chat.name, ", ".join(config.sources), fingerprint(rows), max_length, scored, made.account)


def _questions(
    rows: Sequence[Row], account: DataReport, config: DataConfig, chat: ChatModel | None
) -> list[Question]:
    """Return the questions of the rows that were kept. chat: the model that will answer, if any."""
    dropped = {(note.file, note.row) for note in account.dropped}
    kept = [row for row in rows if (row.file, row.number) not in dropped]
    return [
        question_of(row, account.formats, system_prompt=config.system_prompt, role_map=config.roles, chat=chat)
        for row in kept
    ]


def _row_score(
    question: Question,
    losses: Mapping[RowKey, tuple[float, int]],
    answers: Mapping[RowKey, GenerationResult],
) -> RowScore:
    key = question.file, question.row
    loss_sum, tokens = losses.get(key, (None, 0))
    return RowScore(question, loss_sum, tokens, answers.get(key))
