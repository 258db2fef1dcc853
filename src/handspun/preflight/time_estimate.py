"""Estimate how long a run will take: from its operation count and measured rates, then from its first two steps.

Per token and weight, a matmul takes two operations forward, two for the gradient of its input, and two for the
weight's gradient if it is trained. The head is applied to target tokens only. Attention over a row of n tokens
takes 6 n^2 times the width of all heads per layer, forward and backward, because half of the square is masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example, lengths_of
from handspun.kernels.cpu import cpu_flags
from handspun.models.int8 import Int8Linear
from handspun.training.loop import Event, Step
from handspun.training.memory import Plan


@dataclass(frozen=True)
class Rates:
    """Operations per second per thread by (method, type of matmuls), from `python benchmarks/training_rates.py`.

    measured_on: the cores that they were measured on. On others they are a guess, and the log says so until the
    first two steps correct it.
    """

    measured_on: str
    each: dict[tuple[str, str], float]


_AVX512 = Rates(
    "cores of an AMD EPYC server (Zen 4)",
    {
        ("full", "float32"): 75e9,
        ("full", "bfloat16"): 115e9,
        ("lora", "float32"): 66e9,
        ("lora", "bfloat16"): 99e9,
        ("lora", "int8"): 111e9,
    },
)
_ZEN_5 = Rates(
    "cores of an AMD EPYC server (Zen 5)",
    {
        ("full", "float32"): 187e9,
        ("full", "bfloat16"): 271e9,
        ("lora", "float32"): 175e9,
        ("lora", "bfloat16"): 260e9,
        ("lora", "int8"): 308e9,
    },
)
_AMX = Rates(
    "cores of an Intel Xeon (Sapphire Rapids)",
    {
        ("full", "float32"): 94e9,
        ("full", "bfloat16"): 147e9,
        ("lora", "float32"): 77e9,
        ("lora", "bfloat16"): 111e9,
        ("lora", "int8"): 114e9,
    },
)


def rates_here() -> Rates:
    """Return the rates of the CPU that is most like this one."""
    flags = cpu_flags()
    if "amx_bf16" in flags:
        return _AMX
    # A Zen 4 and Intel's CPUs without AMX have no AVX-VNNI beside AVX-512.
    return _ZEN_5 if flags >= {"avx512f", "avx_vnni"} else _AVX512


def operations(model: PreTrainedModel, plan: Plan, examples: Sequence[Example], config: TrainConfig) -> float:
    """Return the number of operations per epoch. Uses only the shapes of the model.

    Args:
        model: the model, which may be on the meta device.
        plan: the run's plan.
        examples: the training examples.
        config: the run's options.
    """
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight
    tables = {id(embedding), id(head)}
    body = [weight for weight in model.parameters() if id(weight) not in tables]
    again = 2 if config.activation_checkpointing else 0
    each = sum(weight.numel() * (again + (6 if weight.requires_grad else 4)) for weight in body)
    int8 = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    each += sum(layer.in_features * layer.out_features * (again + 4) for layer in int8)
    of_head = head.numel() * (6 if head.requires_grad else 4)
    shape: Any = model.config.get_text_config()
    width = shape.num_hidden_layers * shape.hidden_size
    attention = 6 * width * float((lengths_of(examples).astype(float) ** 2).sum())
    return float(plan.computed_tokens * each + plan.learned_tokens * of_head + attention)


def predicted_seconds(
    operations_of_run: float, config: TrainConfig, *, dtype: torch.dtype, device: torch.device, threads: int
) -> float | None:
    """Return the seconds for all steps, without evaluation and saving; None for a device without measured rates.

    Args:
        operations_of_run: those of an epoch, from `operations`, times the epochs.
        config: the run's options.
        dtype: type of the matmuls.
        device: where the run computes.
        threads: threads of all processes together.
    """
    if device.type != "cpu":
        return None
    matmuls = "int8" if config.base_weights == "int8" else str(dtype).removeprefix("torch.")
    rate = rates_here().each["lora" if config.lora else "full", matmuls] * threads
    return operations_of_run / rate


SLOW = 4.0
"""Times the predicted time from which a run gets a warning. A core of an old laptop may take three times as long
as one of those that the rates were measured on; more than that has a reason of its own."""


class Forecast:
    """Predicts the time of the remaining steps from the faster of this process's first two steps.

    times_predicted: how many times as long as predicted they take; None as long as that is unknown.
    """

    def __init__(self, plan: Plan, epochs: float, predicted_seconds: float | None = None) -> None:
        self.times_predicted: float | None = None
        self._predicted_seconds = predicted_seconds
        self._tokens_of_a_step = plan.computed_tokens * epochs / plan.steps
        self._rates: list[float] = []

    def after(self, event: Event) -> float | None:
        """Return the remaining seconds once, after the second step; None otherwise."""
        if not isinstance(event, Step) or len(self._rates) == 2:
            return None
        self._rates.append(event.computed_tokens / event.seconds)
        left = event.total_steps - event.step
        if len(self._rates) < 2 or not left:
            return None
        # The first step is usually slower because it touches its memory for the first time.
        seconds = left * self._tokens_of_a_step / max(self._rates)
        if self._predicted_seconds:
            self.times_predicted = seconds / (self._predicted_seconds * left / event.total_steps)
        return seconds
