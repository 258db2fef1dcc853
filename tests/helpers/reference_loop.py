"""Fine-tuning in plain torch and transformers: what the loop is compared with. Nothing of handspun is in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ReferenceStep:
    """What one step of the reference reports."""

    loss: float
    learning_rate: float
    grad_norm: float


def reference_loop(
    model: nn.Module,
    rows: Sequence[tuple[list[int], list[bool]]],
    rates: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    weight_decay: float,
    max_grad_norm: float,
) -> list[ReferenceStep]:
    """Train the model in place, one row at a time, and return one record per learning rate in the table.

    rows: token ids and, for each token, whether it is trained on.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    batches: list[list[int]] = []
    while len(batches) < len(rates):
        epoch = 1 + len(batches) * batch_size // len(rows)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        batches += [batch.tolist() for batch in order.split(batch_size)]
    steps = []
    for batch, rate in zip(batches, rates, strict=True):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for row in batch:
            ids, learned = torch.tensor(rows[row][0]), torch.tensor(rows[row][1])
            logits = model(input_ids=ids[None]).logits[0]
            loss = loss + F.cross_entropy(logits[:-1][learned[1:]], ids[1:][learned[1:]], reduction="sum")
        loss = loss / sum(sum(rows[row][1]) for row in batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        steps.append(ReferenceStep(loss.item(), rate, norm.item()))
    return steps
