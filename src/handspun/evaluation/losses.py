"""Compute every row's loss, as a sum and a count, so that means over tokens can be taken over any set of rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.decoding.engines.base import Engine, ModelInput
from handspun.decoding.engines.choose import make_engine
from handspun.models.load import ChatModel
from handspun.training.batching import batches
from handspun.training.packed import LOGITS_CHUNK_BYTES
from handspun.training.runner import select_runner

_MAX_TOKENS = TrainConfig.max_tokens
"""Maximum number of tokens in a micro-batch, as in training."""

RowKey = tuple[str, int]
"""(file, row number)."""


def row_losses(
    chat: ChatModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    on_example: Callable[[int], None] | None = None,
) -> dict[RowKey, tuple[float, int]]:
    """Return (loss summed over target tokens, number of target tokens) of every row.

    float32 weights use the runners of training, so the result equals a run's held-out loss. Other weights, such as
    int8, use the decoding engine. NaN stays NaN.

    Args:
        chat: The model.
        examples: Tokenized examples; a row may have several.
        batch_size: Examples computed together.
        on_example: Called with the number of examples done.
    """
    is_float32 = chat.fused is None and chat.model.dtype == torch.float32
    losses_of = _by_execution if is_float32 else _by_engine
    sums: dict[RowKey, tuple[float, int]] = {}
    done = 0
    with losses_of(chat, examples) as compute:
        for batch in batches(examples, range(len(examples)), batch_size):
            for example, loss in compute(batch):
                before, tokens = sums.get((example.file, example.row), (0.0, 0))
                sums[example.file, example.row] = (before + loss, tokens + example.learned_tokens)
            done += len(batch)
            if on_example is not None:
                on_example(done)
    return sums


_Compute = Callable[[list[Example]], Iterator[tuple[Example, float]]]


@contextmanager
def _by_execution(chat: ChatModel, examples: Sequence[Example]) -> Iterator[_Compute]:
    pad_token_id = chat.tokenizer.pad_token_id
    with select_runner(
        chat.model,
        TrainConfig(),
        examples,
        dtype=torch.float32,
        pad_token_id=pad_token_id if pad_token_id is not None else 0,  # padding is masked, so any id works
    ) as runner:

        def compute(batch: list[Example]) -> Iterator[tuple[Example, float]]:
            for micro_batch in runner.batching.split(batch, _MAX_TOKENS):
                yield from zip(micro_batch, runner.row_losses(micro_batch), strict=True)

        yield compute


@contextmanager
def _by_engine(chat: ChatModel, _examples: Sequence[Example]) -> Iterator[_Compute]:
    engine = make_engine(chat)
    at_once = max(LOGITS_CHUNK_BYTES // (4 * int(chat.model.config.get_text_config().vocab_size)), 16)
    yield lambda batch: ((example, _answer_loss(engine, example, at_once)) for example in batch)


def _answer_loss(engine: Engine, example: Example, at_once: int) -> float:
    """Return the loss summed over the example's target tokens, with logits for `at_once` positions at a time."""
    row, first = engine.add(), example.loss_mask.index(True)
    if first > 1:
        engine.forward([ModelInput(row, example.input_ids[: first - 1])])  # the prompt, which needs no logits
    total = 0.0
    for start in range(first - 1, len(example) - 1, at_once):
        stop = min(start + at_once, len(example) - 1)
        logits = engine.forward([ModelInput(row, example.input_ids[start:stop], all_logits=True)])
        is_target = torch.tensor(example.loss_mask[start + 1 : stop + 1], device=logits.device)
        targets = torch.tensor(example.input_ids[start + 1 : stop + 1], device=logits.device)
        total += F.cross_entropy(logits[is_target], targets[is_target], reduction="sum").item()
    engine.free(row)
    return total
