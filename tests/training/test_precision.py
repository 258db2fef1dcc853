"""Which type each number has while the body's matmuls are in bfloat16: the loss and the head's are float32."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from handspun.data.examples import Example
from handspun.training.batching import Batching, collate
from handspun.training.objectives import PaddedRunner, cross_entropy_sum, padded_loss
from handspun.training.packed import Packed, masks_of, packed_attention
from tiny import tiny_model


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        Example(
            torch.randint(0, 300, (n,), generator=generator).tolist(),
            [i >= n // 2 for i in range(n)],
            "rows.csv",
            n,
        )
        for n in (9, 20, 14)
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_the_heads_product_and_its_gradient_are_in_float32(tied: bool) -> None:
    """Computed again from the hidden states that the body gave, in float32."""
    model: Any = tiny_model("qwen2", tie_word_embeddings=tied)
    states: list[torch.Tensor] = []
    model.model.register_forward_hook(lambda *seen: states.append(seen[-1].last_hidden_state))
    with packed_attention(model):
        found = Packed(model, torch.bfloat16, Batching("packed")).backward(rows(), 10)
    laid = Batching("packed").pack(rows(), torch.device("cpu"))
    hidden = states[0][0, laid.target_positions].detach().float()
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    expected = F.cross_entropy(F.linear(hidden, weight), laid.targets, reduction="sum")
    assert found == pytest.approx(expected.item(), rel=1e-6)
    if not tied:  # else the embedding's gradient is in it, too
        (wanted,) = torch.autograd.grad(expected / 10, weight)
        torch.testing.assert_close(model.lm_head.weight.grad, wanted, rtol=1e-5, atol=1e-6)
    with packed_attention(model), torch.no_grad():
        in_float32 = Packed(model, torch.float32, Batching("packed")).loss(rows())
    assert abs(found - in_float32) > 1e-5 * in_float32  # the body's were in bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_padded_loss_is_in_float32_of_the_logits_that_came(dtype: torch.dtype) -> None:
    model: Any = tiny_model("qwen2")
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda *seen: logits.append(seen[-1].detach()))
    found, count = padded_loss(model, rows(), pad_token_id=0, dtype=dtype)
    assert logits[0].dtype == dtype
    assert found.dtype == torch.float32
    targets = collate(rows(), pad_token_id=0)["labels"][:, 1:]
    targets = targets[:, (targets != -100).any(dim=0)]
    expected = F.cross_entropy(logits[0].double().flatten(0, 1), targets.flatten(), reduction="sum")
    assert count == int((targets != -100).sum())
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """Attention of a pack of one row, as the model calls it: (1, tokens, heads, size)."""
    pack = Batching("packed").pack([Example([1] * query.shape[2], [False, True, True], "a", 1)], query.device)
    attention: Any = AttentionInterface()["handspun_packed"]
    attended: torch.Tensor = attention(
        None, query, key, value, None, masks=masks_of(pack, query.dtype), scaling=scaling
    )[0]
    return attended


def by_softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float) -> torch.Tensor:
    scores = (query.double() @ key.double().mT * scaling).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ value.double()).transpose(1, 2)


def test_attention_under_autocast_is_computed_in_float32_and_rounded_once() -> None:
    with packed_attention(tiny_model("llama")):
        torch.manual_seed(0)
        projections = [torch.randn(1, 2, 3, 8).bfloat16() for _ in range(3)]
        with torch.autocast("cpu", torch.bfloat16):
            found = attend(*projections, scaling=0.5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, by_softmax(*projections, scaling=0.5).bfloat16())


def test_attention_of_a_float64_model_is_in_float64() -> None:
    with packed_attention(tiny_model("llama")):
        torch.manual_seed(0)
        projections = [torch.randn(1, 2, 3, 8, dtype=torch.float64) for _ in range(3)]
        found = attend(*projections, scaling=0.5)
    torch.testing.assert_close(found, by_softmax(*projections, scaling=0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_cross_entropy_sum_is_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    """Logits that bfloat16 holds exactly, and a sum that it does not: 300 times log 3."""
    logits = torch.zeros(1, 300, 3, dtype=dtype)
    loss, count = cross_entropy_sum(logits, torch.ones(1, 300, dtype=torch.long))
    assert loss.dtype == expected
    assert count == 300
    assert loss.item() == pytest.approx(300 * 1.0986122886681098, rel=1e-6)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_gradients_of_bfloat16_products_are_near_in_direction_and_size(batching: str) -> None:
    """bfloat16 has 8 bits: each of some dozen roundings is off by 2 ** -9 at most, half of that in the mean."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", initializer_range=0.05)
        if batching == "packed":
            with packed_attention(model):
                Packed(model, dtype, Batching("packed", share_prefix=True)).backward(rows(), 10)
        else:
            PaddedRunner(model, dtype, 0).backward(rows(), 10)
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    exact, rounded = found
    assert len(exact) == len(rounded) > 10
    for name, gradient in exact.items():
        assert gradient is not None
        assert rounded[name] is not None
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - gradient).norm() < 0.02 * gradient.norm(), name
