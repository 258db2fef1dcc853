"""The prediction of memory counts what is held: against what autograd keeps, and by hand."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.models.lora import add_lora
from handspun.training import memory
from handspun.training.batching import Batching
from handspun.training.memory import predicted_peak
from handspun.training.packed import Packed, packed_attention
from tiny import tiny_model

SHARED = Batching("packed", share_prefix=True)


def a_model(*, lora: bool = False, **config: Any) -> PreTrainedModel:
    model = tiny_model("llama", hidden_size=64, intermediate_size=192, num_hidden_layers=6, **config).train()
    return add_lora(model, "tiny", rank=4, alpha=8, dropout=0.0) if lora else model


def rows(count: int) -> list[Example]:
    learned = [False] * 30 + [True] * 30
    return [Example([*range(4), *range(row + 5, row + 61)], learned, "a", row) for row in range(count)]


def kept_by_autograd(model: PreTrainedModel, part: list[Example], dtype: torch.dtype) -> int:
    """Bytes that the graph of a packed micro-batch holds beside the weights, logits left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with packed_attention(model), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        Packed(model, dtype, SHARED).backward(part, 1)
    return sum(kept.values())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_micro_batch_keeps(lora: bool, dtype: Literal["float32", "bfloat16"], dropout: float) -> None:
    """With our layers, and with transformers': those whose attention may have dropout, which is off here."""
    model, part = a_model(lora=lora, attention_dropout=dropout), rows(8)
    module: Any
    for module in model.modules():
        module.attention_dropout = 0.0
    config = TrainConfig(lora=lora, lora_rank=4, dtype=dtype)
    predicted = memory._activation_bytes(SHARED.computed_tokens(part), model, config)
    assert predicted == pytest.approx(kept_by_autograd(model, part, getattr(torch, dtype)), rel=0.1)


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and states, and at the end of a backward pass all gradients; in a batch of two parts they are there
    when the second part has been through the forward pass."""
    model, part = a_model(), rows(1)
    monkeypatch.setattr(memory, "_activation_bytes", lambda *_: 8_000_000)  # 10 with the holes
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    tables = 4 * 2 * 330 * 64
    logits = 4 * 30 * 330

    def beside_fixed(config: TrainConfig, batch: list[Example]) -> int:
        return predicted_peak(model, [batch], config) - memory._BASELINE_BYTES

    config = TrainConfig(max_tokens=60)  # a row for each part
    assert beside_fixed(config, part) == 3 * weights + tables + logits + 10_000_000
    assert beside_fixed(config, part + part) == 4 * weights + logits + 10_000_000
    halved = replace(config, optimizer_states="bfloat16")
    assert beside_fixed(halved, part) == 2 * weights + tables + logits + 10_000_000
    monkeypatch.setattr(memory, "_activation_bytes", lambda *_: 0)
    assert beside_fixed(config, part) == 4 * weights
