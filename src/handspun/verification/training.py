"""Verify training: packed against padded losses and gradients, and prompts against training examples."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.display import captured_log
from handspun.errors import TemplateError
from handspun.training.objectives import PaddedRunner
from handspun.training.runner import BatchRunner, select_runner
from handspun.verification.reference import Finding, Reference, within

_LOSS_LIMIT, _GRADIENT_LIMIT = 1e-5, 1e-4
"""Relative differences. Rounding to float32 alone changes a gradient by 1e-6 to 2e-5 of its norm."""


def check_packed(material: Reference) -> Iterator[Finding]:
    """Compare loss and gradients, packed in float32 against padded in float64. Targets: transformers' answers."""
    # A float32 reference would be the less exact of the two: torch's cross-entropy over 49,152 logits is off by
    # 8e-6 in the loss and 5e-5 in the gradient.
    model = material.chat.model
    pairs = zip(material.prompts, (answer.token_ids for answer in material.answers), strict=True)
    examples = [
        Example(prompt + answer, [False] * len(prompt) + [True] * len(answer), "prompts", number)
        for number, (prompt, answer) in enumerate(pairs, start=1)
    ]
    with _all_trainable(model):
        with (
            captured_log() as lines,
            select_runner(model, TrainConfig(), examples, dtype=torch.float32, pad_token_id=0) as runner,
        ):
            if runner.batching.kind != "packed":
                yield Finding(check="packed", case="loss and gradients", status="info", found="; ".join(lines))
                return
            loss, gradients = _backward(model, runner, examples)
        with _in_float64(model):
            padded = PaddedRunner(
                model, torch.float32, pad_token_id=0
            )  # no autocast; padding is masked, so any id works
            expected, wanted = _backward(model, padded, examples)
    case, what = f"{len(examples)} rows", "relative"
    yield within("packed", f"loss of {case}", abs(loss - expected) / abs(expected), _LOSS_LIMIT, what=what)
    yield within(
        "packed", f"gradient of {case}", _relative_difference(gradients, wanted), _GRADIENT_LIMIT, what=what
    )


def _backward(
    model: PreTrainedModel, runner: BatchRunner, examples: list[Example]
) -> tuple[float, dict[str, Tensor]]:
    learned = sum(example.learned_tokens for example in examples)
    loss = runner.backward(examples, learned) / learned
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss, gradients


def _relative_difference(gradients: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the relative difference of the gradients of all weights as one vector."""
    if gradients.keys() != wanted.keys():
        return math.inf
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    return float(torch.stack([(gradients[name] - wanted[name]).norm() for name in wanted]).norm() / norm)


@contextmanager
def _all_trainable(model: PreTrainedModel) -> Iterator[None]:
    """Require gradients of every weight inside the block."""
    # Merged adapters leave frozen weights.
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, asked in before:
            parameter.requires_grad_(asked)


@contextmanager
def _in_float64(model: PreTrainedModel) -> Iterator[None]:
    """Convert the model to float64 inside the block, and back to bit-identical float32 weights afterwards."""
    model.double()
    try:
        yield
    finally:
        model.float()


def check_prefix(material: Reference) -> Finding:
    """Check that a prompt's ids are a prefix of its training example, followed by the first target token."""
    check, case = "prompts", "prefix of the training example"
    if not material.is_chat:
        return Finding(check=check, case=case, status="info", found="plain text has no template")
    template, wrong = material.chat.template, list[int]()
    tokenizer = material.chat.tokenizer
    for number, (text, prompt) in enumerate(zip(material.texts, material.prompts, strict=True), start=1):
        answer = tokenizer.decode(material.answers[number - 1].token_ids, skip_special_tokens=True)
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]
        try:
            [*_, trained] = template.encode(messages)
        except TemplateError as error:
            return Finding(check=check, case=case, status="info", found=f"cannot be trained on: {error}")
        length = len(prompt)
        is_prefix = trained.input_ids[:length] == prompt
        if not (is_prefix and trained.loss_mask[: length + 1] == [False] * length + [True]):
            wrong.append(number)
    if wrong:
        found = f"not for prompts {', '.join(map(str, wrong))}"
        return Finding(check=check, case=case, status="fail", found=found)
    tokens = sum(len(prompt) for prompt in material.prompts)
    return Finding(check=check, case=case, status="pass", found=f"{tokens} ids of {len(material.prompts)} prompts")
