"""Order, batches, micro-batches and padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from handspun.data.examples import Example
from handspun.training.batching import Batching, batches, collate, epoch_order


def example(length: int, row: int = 1) -> Example:
    return Example(list(range(1, length + 1)), [i > 0 for i in range(length)], "rows.csv", row)


def test_an_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch_order(100, seed=1, epoch=1) == epoch_order(100, seed=1, epoch=1)
    assert epoch_order(100, seed=1, epoch=1) != epoch_order(100, seed=1, epoch=2)
    assert epoch_order(100, seed=1, epoch=1) != epoch_order(100, seed=2, epoch=1)
    assert sorted(epoch_order(100, seed=1, epoch=1)) == list(range(100))


def test_an_order_is_the_same_in_every_version() -> None:
    """A run resumes in the middle of an epoch, whatever version saved it."""
    for seed, epoch, number in ((0, 1, 1), (2, 3, 2_000_009), (2**62, 5, 2**62 + 5)):
        generator = torch.Generator().manual_seed(number)
        assert epoch_order(50, seed=seed, epoch=epoch) == torch.randperm(50, generator=generator).tolist()


def test_the_last_shorter_batch_is_trained_on() -> None:
    made = list(batches([example(3, row) for row in range(7)], range(7), 3))
    assert [[e.row for e in batch] for batch in made] == [[0, 1, 2], [3, 4, 5], [6]]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.integers(1, 100))
def test_micro_batches_hold_every_row_once_and_keep_to_max_tokens(lengths: list[int], max_tokens: int) -> None:
    rows = [example(length, row) for row, length in enumerate(lengths)]
    parts = list(Batching("padded").split(rows, max_tokens))
    assert sorted(e.row for part in parts for e in part) == list(range(len(rows)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(len(e) for e in part) <= max_tokens


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "parts"),
    [
        ([3, 4], 8, [[3, 4]]),  # two rows of 4, padded: 8
        ([3, 4], 7, [[3], [4]]),
        ([9, 2, 5, 2], 15, [[2, 2, 5], [9]]),
        ([9, 2, 5, 2], 14, [[2, 2], [5], [9]]),
        ([4, 4, 4], 12, [[4, 4, 4]]),
        ([4, 4, 4], 11, [[4, 4], [4]]),
        ([20, 1], 5, [[1], [20]]),
    ],
)
def test_micro_batches_by_hand(lengths: list[int], max_tokens: int, parts: list[list[int]]) -> None:
    made = Batching("padded").split([example(length) for length in lengths], max_tokens)
    assert [[len(e) for e in part] for part in made] == parts


def test_computed_tokens_by_hand() -> None:
    """The rows share 1 and 2, but 2 predicts a target of the second one."""
    rows = [
        Example([1, 2, 3, 4], [False, False, False, True], "a", 1),
        Example([1, 2, 5], [False, False, True], "a", 2),
    ]
    assert Batching("padded").computed_tokens(rows) == 8
    assert Batching("packed").computed_tokens(rows) == 7
    assert Batching("packed", share_prefix=True).computed_tokens(rows) == 6
    assert Batching("packed", share_prefix=True, multiple=4).computed_tokens(rows) == 8


def test_collate_pads_on_the_right_and_masks_by_hand() -> None:
    batch = collate(
        [Example([5, 6, 7], [False, True, True], "a", 1), Example([8], [False], "a", 2)], pad_token_id=0
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]


def test_a_pad_token_that_is_a_target_is_trained_on_and_padding_is_not() -> None:
    """Where pad and eos are one id, masking by its value would mask the end of turn."""
    eos = 2
    batch = collate([Example([1, eos], [False, True], "a", 1), Example([1, 3, eos], [False, True, True], "a", 2)],
                    pad_token_id=eos)  # fmt: skip
    assert batch["input_ids"].tolist() == [[1, eos, eos], [1, 3, eos]]
    assert batch["labels"].tolist() == [[-100, eos, -100], [-100, 3, eos]]
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 0], [1, 1, 1]]))
