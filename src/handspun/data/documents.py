"""Plain text to continue pretraining on: documents without turns, of which every token is trained on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from handspun.data.chat_template import ChatTemplate, Layout, Span, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT = "longer than max_length: split into pieces, and no token is left out"
"""Note on a document of several pieces."""


def end_of_text(template: ChatTemplate) -> tuple[int, str]:
    """Return the id and text of the token that ends a document: the tokenizer's eos, or the end of a turn."""
    tokenizer = template.tokenizer
    if tokenizer.eos_token_id is None:
        return template.end_of_turn_id, template.end_of_turn
    return tokenizer.eos_token_id, str(tokenizer.eos_token)


def lay_out_document(text: str, template: ChatTemplate) -> Layout:
    """Return a document and its end, after the bos token if the tokenizer puts one before every text."""
    id, token = end_of_text(template)
    begin = _begin_of_text(template.tokenizer)
    return Layout([*begin, Span(text, True, None, first=not begin), Span(token, True, [id])])


def _begin_of_text(tokenizer: "PreTrainedTokenizerBase") -> list[Span]:
    around = tokenizer("")["input_ids"]
    if tokenizer.bos_token_id is None or tokenizer.bos_token_id not in around[:1]:
        return []
    return [Span(str(tokenizer.bos_token), False, [tokenizer.bos_token_id], first=True)]


def pieces(example: TokenizedExample, max_length: int) -> Iterator[TokenizedExample]:
    """Yield pieces of at most `max_length` tokens. Each begins with the last token of the one before it."""
    # The first token of a piece is not trained on, since nothing predicts it. So every token but the document's
    # first is trained on once.
    for start in range(0, max(len(example.input_ids) - 1, 1), max_length - 1):
        part = slice(start, start + max_length)
        yield TokenizedExample(example.input_ids[part], example.loss_mask[part])
