"""Follows one row through train_inference.py, and prints the blocks of docs/how_it_works.md.

python benchmarks/one_row.py
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_inference as script

ROW = {"instruction": "Complete the analogy.", "input": "Bird is to nest as bee is to", "output": "hive"}
LONGER = {
    "instruction": "Name a color.",
    "input": "",
    "output": "Blue, as the sky is on a clear day, and the sea.",
}
LEARNING_RATE = 5e-5


def main() -> None:
    for title, block in blocks():
        print(f"== {title}\n{block}\n", flush=True)


def blocks() -> Iterator[tuple[str, str]]:
    """(title, lines) of each step, in order. The model is trained by one step on the way."""
    model, tokenizer = script.load("smollm2-135m")
    example = script.encode_row(tokenizer, ROW)
    yield "text", tokenizer.decode(example["input_ids"])
    yield "ids", ids_and_labels(tokenizer, example)
    yield "batch", batch_of_two([example, script.encode_row(tokenizer, LONGER)])
    logits = model(input_ids=example["input_ids"][None]).logits.detach()  # (1, length, vocab)
    yield "logits", predictions(tokenizer, example, logits)
    yield "loss", losses(example, logits)
    yield "gradient of the logits", gradient_of_logits(tokenizer, example, logits)
    yield "gradient of the weights", gradient_of_weights(model, example)
    yield "update", update(model, example)


def targets_of(example: script.Example) -> Iterator[tuple[int, int]]:
    """(position, target) of each position whose logits predict a target token."""
    for position, label in enumerate(example["labels"][1:].tolist()):
        if label != script.IGNORED:
            yield position, label


def spelled(tokenizer: Any, token: int) -> str:
    """A token's text, in quotes, on one line."""
    return repr(tokenizer.decode([token]))


def ids_and_labels(tokenizer: Any, example: script.Example) -> str:
    """The last tokens of the row, one a line."""
    length = len(example["input_ids"])
    lines = [f"{length} tokens; the last 12:", "position  token            id    label"]
    for position in range(length - 12, length):
        token, label = int(example["input_ids"][position]), int(example["labels"][position])
        lines.append(f"{position:8}  {spelled(tokenizer, token):14} {token:6}   {label:6}")
    return "\n".join(lines)


def batch_of_two(examples: list[script.Example]) -> str:
    """The right end of each tensor of a batch with padding."""
    lines = []
    for name, tensor in script.collate_fn(examples).items():
        lines.append(f"{name}, {tuple(tensor.shape)}; the last 10 columns:")
        lines += ["  " + " ".join(f"{value:5}" for value in row[-10:].tolist()) for row in tensor]
    return "\n".join(lines)


def predictions(tokenizer: Any, example: script.Example, logits: Tensor) -> str:
    """What the model expects where a target token comes next."""
    lines = [f"logits: {tuple(logits.shape)}"]
    for position, target in targets_of(example):
        row = logits[0, position]
        probabilities, best = row.softmax(-1), int(row.argmax())
        lines.append(
            f"position {position}: target {spelled(tokenizer, target)}, logit {row[target]:.3f}, probability "
            f"{probabilities[target]:.5f}; most probable {spelled(tokenizer, best)}, {probabilities[best]:.5f}"
        )
    return "\n".join(lines)


def losses(example: script.Example, logits: Tensor) -> str:
    """The loss of each target token, and their mean."""
    each = [float(-logits[0, position].log_softmax(-1)[target]) for position, target in targets_of(example)]
    mean = script.batch_loss(_Logits(logits), [example])[0] / len(each)
    return f"({' + '.join(f'{loss:.3f}' for loss in each)}) / {len(each)} = {mean:.4f}"


class _Logits:
    """A model that returns logits which are there already."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.device = logits, logits.device

    def __call__(self, **_: Tensor) -> "_Logits":
        return self


def gradient_of_logits(tokenizer: Any, example: script.Example, logits: Tensor) -> str:
    """At the first target: (probability - 1 if it is the target) / number of targets, and what autograd says."""
    logits = logits.clone().requires_grad_()
    targets = list(targets_of(example))
    loss_sum, count = script.batch_loss(_Logits(logits), [example])
    (loss_sum / count).backward()
    assert logits.grad is not None
    (position, target), lines = targets[0], []
    probabilities = logits[0, position].detach().softmax(-1)
    for token in [target, *(t for t in probabilities.topk(3).indices.tolist() if t != target)]:
        formula = f"({probabilities[token]:.5f} - {int(token == target)}) / {count}"
        gradient = logits.grad[0, position, token]
        lines.append(f"{spelled(tokenizer, token):10} {formula} = {gradient:+.4f}")
    others = [i for i in range(logits.shape[1]) if i not in dict(targets)]
    lines.append(f"all {len(others)} positions without a target: {logits.grad[0, others].abs().sum():.4f}")
    return "\n".join(lines)


def gradient_of_weights(model: Any, example: script.Example) -> str:
    """The norms of some weights' gradients and of all together. The gradients stay."""
    loss_sum, count = script.batch_loss(model, [example])
    (loss_sum / count).backward()
    lines = []
    for name, weight in model.named_parameters():
        if name.endswith("embed_tokens.weight") or "layers.0.self_attn.q_proj" in name or "29.mlp.down" in name:
            lines.append(f"{name:40} {tuple(weight.shape)!s:14} {weight.grad.norm():.3f}")
    whole = torch.stack([weight.grad.double().norm() for weight in model.parameters()]).norm()  # exact enough
    lines.append(f"all {sum(weight.numel() for weight in model.parameters()):,} weights: {whole:.3f}")
    lines.append(f"clipped to {script.MAX_GRAD_NORM}: multiplied by {script.MAX_GRAD_NORM / whole:.4f}")
    model.zero_grad()
    return "\n".join(lines)


def update(model: Any, example: script.Example) -> str:
    """The loss before and after one step, and how far a weight moved."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    loss, _ = script.train_step(model, optimizer, [example])
    moved = (weight.detach() - before).abs().median()
    return "\n".join(
        [
            f"a weight moves by {moved:.1e} (median of layer 0's queries)",
            f"loss of this row: {loss:.4f} before, {script.evaluate(model, [example]):.4f} after one step",
        ]
    )


if __name__ == "__main__":
    main()
