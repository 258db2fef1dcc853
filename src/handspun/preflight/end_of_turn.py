"""Whether the model will learn to end its turn: the token in the labels, in the base model, in what is saved."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from handspun.data.chat_template import ChatTemplate
from handspun.data.prepare import ExampleSet


@dataclass(frozen=True)
class EndOfTurn:
    """learned: of so many examples it is the last token that is learned. is_eos: whether it ends the base model's
    answers; if not, its embedding may never have been trained. saved: the eos of the tuned model."""

    token: str
    learned: int
    examples: int
    is_eos: bool
    saved: list[str]


def end_of_turn(template: ChatTemplate, eos_token_ids: Sequence[int], training: ExampleSet) -> EndOfTurn:
    """eos_token_ids: of the base model, from its generation_config, or its config."""
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
