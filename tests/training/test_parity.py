"""The embedded model, a real one: the same tokens, losses and gradients as transformers'."""

from typing import Any

import pytest
import torch

from handspun.data.examples import Example
from handspun.models.load import ChatModel
from handspun.training.batching import collate
from handspun.training.objectives import padded_loss
from parity import assert_same_as_transformers

pytestmark = pytest.mark.embedded

QUESTIONS = ["Name a color.", "Why is the sky blue? Answer in one sentence.", "Complete: one, two, three,"]


def prompts(model: ChatModel, count: int) -> list[list[int]]:
    return [model.template.encode_prompt([{"role": "user", "content": text}]) for text in QUESTIONS[:count]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (3, {}),
        (3, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 12}),
        (1, {"num_beams": 2, "length_penalty": 0.6, "early_stopping": True}),
        (3, {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False, "num_return_sequences": 2}),
        (1, {"num_beams": 5, "length_penalty": 2.0, "early_stopping": "never"}),
    ],
    ids=["greedy", "penalties", "2 beams", "4 beams, 3 prompts", "5 beams"],
)
def test_decoding_gives_transformers_tokens(smollm2: ChatModel, count: int, options: dict[str, Any]) -> None:
    assert_same_as_transformers(
        smollm2.model, smollm2.tokenizer, prompts(smollm2, count), max_new_tokens=20, **options
    )


@pytest.mark.slow
def test_loss_and_gradients_are_the_models_own(smollm2: ChatModel) -> None:
    examples = []
    for row, (question, answer) in enumerate(zip(QUESTIONS, ["Red.", "Because.", "four"], strict=True), start=1):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        (encoded,) = smollm2.template.encode(messages)
        examples.append(Example(encoded.input_ids, encoded.loss_mask, "rows.csv", row))
    model = smollm2.model
    theirs = model(**collate(examples, pad_token_id=0)).loss
    theirs.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    ours, count = padded_loss(model, examples, pad_token_id=0, dtype=torch.float32)
    (ours / count).backward()
    assert (ours / count).item() == pytest.approx(theirs.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, name
    model.zero_grad(set_to_none=True)
