"""A micro-batch that does not fit is cut, and nothing else changes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.errors import TrainingError
from handspun.training.batching import Batching
from handspun.training.distributed import Distributed
from handspun.training.guards import OutOfMemory, halved_max_tokens, is_out_of_memory, raise_if_unsplittable
from handspun.training.loop import Event, Loop, Step, start, train
from handspun.training.runner import BatchRunner, select_runner
from tiny import tiny_model


def no_memory() -> RuntimeError:
    """PyTorch's own, not an imitation."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    return caught.value


def random_examples(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for row in range(count):
        length = int(torch.randint(6, 30, (1,), generator=generator))
        ids = torch.randint(0, 300, (length,), generator=generator).tolist()
        examples.append(Example(ids, [i >= length // 2 for i in range(length)], "rows.csv", row + 1))
    return examples


@dataclass(frozen=True)
class Small:
    """An runner that has memory for so many tokens at once: it fails when half of the gradients are there."""

    whole: BatchRunner
    room: int
    error: BaseException

    @property
    def batching(self) -> Batching:
        return self.whole.batching

    def loss(self, part: Sequence[Example]) -> float:
        return self.whole.loss(part)

    def row_losses(self, part: Sequence[Example]) -> list[float]:
        return self.whole.row_losses(part)

    def backward(self, part: Sequence[Example], divisor: int) -> float:
        loss = self.whole.backward(part, divisor)
        if sum(map(len, part)) > self.room:
            raise self.error
        return loss


def run(config: TrainConfig, *, room: int | None = None, error: BaseException | None = None) -> list[Event]:
    model, examples = tiny_model("qwen2", initializer_range=0.05), random_examples(24)
    with select_runner(model, config, examples, dtype=torch.float32, pad_token_id=0) as runner:
        if room is not None:
            runner = Small(runner, room, error or no_memory())
        return list(train(Loop(config=config, examples=examples, runner=runner), start(model, config)))


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_the_result_is_that_of_smaller_micro_batches(batching: Any) -> None:
    config = TrainConfig(num_epochs=2, batch_size=6, learning_rate=1e-3, batching=batching)
    expected = [event for event in run(replace(config, max_tokens=40)) if isinstance(event, Step)]
    events = run(config, room=60)
    found = [event for event in events if isinstance(event, Step)]
    assert [s.loss for s in found] == pytest.approx([s.loss for s in expected], rel=1e-5)
    assert [s.grad_norm for s in found] == pytest.approx([s.grad_norm for s in expected], rel=1e-5)
    tried = [event for event in events if isinstance(event, OutOfMemory)]
    assert tried[0].step == 1
    assert events.index(tried[0]) == 0
    assert 30 <= tried[-1].max_tokens <= 60
    assert len(tried) <= 3  # what was learned of the room is kept


@pytest.mark.parametrize(("batching", "tokens"), [("packed", 10), ("padded", 12)])
def test_out_of_memory_says_what_was_computed_by_hand(batching: Any, tokens: int) -> None:
    """Rows of 4 and 6 tokens do not fit together; half of their 10 tokens lets each go alone."""
    examples = [Example([1] * length, [False] + [True] * (length - 1), "a", length) for length in (4, 6)]
    model, config = tiny_model("qwen2"), TrainConfig(num_epochs=1, batch_size=2, batching=batching)
    with select_runner(model, config, examples, dtype=torch.float32, pad_token_id=0) as runner:
        loop = Loop(config=config, examples=examples, runner=Small(runner, 6, no_memory()))
        event = next(train(loop, start(model, config)))
    assert event == OutOfMemory(step=1, epoch=1, tokens=tokens, max_tokens=5)


@pytest.mark.parametrize(
    ("options", "remedies"),
    [
        ({}, "--activation-checkpointing, --optimizer-states 8bit, --lora"),
        ({"optimizer_states": "8bit"}, "--activation-checkpointing, --lora"),
        ({"shard": True}, "--activation-checkpointing, --lora"),
        ({"lora": True}, "--activation-checkpointing, --optimizer-states 8bit"),
        ({"activation_checkpointing": True, "optimizer_states": "8bit"}, "--lora"),
    ],
)
def test_raise_if_unsplittable_names_only_what_is_not_on(options: dict[str, Any], remedies: str) -> None:
    one = [Example([1] * 11, [False] + [True] * 10, "a.csv", 7)]
    with pytest.raises(TrainingError) as caught:
        raise_if_unsplittable(one, 3, TrainConfig(**options), processes=1)
    assert str(caught.value) == (
        "step 3 ran out of memory: a.csv, row 7, alone has 11 tokens. Weights are unchanged. Use less memory with "
        f"any of: --max-length 5 (longer rows are truncated), {remedies}. --dry-run predicts how much each needs."
    )


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_pythons_and_a_gpus_errors_are_known_too(error: BaseException) -> None:
    assert any(isinstance(event, OutOfMemory) for event in run(TrainConfig(num_epochs=1), room=60, error=error))


def test_other_errors_are_left_alone() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(TrainConfig(num_epochs=1), room=60, error=RuntimeError("shapes"))


def test_a_row_that_does_not_fit_by_itself_ends_the_run_with_what_takes_less() -> None:
    message = (
        r"step 1 ran out of memory: rows\.csv, row \d+, alone has \d+ tokens\. .*--max-length \d+ .*"
        r"--optimizer-states 8bit, --lora\."
    )
    with pytest.raises(TrainingError, match=message) as caught:
        run(TrainConfig(num_epochs=1, activation_checkpointing=True), room=5)
    assert "--activation-checkpointing" not in str(caught.value)  # it is on


def test_with_several_processes_the_run_ends() -> None:
    model, examples = tiny_model("qwen2"), random_examples(8)
    config = TrainConfig(num_epochs=1)
    with select_runner(model, config, examples, dtype=torch.float32, pad_token_id=0) as runner:
        small = Small(runner, 20, no_memory())
        loop = Loop(config=config, examples=examples, runner=small, processes=Distributed(0, 2))
        with pytest.raises(TrainingError, match=r"a micro-batch of \d rows .*--max-tokens \d+, "):
            list(train(loop, start(model, config)))


def test_the_next_cut_is_always_a_smaller_one() -> None:
    """Two rows of 10 tokens under a limit of 2,048: 1,024 would leave them together."""
    two = [Example([1] * 10, [False] + [True] * 9, "a", row) for row in range(2)]
    assert halved_max_tokens(two, 2048) == 10
    assert halved_max_tokens(two, 8) == 4
