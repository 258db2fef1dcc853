"""Checks that the model's embedding has a row for every token id of examples and prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from handspun.data.examples import TokenDataset
from handspun.errors import ModelError
from handspun.models.load import ModelSource, load_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_NAMED = 5


def embedding_rows(model: "PreTrainedModel") -> int:
    """Return the number of token ids that the model has an embedding for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def embedding_rows_of(source: ModelSource) -> int | None:
    """Return the same from the config alone, or None for an adapter, which may bring its own embedding."""
    if source.adapter is not None:
        return None
    size = getattr(load_config(source).get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def check_examples(
    examples: TokenDataset, rows: int | None, tokenizer: "PreTrainedTokenizerBase", name: str
) -> None:
    """Raise ModelError if the examples hold ids beyond the embedding, with the tokens and the first row.

    Args:
        examples: training or evaluation examples.
        rows: number of rows of the embedding; None if unknown so far.
        tokenizer: the tokenizer that made the examples.
        name: the model's name, for the message.
    """
    if rows is None or not len(examples.input_ids) or examples.input_ids.max() < rows:
        return
    positions = np.flatnonzero(examples.input_ids >= rows)
    first = int(np.searchsorted(examples.starts, positions[0], side="right")) - 1
    of_examples = np.unique(np.searchsorted(examples.starts, positions, side="right"))
    where = f"{examples.file_names[examples.files[first]]}, row {examples.rows[first]}"
    ids = np.unique(examples.input_ids[positions]).tolist()
    raise _beyond_embedding(
        ids, rows, tokenizer, name, f"{len(of_examples)} of {len(examples)} examples, first {where}"
    )


def check_prompt(
    ids: Sequence[int], model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", where: str
) -> None:
    """Raise ModelError if a prompt holds ids beyond the model's embedding.

    Args:
        ids: the prompt's token ids.
        model: the model.
        tokenizer: the tokenizer that made the ids.
        where: which prompt it is, for the message.
    """
    rows = embedding_rows(model)
    if max(ids, default=0) >= rows:
        raise _beyond_embedding(sorted({id for id in ids if id >= rows}), rows, tokenizer, "the model", where)


def _beyond_embedding(
    ids: Sequence[int], rows: int, tokenizer: "PreTrainedTokenizerBase", name: str, where: str
) -> ModelError:
    named = ", ".join(f"{tokenizer.convert_ids_to_tokens(id)!r} (id {id})" for id in ids[:_MAX_NAMED])
    more = f" and {len(ids) - _MAX_NAMED} more" if len(ids) > _MAX_NAMED else ""
    return ModelError(
        f"{name}: the embedding has {rows} rows and the tokenizer {len(tokenizer)} tokens. {named}{more} have no "
        f"row, and are in {where}. Use the tokenizer that belongs to these weights, or enlarge the embedding: "
        "call model.resize_token_embeddings(len(tokenizer)) in transformers, then save both in one folder."
    )
