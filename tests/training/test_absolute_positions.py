"""A model with learned absolute positions (GPT-2's kind): rotary ones hide a shift of all positions."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.display import captured_log
from handspun.models.load import ChatModel
from handspun.training.batching import Batching
from handspun.training.objectives import PaddedRunner
from handspun.training.packed import Packed, packed_attention
from handspun.training.runner import select_runner, shares_prefix
from parity import answers_to, assert_same_as_transformers
from tiny import tiny_tokenizer

PROMPTS = [[5, 9, 13, 4], [8], [11, 6, 17, 9, 10, 12, 21, 5, 19]]


def gpt2(**config: Any) -> PreTrainedModel:
    without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = GPT2Config(
            vocab_size=330, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.5,
            bos_token_id=None, eos_token_id=None, pad_token_id=1, **{**without_dropout, **config},
        )  # fmt: skip
        return GPT2LMHeadModel(shape).eval()


def rows() -> list[Example]:
    """Different lengths behind three tokens that all share."""
    return [
        Example([7, 8, 9, *range(20, 20 + own)], [i >= 5 for i in range(3 + own)], "rows.csv", own)
        for own in (4, 13, 9)
    ]


def loss_and_gradients(model: PreTrainedModel, losses: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = sum(losses)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def one_at_a_time(model: PreTrainedModel) -> list[torch.Tensor]:
    """Each row's loss summed over its target tokens, as transformers computes it without padding."""
    losses = []
    for row in rows():
        ids, learned = torch.tensor([row.input_ids]), torch.tensor([row.loss_mask])
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses.append(-logits.gather(1, ids[0, 1:, None])[:, 0][learned[0, 1:]].sum())
    return losses


@pytest.mark.parametrize("runner", ["padded", "packed", "packed behind a shared prefix"])
def test_losses_and_gradients_are_those_of_rows_alone(runner: str) -> None:
    model = gpt2()
    expected, wanted = loss_and_gradients(model, one_at_a_time(model))
    if runner == "padded":
        padded = PaddedRunner(model, torch.float32, pad_token_id=300)
        found = padded.backward(rows(), 1)
    else:
        with packed_attention(model):
            found = Packed(model, torch.float32, Batching("packed", "shared" in runner)).backward(rows(), 1)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        atol = 1e-5 * wanted[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=atol)


def test_it_is_packed() -> None:
    with (
        captured_log() as log,
        select_runner(gpt2(), TrainConfig(), rows(), dtype=torch.float32, pad_token_id=1) as runner,
    ):
        assert isinstance(runner, Packed)
    assert log == ["batching: packed"]


@pytest.mark.parametrize("dropout", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_no_prefix_is_shared_under_dropout_whatever_the_model_calls_it(dropout: str) -> None:
    """Rows behind one prefix would share what is dropped of it."""
    assert shares_prefix(gpt2().config, TrainConfig())
    assert not shares_prefix(gpt2(**{dropout: 0.1}).config, TrainConfig())


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.3, "min_new_tokens": 6}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=str,
)
def test_prompts_of_different_lengths_are_answered_as_transformers_does(options: dict[str, Any]) -> None:
    assert_same_as_transformers(
        gpt2(), tiny_tokenizer(), PROMPTS, eos_token_ids=[3, 7], max_new_tokens=15, **options
    )


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "temperature": 1.5}, {"num_beams": 3}], ids=["greedy", "sampled", "beams"]
)
def test_answers_do_not_depend_on_the_padding_of_batch_mates(options: dict[str, Any]) -> None:
    chat = ChatModel(gpt2(), tiny_tokenizer(), "gpt2")
    together, alone = (
        [answer.token_ids for answer in answers_to(chat, PROMPTS, max_new_tokens=20, batch_size=size, **options)]
        for size in (64, 1)
    )
    assert together == alone


def test_drafts_change_nothing() -> None:
    """What is taken back of them leaves no gap in the positions."""
    chat = ChatModel(gpt2(), tiny_tokenizer(), "gpt2")
    plain, drafted = (
        answers_to(chat, PROMPTS, max_new_tokens=40, prompt_lookup_num_tokens=drafted) for drafted in (0, 3)
    )
    assert [answer.token_ids for answer in drafted] == [answer.token_ids for answer in plain]
    assert 0 < sum(answer.accepted_tokens for answer in drafted) < sum(answer.drafted_tokens for answer in drafted)
