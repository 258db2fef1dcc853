"""The loop against one written in plain torch, transformers and peft: after two epochs, the same weights."""

import copy
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.models.lora import add_lora
from handspun.training.loop import EpochEnd, Loop, Step, start, train
from handspun.training.runner import select_runner
from reference_loop import ReferenceStep, reference_loop
from tiny import tiny_model

PEAK = 0.01
RATES = [PEAK / 2, PEAK, PEAK, 0.75 * PEAK, 0.5 * PEAK, 0.25 * PEAK]
"""Six steps with a warm-up of 0.25: 1.5 steps, rounded up; then linear over the four that are left."""
CONFIG: dict[str, Any] = {
    "num_epochs": 2,
    "batch_size": 2,
    "learning_rate": PEAK,
    "warmup_ratio": 0.25,
    "weight_decay": 0.1,
    "seed": 3,
}


def rows() -> list[tuple[list[int], list[bool]]]:
    """Five rows of different lengths, of which between 1 and 12 tokens are learned; two begin alike."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length, learned in ((9, 1), (20, 12), (14, 3), (11, 8), (17, 5)):
        ids = torch.randint(0, 300, (length,), generator=generator).tolist()
        made.append(([7, 8, 9, *ids[3:]], [i >= length - learned for i in range(length)]))
    return made


def product_loop(model: PreTrainedModel, config: TrainConfig) -> list[Step]:
    """Train the model in place with the matmul's loop."""
    examples = [Example(*row, "rows.csv", number) for number, row in enumerate(rows(), 1)]
    with select_runner(model, config, examples, dtype=torch.float32, pad_token_id=0) as runner:
        events = list(train(Loop(config=config, examples=examples, runner=runner), start(model, config)))
    assert [event.step for event in events if isinstance(event, EpochEnd)] == [3, 6]
    return [event for event in events if isinstance(event, Step)]


def a_model(**config: Any) -> PreTrainedModel:
    """A Qwen2: biases in its attention, norms, and matrices, none of them zeros or ones."""
    model = tiny_model("qwen2", initializer_range=0.2, **config).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def assert_same_steps(found: list[Step], expected: list[ReferenceStep], max_grad_norm: float) -> None:
    assert [step.learning_rate for step in found] == pytest.approx(RATES, rel=1e-12)
    assert [step.loss for step in found] == pytest.approx([step.loss for step in expected], rel=2e-6)
    assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in expected], rel=1e-5)
    clipped = [step.grad_norm > max_grad_norm for step in found]
    assert any(clipped), "clipping is at work"
    assert not all(clipped), "and not everywhere, where AdamW would not show it"


def assert_same_weights(found: Any, expected: Any, before: dict[str, torch.Tensor]) -> None:
    """To what rounding gives: AdamW divides a gradient near zero by its own size, rounding errors included."""
    wanted = {name: parameter for name, parameter in expected.named_parameters() if parameter.requires_grad}
    trained = {name: parameter for name, parameter in found.named_parameters() if parameter.requires_grad}
    assert trained.keys() == wanted.keys()
    for name, parameter in trained.items():
        off, moved = parameter - wanted[name], wanted[name] - before[name]
        assert off.square().mean().sqrt() < 5e-6, name
        assert off.abs().max() < PEAK / 100, name
        assert moved.abs().max() > PEAK, name


@pytest.mark.parametrize("max_tokens", [1, 2048])  # a row in each micro-batch, and the whole batch in one
@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("tied", [False, True])
def test_train_ends_with_the_weights_of_a_loop_in_plain_torch(
    tied: bool, batching: Literal["padded", "packed"], max_tokens: int
) -> None:
    ours = a_model(tie_word_embeddings=tied)
    theirs = copy.deepcopy(ours)
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    assert any(name.endswith("bias") for name in before)
    norm = 6.5
    config = TrainConfig(**CONFIG, batching=batching, max_tokens=max_tokens, max_grad_norm=norm)
    found = product_loop(ours, config)
    expected = reference_loop(theirs, rows(), RATES, batch_size=2, seed=3, weight_decay=0.1, max_grad_norm=norm)
    assert_same_steps(found, expected, norm)
    assert_same_weights(ours, theirs, before)


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_train_ends_with_the_adapters_of_peft_in_plain_torch(batching: Literal["padded", "packed"]) -> None:
    theirs: Any = get_peft_model(
        a_model(),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=3,
            lora_alpha=12,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    )
    ours = add_lora(a_model(), "tiny", rank=3, alpha=12, dropout=0.0)
    ours.load_state_dict(theirs.state_dict())
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    norm = 6.5
    found = product_loop(ours, TrainConfig(**CONFIG, batching=batching, max_grad_norm=norm, lora=True))
    expected = reference_loop(theirs, rows(), RATES, batch_size=2, seed=3, weight_decay=0.1, max_grad_norm=norm)
    assert_same_steps(found, expected, norm)
    assert_same_weights(ours, theirs, before)
    frozen = [name for name, parameter in ours.named_parameters() if not parameter.requires_grad]
    assert all(torch.equal(ours.get_parameter(name), before[name]) for name in frozen)
