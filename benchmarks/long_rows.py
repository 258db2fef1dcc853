"""What a step costs a token at rows of several lengths: the native kernels of training against PyTorch.

    python benchmarks/long_rows.py [--model FOLDER] [--dtype bfloat16] [--lora] [--lengths 128 1024] [--threads 1]

Steps of training, with AdamW, over rows of random tokens that begin alike: with our kernels for attention, norms,
rotations and gates, and with PyTorch's attention in transformers' layers. Both ways take turns in one process;
figures are medians, and ratios those of turns. With one thread, seconds are those of the CPU, so that others on
the machine disturb less.
--attention times the attention of one layer alone, forward and backward, and counts the operations it needs.
--layer times one decoder layer alone, with random weights.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.kernels.allocator import disable_malloc_trim
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.int8 import quantize_base
from handspun.models.load import load, load_config, model_source
from handspun.models.lora import add_lora
from handspun.training import packed, packed_layers
from handspun.training.batching import Batching
from handspun.training.loop import Loop, TrainingState, start, train_step
from handspun.training.packed import masks_of
from handspun.training.runner import select_runner
from measurements import table

PREFIX = 24
"""Tokens that all rows begin with: a chat template's system message."""
KERNELS, SDPA = "kernels", "PyTorch"


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    disable_malloc_trim()  # as runs do: otherwise PyTorch's way maps its memory anew each time
    if arguments.attention:
        print(attention_alone(arguments))
        return
    if arguments.layer:
        print(layer_alone(arguments))
        return
    lines, seconds = [], {}
    with training(arguments) as job:
        for length in arguments.lengths:
            step = partial(job.step, length, arguments.tokens)
            seconds[length], ratio = compare(step, arguments)
            figures = (f"{1e3 * seconds[length][name]:.3f}" for name in (SDPA, KERNELS))
            lines.append([str(length), *figures, f"{ratio:.2f}"])
            print(" | ".join(lines[-1]), flush=True)
    print(table(["tokens a row", "PyTorch, ms a token", "kernels, ms a token", "ratio"], lines))
    if 1024 in seconds and 128 in seconds:
        for name in (SDPA, KERNELS):
            print(
                f"{name}: a token at 1,024 costs {seconds[1024][name] / seconds[128][name]:.2f} times one at 128"
            )


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of the command line, which profile_step.py has too."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--lora", action="store_true")
    made.add_argument("--base-weights", choices=["float32", "int8"], default="float32")
    made.add_argument("--lengths", type=int, nargs="+", default=[100, 128, 256, 512, 1024, 2048])
    made.add_argument("--tokens", type=int, default=2048, help="tokens a step, at least a row")
    made.add_argument("--repeats", type=int, default=5, help="steps of each way")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--attention", action="store_true", help="attention alone")
    made.add_argument("--layer", action="store_true", help="a decoder layer alone")
    return made


def attention_alone(arguments: argparse.Namespace) -> str:
    """Return a table of milliseconds a layer, and of needed operations a second, of both ways."""
    config = load_config(model_source(arguments.model)).get_text_config()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    lines = []
    for length in arguments.lengths:
        batch = rows(length, max(1, arguments.tokens // length), config.vocab_size, seed=0)
        pack = Batching("packed", share_prefix=True).pack(batch, torch.device("cpu"))
        tokens, own = pack.input_ids.shape[1], [stop - start for start, stop in pack.sequence_bounds]
        seen = sum(n * (n + 1) / 2 for n in [pack.shared_prefix_length, *own])
        seen += pack.shared_prefix_length * sum(own)
        inputs = [torch.randn(1, tokens, n, size).transpose(1, 2) for n in (heads, kv_heads, kv_heads)]
        seconds, ratio = compare_attention(
            [x.requires_grad_() for x in inputs], masks_of(pack, torch.float32), arguments
        )
        operations = 14 * seen * heads * size  # two matmuls forward, five backward
        line = [str(length)]
        for name in (SDPA, KERNELS):
            line += [f"{1e3 * seconds[name]:.1f}", f"{operations / seconds[name] / 1e9:.0f}"]
        lines.append([*line, f"{ratio:.2f}"])
    header = ["tokens a row", "PyTorch's, ms", "GFLOP/s", "kernel, ms", "GFLOP/s", "ratio"]
    return table(header, lines)


def layer_alone(arguments: argparse.Namespace) -> str:
    """Return a table of milliseconds a token of both ways, for all layers of the model."""
    config = load_config(model_source(arguments.model)).get_text_config()
    layers, config.num_hidden_layers, config.vocab_size = config.num_hidden_layers, 1, 1000
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    dtype, lines = getattr(torch, arguments.dtype), []
    for length in arguments.lengths:
        batch = rows(length, max(1, arguments.tokens // length), config.vocab_size, seed=0)
        pack = Batching("packed", share_prefix=True).pack(batch, torch.device("cpu"))
        hidden, gradient = torch.randn(2, 1, pack.input_ids.shape[1], config.hidden_size)
        options = {
            "position_embeddings": model.model.rotary_emb(hidden, pack.position_ids),
            "masks": masks_of(pack, dtype),
        }
        seconds, ratio = compare(partial(layer_step, model, hidden, gradient, dtype, options), arguments)
        figures = (f"{1e3 * layers * seconds[name]:.3f}" for name in (SDPA, KERNELS))
        lines.append([str(length), *figures, f"{ratio:.2f}"])
    return table(["tokens a row", "PyTorch, ms a token", "kernels, ms a token", "ratio"], lines)


def layer_step(
    model: Any, hidden: Tensor, gradient: Tensor, dtype: torch.dtype, options: dict[str, Any], _: int
) -> int:
    """Run the model's first layer, forward and backward. Return the number of tokens."""
    hidden = hidden.clone().requires_grad_()
    with packed.packed_attention(model):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model.model.layers[0](hidden, **options)
        output.backward(gradient)
    model.zero_grad()
    return hidden.shape[1]


def compare_attention(
    inputs: list[Tensor], masks: packed.Masks, arguments: argparse.Namespace
) -> tuple[dict[str, float], float]:
    """Return the seconds of both ways, and their ratio."""

    def attend(_: int) -> int:
        output, _ = packed._attend(torch.nn.Module(), *inputs, None, masks=masks)
        torch.autograd.grad(output, inputs, torch.ones_like(output))
        return 1

    return compare(attend, arguments)


@dataclass(frozen=True)
class Job:
    """A model under training, and the number of its tokens."""

    loop: Loop
    state: TrainingState
    vocabulary: int

    def step(self, length: int, tokens: int, seed: int) -> int:
        """Take a step over rows of a length. Return the tokens that it computed."""
        batch = rows(length, max(1, tokens // length), self.vocabulary, seed)
        self.state.step = 0  # of two, so that it is never the last
        *_, step = train_step(self.loop, self.state, batch, epoch=1)
        return int(step.tokens)  # type: ignore[union-attr]


@contextmanager
def training(arguments: argparse.Namespace) -> Iterator[Job]:
    """Yield the job that the command line asks for."""
    options: Any = {"dtype": arguments.dtype, "base_weights": arguments.base_weights}
    config = TrainConfig(
        model=arguments.model, lora=arguments.lora, max_tokens=2048, learning_rate=1e-6, **options
    )
    model = load(arguments.model, device="cpu", weights="float32").model
    if arguments.base_weights == "int8":
        quantize_base(model)
    if arguments.lora:
        model = add_lora(model, arguments.model, rank=config.lora_rank, alpha=config.lora_alpha, dropout=0.0)
    vocabulary = model.config.get_text_config().vocab_size
    examples = rows(40, 2 * config.batch_size, vocabulary, seed=0)
    dtype = getattr(torch, arguments.dtype)
    model.train()
    with select_runner(model, config, examples, dtype=dtype, pad_token_id=0) as runner:
        yield Job(Loop(config=config, examples=examples, runner=runner), start(model, config), vocabulary)


def rows(length: int, count: int, vocabulary: int, seed: int) -> list[Example]:
    """Random rows that begin alike; the second half is learned."""
    generator = torch.Generator().manual_seed(seed)
    beginning = list(range(100, 100 + PREFIX))
    learned = [i >= max(length // 2, PREFIX + 2) for i in range(length)]
    return [
        Example(
            beginning + torch.randint(vocabulary, (length - PREFIX,), generator=generator).tolist(), learned, "", i
        )
        for i in range(count)
    ]


def compare(work: Callable[[int], int], arguments: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Return the seconds of both ways, which take turns, and their ratio: medians, without the first turn.

    work: takes the turn's number, and returns by what its seconds are divided.
    """
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {KERNELS: [], SDPA: []}
    for turn in range(arguments.repeats + 1):
        for name, of_each in seconds.items():
            with way(name):
                began = clock()
                count = work(turn)
                of_each.append((clock() - began) / count)
    ratio = statistics.median(a / b for a, b in zip(seconds[SDPA][1:], seconds[KERNELS][1:], strict=True))
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}, ratio


@contextmanager
def way(name: str) -> Iterator[None]:
    """Compute layers in this way within the block."""
    if name == KERNELS:
        yield
        return
    with (
        mock.patch.object(packed_layers, "_can_compute", return_value=False),
        mock.patch.object(packed, "_kernels_attend", return_value=False),
    ):
        yield


if __name__ == "__main__":
    main()
