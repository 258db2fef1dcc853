"""AdamW with short states: the codes by hand, the mean of what is rounded, and AdamW's own steps."""

import copy
from typing import Any

import pytest
import torch

from handspun.config import TrainConfig
from handspun.training import optim as short_states
from handspun.training.optim import BLOCK, LowBitAdamW, decode, encode, make_optimizer
from tiny import tiny_model


def block(*values: float) -> torch.Tensor:
    return torch.tensor([[*values, *[0.0] * (BLOCK - len(values))]])


def no_noise() -> torch.Tensor:
    return torch.zeros(1, BLOCK, dtype=torch.int32)


def read_back(values: torch.Tensor, noise: torch.Tensor, *, signed: bool) -> torch.Tensor:
    return decode(*encode(values.clone(), noise, signed=signed), signed=signed)


def test_codes_by_hand() -> None:
    """1.0 has the upper bits 127 * 16 + 0 with 4 bits of mantissa, so 1.5 is 8 above it, and 2.0 is 16."""
    codes, lowest = encode(block(1.0, 1.5, 2.0, 1.9375), no_noise(), signed=False)
    assert lowest.item() == 128 * 16 - 255
    assert codes[0, :4].tolist() == [239, 247, 255, 254]
    assert decode(codes, lowest, signed=False)[0, :4].tolist() == [1.0, 1.5, 2.0, 1.9375]


def test_signed_codes_by_hand() -> None:
    """3 bits of mantissa: 1.875 is the last value below 2. Zeros stay zeros, beside any other value."""
    codes, lowest = encode(block(-2.0, 1.875, 0.0, -1.0), no_noise(), signed=True)
    assert lowest.item() == 128 * 8 - 127
    assert codes[0, :4].tolist() == [255, 126, 0, 128 + 119]
    assert decode(codes, lowest, signed=True)[0, :4].tolist() == [-2.0, 1.875, 0.0, -1.0]


@pytest.mark.parametrize("signed", [True, False])
def test_each_block_has_an_exponent_of_its_own(signed: bool) -> None:
    """Under the first one's, the second one's values would all be code 0."""
    values = torch.cat([block(2.0, 1.5), block(2.0**-40, 1.5 * 2.0**-41)])
    read = read_back(values, torch.zeros(2, BLOCK, dtype=torch.int32), signed=signed)
    assert read[:, :2].tolist() == values[:, :2].tolist()


def test_a_block_of_zeros_is_zeros() -> None:
    for signed in (True, False):
        assert not read_back(block(), no_noise(), signed=signed).any()


def test_a_denominator_is_not_rounded_to_zero() -> None:
    """Below 2**-16 of the block's largest a value is that: what is divided by its root is too small, not huge."""
    read = read_back(block(2.0, 1e-9), no_noise(), signed=False)[0, 1].item()
    assert read == pytest.approx(2.0 * 2**-16, rel=0.1)


@pytest.mark.parametrize("signed", [True, False])
def test_the_mean_is_kept(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1, BLOCK, generator=generator) + 0.01
    if signed:
        values[0, ::2] *= -1
    bits = 20 if signed else 19
    reads = [
        read_back(
            values, torch.randint(2**bits, (1, BLOCK), dtype=torch.int32, generator=generator), signed=signed
        )
        for _ in range(2000)
    ]
    step = 1 / 8 if signed else 1 / 16
    assert ((reads[0] - values).abs() <= step * values.abs()).all()
    torch.testing.assert_close(torch.stack(reads).mean(0), values, rtol=6 * step / 2 / 2000**0.5, atol=0)


def steps(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], count: int) -> None:
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(("states", "tolerance"), [("bfloat16", 0.01), ("8bit", 0.1)])
def test_steps_are_adamws_but_for_the_rounding(
    states: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes that fill no block, one block, and several pieces of blocks."""
    monkeypatch.setattr(short_states, "_ROWS", 2)
    torch.manual_seed(0)
    before = [torch.nn.Parameter(torch.randn(shape)) for shape in [(3,), (BLOCK,), (37, 41)]]
    short, plain = copy.deepcopy(before), copy.deepcopy(before)
    group = {"weight_decay": 0.1}
    steps(LowBitAdamW([{"params": short, **group}], lr=0.01, states=states, seed=0), short, 30)  # type: ignore[arg-type]
    steps(torch.optim.AdamW([{"params": plain, **group}], lr=0.01), plain, 30)
    for found, wanted, start in zip(short, plain, before, strict=True):
        assert (found - wanted).norm() < tolerance * (wanted - start).norm()
        assert not torch.equal(found, wanted)


def test_the_first_step_is_adamws_to_the_last_digits() -> None:
    """States are rounded when they are put away, so the first update is exact."""
    torch.manual_seed(0)
    short, plain = [torch.nn.Parameter(torch.ones(300))], [torch.nn.Parameter(torch.ones(300))]
    steps(LowBitAdamW([{"params": short}], lr=0.01, states="8bit", seed=0), short, 1)
    steps(torch.optim.AdamW(plain, lr=0.01, weight_decay=0.0), plain, 1)
    torch.testing.assert_close(short[0], plain[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_the_seed_decides_what_is_rounded_up_and_each_step_is_rounded_anew(states: str) -> None:
    found = []
    for seed in (0, 0, 1):
        parameter = torch.nn.Parameter(torch.zeros(4 * BLOCK))
        optimizer = LowBitAdamW([{"params": [parameter]}], lr=0.01, states=states, seed=seed)  # type: ignore[arg-type]
        steps(optimizer, [parameter], 5)
        found.append(parameter.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], found[2], rtol=0.1, atol=0.01)


@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_make_optimizer_hands_the_runs_seed_on(states: str) -> None:
    found = []
    for seed in (0, 5):
        model: Any = torch.nn.Linear(BLOCK, 4, bias=False)
        torch.nn.init.ones_(model.weight)
        config = TrainConfig(optimizer_states=states, learning_rate=0.01, seed=seed)  # type: ignore[arg-type]
        optimizer = make_optimizer(model, config)
        steps(optimizer, [model.weight], 5)
        found.append(model.weight.detach().clone())
    assert not torch.equal(*found)


@pytest.mark.slow
def test_a_small_second_moment_does_not_stand_still() -> None:
    """Gradients that fall to a tenth: rounded to the nearest, exp_avg_sq would stay where it was."""
    parameter = torch.nn.Parameter(torch.zeros(BLOCK))
    optimizer = LowBitAdamW([{"params": [parameter]}], lr=0.0, states="8bit", seed=0)
    for size in [1.0] * 100 + [0.1] * 1000:
        parameter.grad = torch.full((BLOCK,), size)
        optimizer.step()
    state = optimizer.state[parameter]
    found = decode(state["exp_avg_sq"], state["exp_avg_sq_lowest"], signed=False).mean().item()
    after_100 = 1 - 0.999**100
    assert found == pytest.approx(after_100 * 0.999**1000 + 0.01 * (1 - 0.999**1000), rel=0.1)


@pytest.mark.parametrize(("states", "bytes_a_value"), [("float32", 8), ("bfloat16", 4), ("8bit", 2)])
def test_what_states_take(states: str, bytes_a_value: float) -> None:
    model = tiny_model("qwen2", hidden_size=256, intermediate_size=512)
    optimizer = make_optimizer(model, TrainConfig(optimizer_states=states))  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in model.parameters())
    held = sum(
        tensor.nbytes for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)
    )
    assert held == pytest.approx(bytes_a_value * parameters, rel=0.02)
