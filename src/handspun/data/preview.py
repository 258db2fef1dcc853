"""Rendered examples in which one sees what is learned."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from handspun.data.examples import Example
from handspun.display import visible


def learned_runs(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """(text, is it learned) in order; the texts end to end are the example as the model reads it."""
    pairs = zip(example.input_ids, example.loss_mask, strict=True)
    for is_learned, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [id for id, _ in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield str(text), is_learned


def colored(example: Example, tokenizer: PreTrainedTokenizerBase, *, most: int | None = None) -> Text:
    """Learned tokens in bold green on the terminal. most: characters of each run, the rest of it left out."""
    text = Text()
    for run, is_learned in learned_runs(example, tokenizer):
        text.append(visible(_cut(run, most)), style="bold green" if is_learned else "dim")
    return text


def bracketed(example: Example, tokenizer: PreTrainedTokenizerBase, *, most: int | None = None) -> str:
    """Learned tokens between ⟦ and ⟧, for files and for terminals without color. most: as above."""
    runs = [(_cut(run, most), is_learned) for run, is_learned in learned_runs(example, tokenizer)]
    text = "".join(f"⟦{run}⟧" if is_learned else run for run, is_learned in runs)
    return visible(text)


def _cut(run: str, most: int | None) -> str:
    """Its beginning and its end, where it is longer."""
    if most is None or len(run) <= most:
        return run
    head, tail = run[: most * 2 // 3], run[len(run) - most // 3 :]
    return f"{head} … {len(run) - len(head) - len(tail)} characters … {tail}"


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """The first example and others at even distances, so that a preview shows the whole of a file."""
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]
