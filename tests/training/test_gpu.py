"""What is computed on a GPU is what a CPU computes. Skipped where there is none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from handspun import TrainConfig, generate, train
from handspun.data.examples import Example
from handspun.models.int8 import quantize_base
from handspun.models.load import ChatModel
from handspun.models.lora import add_lora
from handspun.training.batching import Batching
from handspun.training.distributed import shard
from handspun.training.objectives import PaddedRunner
from handspun.training.packed import Packed, packed_attention
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Wide enough for int8 matmuls, which come in multiples of 16.
SHARED = Batching("packed", share_prefix=True)
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1, "vocab_size": 336}
ROWS = [
    {"instruction": f"Say {word}.", "input": "", "output": f"It is {word}, and nothing else."}
    for word in ("red", "green", "blue", "seven", "a city", "one joke", "the first numbers", "an answer")
]


def model_on(device: str, *, lora: bool = False, int8: bool = False) -> PreTrainedModel:
    model = tiny_model("qwen2", **SHAPE).train()
    if int8:
        quantize_base(model)
    if lora:
        torch.manual_seed(0)
        model = add_lora(model, "tiny", rank=4, alpha=8, dropout=0.0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros at first, which would leave A without a gradient
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(device)


def examples(count: int) -> list[Example]:
    """Rows of 12 to 40 tokens that begin alike, their second half trained on."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for row in range(count):
        length = int(torch.randint(8, 36, (1,), generator=generator))
        ids = [10, 11, 12, 13, *torch.randint(0, 300, (length,), generator=generator).tolist()]
        made.append(Example(ids, [i >= 4 + length // 2 for i in range(len(ids))], "rows.csv", row + 1))
    return made


def step(model: PreTrainedModel, dtype: torch.dtype, batching: str) -> tuple[float, dict[str, Tensor]]:
    """The loss summed over a batch, and its gradients."""
    if batching == "padded":
        loss = PaddedRunner(model, dtype, 0).backward(examples(6), 7)
    else:
        with packed_attention(model):
            loss = Packed(model, dtype, SHARED).backward(examples(6), 7)
    return loss, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], *, tolerance: float) -> None:
    """In the largest gradient of each weight."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance * gradient.abs().max().item())


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["full", "lora", "int8"])
def test_losses_and_gradients_are_a_cpus(kind: str, batching: str) -> None:
    options = {"lora": kind != "full", "int8": kind == "int8"}
    wanted, gradients = step(model_on("cpu", **options), torch.float32, batching)
    loss, found = step(model_on("cuda", **options), torch.float32, batching)
    # An int8 base rounds each value that goes in: one that lies between two steps may fall to either side.
    assert loss == pytest.approx(wanted, rel=1e-3 if kind == "int8" else 1e-5)
    assert_close(found, gradients, tolerance=0.05 if kind == "int8" else 1e-4)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_products_in_bfloat16_stay_near(batching: str) -> None:
    wanted, gradients = step(model_on("cpu"), torch.float32, batching)
    loss, found = step(model_on("cuda"), torch.bfloat16, batching)
    assert loss == pytest.approx(wanted, rel=0.01)
    assert_close(found, gradients, tolerance=0.05)


def test_attention_is_not_cudnns() -> None:
    """PyTorch would take it for bfloat16 behind a mask; it is planned anew for every number of tokens."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        for batching in ("packed", "padded"):
            step(model_on("cuda"), torch.bfloat16, batching)
    names = [event.key for event in profile.key_averages()]
    assert any("scaled_dot_product" in name for name in names)
    assert not [name for name in names if "cudnn_attention" in name]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 3}, {"prompt_lookup_num_tokens": 4}]
)
def test_answers_are_a_cpus(options: dict[str, Any]) -> None:
    def answers(device: str) -> list[list[int]]:
        model = tiny_model("llama", **{**SHAPE, "initializer_range": 0.5}).to(device)  # type: ignore[arg-type]
        chat = ChatModel(model, tiny_tokenizer(), "tiny")
        made = generate(chat, ["Tell me a joke.", "What is it?", "Red"], max_new_tokens=24, **options)
        return [answer.token_ids for answer in made]

    assert answers("cuda") == answers("cpu")


def test_a_run_there_ends_with_a_cpus_losses(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(ROWS), encoding="utf-8")

    def losses(device: str) -> list[float]:
        output = tmp_path / device
        config = TrainConfig(
            model=str(tiny_folder), data=str(data), output_dir=str(output), device=device, dtype="float32",
            num_epochs=3, batch_size=3, learning_rate=1e-3, sample_prompts=(),
        )  # fmt: skip
        train(config)
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]

    assert losses("cuda") == pytest.approx(losses("cpu"), rel=1e-4)


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_a_model_cut_over_the_ranks_has_the_same_gradients() -> None:
    """By NCCL; with one GPU, in a group of one."""
    wanted, gradients = step(model_on("cpu"), torch.float32, "packed")
    model = model_on("cpu")
    root = shard(model, torch.device("cuda"))
    with packed_attention(model):
        loss = Packed(model, torch.float32, SHARED, root).backward(examples(6), 7)
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        found[name] = parameter.grad.full_tensor().cpu()
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert_close(found, gradients, tolerance=1e-4)
