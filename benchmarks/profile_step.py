"""Where a training step's time goes at rows of several lengths, per token.

    python benchmarks/profile_step.py [--model FOLDER] [--dtype bfloat16] [--lora] [--lengths 128 1024]

torch.profiler sees each operation, forward and backward; a backward operation belongs to the part of the model
whose forward operation it is the gradient of. "matmuls" are those of all parts but the head and attention. The
profiler's own time makes small operations look larger than they are: compare with benchmarks/long_rows.py.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from handspun.training import loop as loop_module
from handspun.training import packed, packed_layers
from long_rows import KERNELS, SDPA, Job, parser, training, way
from measurements import table

PARTS = ("matmuls", "attention", "norms", "rotation", "MLP's gate", "loss head", "embedding", "optimizer", "other")
MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise", "aten::mkldnn_linear"}
PREFIX = "part: "


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    with training(arguments) as job, parts_recorded(job):
        for name in (SDPA, KERNELS):
            lines = []
            for length in arguments.lengths:
                with way(name):
                    seconds, tokens = profiled(job, length, arguments)
                figures = [f"{1e3 * seconds[part] / tokens:.3f}" for part in PARTS]
                lines.append([str(length), *figures, f"{1e3 * sum(seconds.values()) / tokens:.3f}"])
            print(f"\nms a token, with: {name}\n")
            print(table(["tokens a row", *PARTS, "all"], lines), flush=True)


def profiled(job: Job, length: int, arguments: Any) -> tuple[Counter[str], int]:
    """Return the seconds of each part in some steps of this length, and their tokens."""
    job.step(length, arguments.tokens, seed=0)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        tokens = sum(job.step(length, arguments.tokens, seed=turn) for turn in range(arguments.repeats))
    return seconds_of_parts(seen.events()), tokens


def seconds_of_parts(events: Any) -> Counter[str]:
    """Add up the time that each operation itself took."""
    forward = {
        event.sequence_nr: part
        for event in events
        if event.sequence_nr >= 0 and (part := label(event)) is not None
    }
    seconds: Counter[str] = Counter()
    for event in events:
        part = label(event) or forward.get(sequence_of(event), "other")
        if event.name in MATMULS and part not in ("loss head", "attention"):
            part = "matmuls"
        seconds[part] += event.self_cpu_time_total / 1e6
    return seconds


def label(event: FunctionEvent) -> str | None:
    """Return the innermost part that an operation of a forward pass is recorded in."""
    for one in upward(event):
        if one.name.startswith(PREFIX):
            return str(one.name.removeprefix(PREFIX))
    return None


def sequence_of(event: FunctionEvent) -> int:
    """Return the number of the forward operation that an operation of a backward pass belongs to, or -1."""
    return next((one.sequence_nr for one in upward(event) if one.sequence_nr >= 0), -1)


def upward(event: Any) -> Iterator[Any]:
    """Yield the event and those around it."""
    while event is not None:
        yield event
        event = event.cpu_parent


@contextmanager
def parts_recorded(job: Job) -> Iterator[None]:
    """Have the parts of the model recorded under their names within the block."""
    model: Any = job.state.model
    kinds = {"Norm": "norms", "MLP": "MLP's gate", "Embedding": "embedding", "RotaryEmbedding": "rotation"}
    with ExitStack() as stack:
        for module in model.modules():
            kind = type(module).__name__
            for ending, part in kinds.items():
                if kind.endswith(ending):
                    stack.enter_context(mock.patch.object(module, "forward", recorded(module.forward, part)))
        code = sys.modules[type(packed_base(model)).__module__]
        for place, name, part in [
            (code, "apply_rotary_pos_emb", "rotation"),
            (packed_layers, "add_norm", "norms"),
            (packed_layers, "rotate_heads", "rotation"),
            (packed_layers, "swiglu", "MLP's gate"),
            (packed_layers, "packed_attention", "attention"),
            (packed, "_attend", "attention"),
            (packed, "_embedded", "embedding"),
            (packed, "linear_cross_entropy_backward", "loss head"),
            (loop_module, "clip_gradients", "optimizer"),
        ]:
            stack.enter_context(mock.patch.object(place, name, recorded(getattr(place, name), part)))
        optimizer = job.state.optimizer
        stack.enter_context(mock.patch.object(optimizer, "step", recorded(optimizer.step, "optimizer")))
        stack.enter_context(packed.packed_attention(model))  # registers the recorded one
        yield


def packed_base(model: Any) -> Any:
    """Return the model inside a peft wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def recorded(function: Any, part: str) -> Any:
    """Return the function, recorded under a part's name."""

    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*arguments, **options)

    return call


if __name__ == "__main__":
    main()
