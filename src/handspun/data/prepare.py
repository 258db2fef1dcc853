"""From a configuration to the examples of a run: read, hold out, render, tokenise, account."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from handspun.config import DataConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.examples import Example, RowAccount, build_examples, hold_out
from handspun.data.rows import Row, read_rows
from handspun.errors import ConfigError

DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class ExampleSet:
    """Examples, the account of the rows that they came from, and a sha256 of those rows."""

    examples: list[Example]
    account: RowAccount
    fingerprint: str


def prepare_examples(
    config: DataConfig,
    template: ChatTemplate,
    *,
    max_length: int,
    eval_data: str | None = None,
    eval_ratio: float = 0.0,
    seed: int = 0,
) -> tuple[ExampleSet, ExampleSet | None]:
    """(training examples, held-out examples or None).

    Held-out rows come from `eval_data`, or are an `eval_ratio` of the training rows. Raises DataError.
    """
    rows = read_rows(config.data)
    held_out: Sequence[Row] = []
    if eval_data is not None:
        held_out = read_rows(eval_data)
    elif eval_ratio > 0:
        rows, held_out = hold_out(rows, eval_ratio, seed)

    def example_set(some: Sequence[Row]) -> ExampleSet:
        examples, account = build_examples(
            some,
            template,
            max_length=max_length,
            data_format=config.data_format,
            system_prompt=config.system_prompt,
            strict=config.strict,
        )
        return ExampleSet(examples, account, fingerprint(some))

    return example_set(rows), example_set(held_out) if held_out else None


def resolve_max_length(given: int | None, limit: int | None) -> int:
    """The user's `max_length`, or 2,048 or the model's own limit where that is less.

    Raises ConfigError if the user's is more than the model can read.
    """
    if given is None:
        return min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
    if limit is not None and given > limit:
        raise ConfigError(f"--max-length is {given}, but the model reads at most {limit} tokens: give less.")
    return given


def fingerprint(rows: Sequence[Row]) -> str:
    """sha256 of the rows' values in their order, whatever files they stand in."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(
            json.dumps(row.values, sort_keys=True, ensure_ascii=False, default=str).encode(
                "utf-8", "surrogatepass"
            )
        )
        digest.update(b"\n")
    return digest.hexdigest()
