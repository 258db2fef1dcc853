"""Layers whose work between the matmuls is in kernels: when they are used, and against others."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from backends import BACKENDS, chosen, needs_kernels
from handspun.data.examples import Example
from handspun.kernels import onednn
from handspun.models.int8 import float_activations, quantize_base
from handspun.models.lora import add_lora
from handspun.training import objectives
from handspun.training import packed_layers as module
from handspun.training.batching import Batching
from handspun.training.objectives import PaddedRunner
from handspun.training.packed import Packed, packed_attention
from handspun.training.packed_layers import packed_layers
from tiny import tiny_model

pytestmark = pytest.mark.cpu
SHARED = Batching("packed", share_prefix=True)


def a_model(**config: Any) -> PreTrainedModel:
    return tiny_model("qwen2", **{"initializer_range": 0.05, "head_dim": 16, **config})


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        Example(
            [1, 2, 3, *torch.randint(0, 300, (n,), generator=generator).tolist()],
            [i >= n // 2 + 3 for i in range(n + 3)],
            "rows.csv",
            n,
        )
        for n in (9, 40, 14)
    ]


def gradients(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model.zero_grad()
    with packed_attention(model):
        Packed(model, dtype, SHARED).backward(rows(), 10)
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def in_float64() -> dict[str, Tensor]:
    """Of padded rows."""
    model = a_model().double()
    PaddedRunner(model, torch.float32, 0).backward(rows(), 10)
    return {name: weight.grad for name, weight in model.named_parameters()}


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all gradients together."""
    assert found.keys() == exact.keys()
    differences, sizes = (
        torch.stack([x.double().norm() for x in some]).norm().item()
        for some in ([found[name] - exact[name] for name in exact], exact.values())
    )
    return differences / sizes


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_every_backend_are_near_those_of_float64(name: str, dtype: torch.dtype) -> None:
    exact = in_float64()
    with chosen(name):
        found = gradients(a_model(), dtype)
    assert relative_error(found, exact) < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


@needs_kernels
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_near_those_of_float64_with_either_library_of_matmuls(
    lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model: Any = add_lora(a_model(), "tiny", rank=4, alpha=8, dropout=0.0) if lora else a_model()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    found = []
    for with_onednn in (True, False):
        monkeypatch.setattr(onednn, "beats_mkl", lambda _, answer=with_onednn: answer)
        monkeypatch.setattr(objectives, "beats_mkl", onednn.beats_mkl)
        found.append(gradients(model))
    model.double().zero_grad()
    PaddedRunner(model, torch.float32, 0).backward(rows(), 10)
    exact = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert [relative_error(some, exact) < 1e-6 for some in found] == [True, True]


@needs_kernels
def test_bfloat16_gradients_are_no_farther_from_float64_than_those_of_transformers_layers() -> None:
    exact = in_float64()
    ours = gradients(a_model(), torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_can_compute", lambda *_: False)
        theirs = gradients(a_model(), torch.bfloat16)
    assert not torch.equal(*(some["model.layers.0.mlp.up_proj.weight"] for some in (ours, theirs)))
    # Most of it is from the matmuls, so that which one is nearer is chance.
    assert relative_error(ours, exact) < 1.05 * relative_error(theirs, exact)


@needs_kernels
@pytest.mark.parametrize("base", ["float32", "int8"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["k_proj", "up_proj"]])
def test_adapters_have_the_gradients_of_padded_rows(base: str, targets: list[str] | None) -> None:
    torch.manual_seed(0)
    model: Any = add_lora(a_model(), "tiny", rank=4, alpha=8, dropout=0.0, target_modules=targets)
    if base == "int8":
        quantize_base(model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    # Rounded activations of int8 would differ by an integer now and then.
    with float_activations(model) if base == "int8" else nullcontext():
        PaddedRunner(model, torch.float32, 0).backward(rows(), 10)
        wanted = {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
        }
        assert len(wanted) == 2 * 2 * len(targets or range(7))  # A and B of the matrices of two layers
        # Gradients that go through int8 layers are rounded even here.
        assert relative_error(gradients(model), wanted) < (0.01 if base == "int8" else 1e-5)


@needs_kernels
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_gives_the_same_bits(lora: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = a_model()
    if lora:
        model = add_lora(model, "tiny", rank=4, alpha=8, dropout=0.0)
    model.train()
    expected = gradients(model, dtype)
    calls = []
    model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_layer", lambda *arguments: calls.append(1) or _layer(*arguments))
        found = gradients(model, dtype)
    assert len(calls) == 2 * 2  # each of two layers, forward and again
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


_layer = module._layer


@needs_kernels
def test_layers_are_ours_within_the_block_and_as_they_were_afterwards() -> None:
    model: Any = a_model()
    layers = model.model.layers
    before = [type(layer) for layer in layers]
    with packed_layers(model):
        assert all(type(layer) is not kind for layer, kind in zip(layers, before, strict=True))
        assert [type(layer).__name__ for layer in layers] == [kind.__name__ for kind in before]
        PaddedRunner(model, torch.float32, 0).backward(rows(), 10)  # by transformers' layers
    assert [type(layer) for layer in layers] == before


def gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=330, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
    )


@pytest.mark.parametrize(
    "model",
    [
        a_model(head_dim=8),
        a_model(hidden_act="gelu"),
        a_model(attention_dropout=0.1),
        gpt_neox(),
    ],
    ids=["heads of 8", "GELU", "dropout", "another architecture"],
)
def test_layers_that_the_kernels_do_not_support_are_transformers(model: Any) -> None:
    layers = model.get_decoder().layers
    before = [type(layer) for layer in layers]
    assert not module.can_compute_layers(model.config, torch.device("cpu"))
    with packed_layers(model):
        assert [type(layer) for layer in layers] == before


def test_layers_on_a_gpu_are_transformers() -> None:
    assert not module.can_compute_layers(a_model().config, torch.device("cuda"))
