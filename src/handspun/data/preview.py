"""Render examples so that the target tokens stand out."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from rich.text import Text

from handspun.data.examples import Example
from handspun.display import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Item = TypeVar("_Item")


def target_runs(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, bool]]:
    """Yield (text, is it trained on) in order. The texts end to end are the example as the model reads it."""
    pairs = zip(example.input_ids, example.loss_mask, strict=True)
    for is_target, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [id for id, _ in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield str(text), is_target


def colored(example: Example, tokenizer: "PreTrainedTokenizerBase", *, most: int | None = None) -> Text:
    """Return the text with target tokens in bold green. most: characters per run; longer runs are shortened."""
    text = Text()
    for run, is_target in target_runs(example, tokenizer):
        text.append(visible(_cut(run, most)), style="bold green" if is_target else "dim")
    return text


def bracketed(example: Example, tokenizer: "PreTrainedTokenizerBase", *, most: int | None = None) -> str:
    """Return the text with target tokens between ⟦ and ⟧, for output without color. most: as in `colored`."""
    runs = [(_cut(run, most), is_target) for run, is_target in target_runs(example, tokenizer)]
    text = "".join(f"⟦{run}⟧" if is_target else run for run, is_target in runs)
    return visible(text)


def _cut(run: str, most: int | None) -> str:
    """Return the text, or only its beginning and end if it is longer than `most`."""
    if most is None or len(run) <= most:
        return run
    head, tail = run[: most * 2 // 3], run[len(run) - most // 3 :]
    return f"{head} … {len(run) - len(head) - len(tail)} characters … {tail}"


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """Return the first item and others at even distances, so that they represent all."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def spread_order(count: int) -> list[int]:
    """Return the indices in an order of which every beginning is about evenly spaced: 0, 4, 2, 6, 1, 5, 3, 7."""
    bits = max(count - 1, 1).bit_length()
    return sorted(range(count), key=lambda i: f"{i:0{bits}b}"[::-1])
