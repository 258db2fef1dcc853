"""What a run will take: its plan, the predicted peak of memory, and the memory that there is."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from handspun.config import TrainConfig, option_name
from handspun.data.examples import Example, learned_tokens_of, lengths_of
from handspun.errors import HandspunError, TrainingError
from handspun.models.int8 import Int8Linear
from handspun.models.load import resolve_device
from handspun.training.batching import batches, epoch_order, micro_batches, packed_micro_batches, packed_tokens
from handspun.training.distributed import Distributed
from handspun.training.objectives import padded_tokens
from handspun.training.optim import BLOCK
from handspun.training.packed import LOGITS_CHUNK_BYTES
from handspun.training.runner import packing_unsupported_reason, shares_prefix


@dataclass(frozen=True)
class AvailableMemory:
    """Bytes that this process can hold in all, with what it holds already, and what sets the bound."""

    available: int
    bound: str


def available_memory(device: torch.device) -> AvailableMemory | None:
    """The memory of the GPU that the device is, or of this machine."""
    if device.type != "cuda":
        return room_here() if device.type == "cpu" else None
    free, _ = torch.cuda.mem_get_info(device)
    return AvailableMemory(free + torch.cuda.memory_reserved(device), f"what is free on {device}")


def room_here(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> AvailableMemory | None:
    """What is free in this machine and under the limits of this process's control groups (versions 1 and 2), its
    own and those above it, whichever is least; None where the system does not say it.

    What the process holds itself is in it, and so is what the system keeps of files and gives up when asked; swap
    is not.
    """
    meminfo = _numbers(proc / "meminfo")
    if "MemAvailable" not in meminfo:
        return None
    own = _numbers(proc / "self" / "status").get("RssAnon", 0) * 1024
    free = [AvailableMemory(meminfo["MemAvailable"] * 1024 + own, "what is free in this machine")]
    for folder in _groups_of_this_process(proc, cgroups):
        if (left := _left_in(folder)) is not None:
            limit, unused = left
            free.append(
                AvailableMemory(unused + own, f"the limit of {limit / 1e9:.1f} GB of the control group {folder}")
            )
    return min(free, key=lambda room: room.available)


def _groups_of_this_process(proc: Path, cgroups: Path) -> Iterator[Path]:
    """The folders of the groups that count its memory. In a container, the system may name a place that is only
    there outside of it; its own group is then at the top."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = cgroups / "memory" if controllers else cgroups
        folder = top / place.strip("/")
        yield from (group for group in (folder, *folder.parents) if group.is_relative_to(top))


def _left_in(group: Path) -> tuple[int, int] | None:
    """(limit, bytes below it that are unused or hold files that can be read again), of either version; None
    without a limit."""
    limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
    used = _number(group / "memory.current", group / "memory.usage_in_bytes")
    if limit is None or used is None or limit > 2**60:  # version 1 writes "no limit" as nearly 2**63
        return None
    held = _numbers(group / "memory.stat")
    files = [held.get(f"total_{kind}", held.get(kind, 0)) for kind in ("inactive_file", "active_file")]
    return limit, limit - used + sum(files)


def _number(*paths: Path) -> int | None:
    """What the first of the files that is there says, if that is a number ("max" is none)."""
    for path in paths:
        if path.exists():
            text = path.read_text(encoding="utf-8").strip()
            return int(text) if text.isdigit() else None
    return None


def _numbers(path: Path) -> dict[str, int]:
    """The lines `name: 12 kB` and `name 12` of one of the kernel's files."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


_FLOAT = 4
_FRAGMENTATION = 1.25
"""What a micro-batch takes of the heap, over what it keeps there: batches of different lengths leave holes (600
and 960 tokens by turns: 1.1 at first, 1.35 in the end)."""
_BASELINE_BYTES = 570 * 10**6
"""Python, PyTorch, transformers and a tokenizer, measured."""
_STATES = {"float32": 8.0, "bfloat16": 4.0, "8bit": 2 + 4 / BLOCK}
"""Bytes of AdamW's states, a trained weight."""


def predict_memory(
    model: PreTrainedModel,
    batches: Iterable[Sequence[Sequence[Example]]],
    config: TrainConfig,
    *,
    packed: bool,
    share_prefix: bool,
) -> int:
    """Bytes of the process at its largest, or on the GPU that it uses. Only shapes are looked at: the model may be
    on the meta device.

    batches: the optimizer's, each in its micro-batches.
    """
    weights = sum(weight.nbytes for weight in weights_of(model))
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    held = weights + _STATES[config.optimizer_states] * sum(trained)
    gradients = _FLOAT * sum(trained)
    first = _FLOAT * sum(table.numel() for table in _tables(model) if packed and table.requires_grad)
    forward = 0.0
    for batch in batches:
        for before, micro_batch in enumerate(batch):
            tokens = (
                packed_tokens(micro_batch, share_prefix=share_prefix) if packed else padded_tokens(micro_batch)
            )
            kept = _FRAGMENTATION * _activation_bytes(tokens, model, config) + _logits(micro_batch, model, packed)
            forward = max(forward, kept + (gradients if before else first))
    if resolve_device(config.device).type == "cuda":  # what Python holds, and what is read, is not on it
        return int(held + max(forward, gradients))
    return int(_BASELINE_BYTES + max(_loading(model), held + max(forward, gradients)))


def weights_of(model: PreTrainedModel) -> list[Tensor]:
    """All weights of a model, int8 ones too."""
    int8 = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    return [*model.parameters(), *(layer.tiles.weight if layer.tiles else layer.weight for layer in int8)]


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """Embedding and head, once if they are one: their gradients are there first."""
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight
    return [embedding] if embedding is head else [embedding, head]


def _loading(model: PreTrainedModel) -> int:
    """The file, mostly in bfloat16, is mapped while its weights are converted; int8 layers are made from float
    ones."""
    return sum(weight.numel() for weight in weights_of(model)) * (_FLOAT + 2)


def _activation_bytes(tokens: int, model: PreTrainedModel, config: TrainConfig) -> int:
    """Bytes that a micro-batch of so many tokens keeps for its backward pass, without logits. `--dtype auto` is
    taken for the larger."""
    dtype = "float32" if config.base_weights == "int8" and config.dtype == "auto" else config.dtype
    return max(
        _kept_in(kind, tokens, model, config) for kind in ("float32", "bfloat16") if dtype in (kind, "auto")
    )


def _kept_in(dtype: str, tokens: int, model: PreTrainedModel, config: TrainConfig) -> int:
    """A layer keeps what goes into its norms and comes out of them, queries, keys, values and the attention's
    output, and four arrays between gate, up and down projection. With matmuls in bfloat16 these four are half as
    large; inputs of linear layers are there twice, and so are the layers' weights."""
    text = model.config.get_text_config()
    hidden, heads, layers = int(text.hidden_size), int(text.num_attention_heads), int(text.num_hidden_layers)
    head_size = int(getattr(text, "head_dim", None) or hidden // heads)
    keys = head_size * (getattr(text, "num_key_value_heads", None) or heads)
    compute_bytes = 2 if dtype == "bfloat16" else _FLOAT
    values = (4 if config.lora else 6) * hidden + 3 * heads * head_size + 5 * keys
    inputs = 4 * int(text.intermediate_size) + (7 * config.lora_rank if config.lora else 0)
    in_a_layer = tokens * (_FLOAT * values + compute_bytes * inputs)
    if dtype == "bfloat16":
        in_a_layer += 4 * tokens * hidden + 2 * _linear_weights(model) // layers
    if config.activation_checkpointing:
        return in_a_layer + layers * tokens * hidden * _FLOAT
    return layers * in_a_layer + 2 * tokens * hidden * _FLOAT


def _linear_weights(model: PreTrainedModel) -> int:
    """Weights of the float layers of the body."""
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def _logits(micro_batch: Sequence[Example], model: PreTrainedModel, packed: bool) -> int:
    """Packed, one chunk. Padded, where some row learns, with their gradient, beside the learned ones, their
    softmax and its gradient."""
    vocabulary = model.config.get_text_config().vocab_size
    learned_tokens = sum(example.learned_tokens for example in micro_batch)
    if packed:
        return int(min(_FLOAT * learned_tokens * vocabulary, LOGITS_CHUNK_BYTES))
    positions = {i for example in micro_batch for i, is_learned in enumerate(example.loss_mask) if is_learned}
    return int(_FLOAT * (2 * len(micro_batch) * len(positions) + 3 * learned_tokens) * vocabulary)


@dataclass(frozen=True)
class Plan:
    """Counts are exact, memory is predicted. Tokens are those of one epoch."""

    batching: str
    examples: int
    steps: int
    micro_batches: int
    tokens: int
    learned_tokens: int
    computed_tokens: int
    """Padding is in it, and a shared prefix once."""
    parameters: int
    trainable: int
    peak_memory: int
    """Bytes of the whole process at its largest."""
    checkpoint_size: int
    """Bytes of one checkpoint's weights."""
    training_state_size: int
    """Bytes of what is kept beside them to resume from."""


def make_plan(
    model: PreTrainedModel, examples: Sequence[Example], config: TrainConfig, *, multiple: int = 1
) -> Plan:
    """The plan of a run. Only the shapes of the model are looked at: it may be on the meta device.

    multiple: numbers of tokens of packed micro-batches are rounded up to one of this.
    """
    packed, share_prefix = _execution_of(model, config)
    order = epoch_order(len(examples), seed=config.seed, epoch=1)
    parameters = sum(weight.numel() for weight in weights_of(model))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def optimizer_batches() -> Iterator[list[Example]]:
        """Read anew each time: held, all examples would be lists in memory."""
        return batches(examples, order, config.batch_size)

    computed = [
        _computed(micro_batch, packed, share_prefix, multiple)
        for batch in optimizer_batches()
        for micro_batch in _cut(batch, config, packed)
    ]
    return Plan(
        batching="packed" if packed else "padded",
        examples=len(examples),
        steps=-(-len(examples) // config.batch_size) * config.num_epochs,
        micro_batches=len(computed),
        tokens=int(lengths_of(examples).sum()),
        learned_tokens=learned_tokens_of(examples),
        computed_tokens=sum(computed),
        parameters=parameters,
        trainable=trainable,
        peak_memory=predicted_peak(model, optimizer_batches(), config),
        checkpoint_size=_checkpoint_size(parameters, trainable, config),
        training_state_size=_training_state_size(trainable, config),
    )


def predicted_peak(
    model: PreTrainedModel, optimizer_batches: Iterable[Sequence[Example]], config: TrainConfig
) -> int:
    """Bytes of the process at its largest, over these batches."""
    packed, share_prefix = _execution_of(model, config)
    cut = (_cut(batch, config, packed) for batch in optimizer_batches)
    return predict_memory(model, cut, config, packed=packed, share_prefix=share_prefix)


def _execution_of(model: PreTrainedModel, config: TrainConfig) -> tuple[bool, bool]:
    """(whether it is packed, whether the prefix is shared)."""
    packed = config.batching == "packed" and packing_unsupported_reason(model.config) is None
    return packed, packed and shares_prefix(model.config, config)


def _cut(batch: Sequence[Example], config: TrainConfig, packed: bool) -> list[list[Example]]:
    return list((packed_micro_batches if packed else micro_batches)(batch, config.max_tokens))


def _computed(micro_batch: Sequence[Example], packed: bool, share_prefix: bool, multiple: int) -> int:
    if not packed:
        return padded_tokens(micro_batch)
    return packed_tokens(micro_batch, share_prefix=share_prefix, multiple=multiple)


def _checkpoint_size(parameters: int, trainable: int, config: TrainConfig) -> int:
    if config.lora:
        return trainable * 4
    return parameters * (2 if config.save_dtype == "bfloat16" else 4)


def _training_state_size(trainable: int, config: TrainConfig) -> int:
    """Optimizer states, and the weights once more where the checkpoint has them in another form."""
    links = not config.lora and config.save_dtype == "float32"
    return trainable * ({"float32": 8, "bfloat16": 4, "8bit": 2}[config.optimizer_states] + (0 if links else 4))


def disk_at_most(plan: Plan, config: TrainConfig) -> int:
    """Bytes of all checkpoints of a run when most are there: one an epoch, the best one, those to resume from, and
    one more while it is written."""
    resuming = (plan.checkpoint_size + plan.training_state_size) * (config.keep_last + 1)
    return plan.checkpoint_size * (config.num_epochs + 1) + resuming


_MARGIN = 0.2
"""By so much a prediction may be off (docs/results.md). A run is refused where not even four fifths of it fit, and
doubtful where six fifths of it do not."""

_HEAVIEST = 16

Shapes = Callable[[TrainConfig], PreTrainedModel]
"""The model that a config trains, on the meta device."""


def check_fits_in_memory(
    config: TrainConfig,
    examples: Sequence[Example],
    shapes_of: Shapes,
    room: AvailableMemory | None,
    *,
    processes: Distributed,
    notice: Callable[[str], None],
) -> None:
    """Compares the predicted peak with the memory that is there, on all ranks alike. `notice` is told where it is
    doubtful, and which options would fit.

    Raises TrainingError where the run cannot fit. Under `dry_run` that is told too; and with `shard`, whose share
    is not predicted, and on a GPU, whose allocator is not this one.
    """
    if room is None:
        processes.max(0.0)  # other ranks may know theirs
        return
    heaviest = _heaviest(examples, config)
    predicted = predicted_peak(shapes_of(config), heaviest, config)
    available = room.available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    taken = processes.max(predicted / max(available, 1))
    if taken * (1 + _MARGIN) <= 1:
        return
    lines = [
        f"this run is predicted to take {predicted / 1e9:.1f} GB at its peak{_each(processes)}, and "
        f"{available / 1e9:.1f} GB are there ({room.bound}).",
        *_remedies(config, heaviest, shapes_of, available),
    ]
    if taken * (1 - _MARGIN) <= 1:
        notice("it may not fit into memory: " + "\n".join(lines))
    elif config.dry_run or config.shard or processes.device.type != "cpu":
        notice("it will not fit into memory: " + "\n".join(lines))
    else:
        raise TrainingError("\n".join(lines))


def _each(processes: Distributed) -> str:
    if processes.sharded:
        return " in each process, without --shard"
    return " in each process" if processes.count > 1 else ""


def _heaviest(examples: Sequence[Example], config: TrainConfig) -> list[list[Example]]:
    """Of the first epoch's batches those with the most tokens, and those with the longest rows."""
    lengths, order = lengths_of(examples), epoch_order(len(examples), seed=config.seed, epoch=1)
    made = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    largest = sorted(made, key=lambda batch: int(lengths[batch].sum()), reverse=True)[:_HEAVIEST]
    longest = sorted(made, key=lambda batch: int(lengths[batch].max()), reverse=True)[:_HEAVIEST]
    return [[examples[i] for i in batch] for batch in largest + longest]


def _remedies(
    config: TrainConfig, heaviest: Sequence[Sequence[Example]], shapes_of: Shapes, available: int
) -> Iterator[str]:
    """A line for each change that would fit, with its predicted peak; what has a smaller change in it that fits is
    left out."""
    longest = max(len(example) for batch in heaviest for example in batch)
    model_of: dict[tuple[bool, str], PreTrainedModel] = {}
    fitting: dict[frozenset[str], str] = {}
    for changes in _changes(config, longest):
        if any(fewer <= changes.keys() for fewer in fitting):
            continue
        changed = replace(config, **changes)
        kind = changed.lora, changed.base_weights
        try:
            model_of[kind] = model_of.get(kind) or shapes_of(changed)
            peak = predicted_peak(model_of[kind], heaviest, changed)
        except HandspunError:  # int8 matmuls that are not exact on this machine
            continue
        if peak * (1 + _MARGIN) <= available:
            named = " ".join(_typed(name, value) for name, value in changes.items())
            fitting[frozenset(changes)] = f"  {named}: {peak / 1e9:.1f} GB"
    if not fitting:
        yield "No option that was tried would make it fit: take a smaller model, or free some memory."
        return
    yield "What would fit, with its predicted peak:"
    yield from fitting.values()


def _changes(config: TrainConfig, longest: int) -> list[dict[str, Any]]:
    """Options that take less memory, alone and together, the fewest first. Micro-batches are halved as long as the
    longest row fits into one; beside other options they are the smallest."""
    halves: list[int] = []
    while (less := (halves[-1] if halves else config.max_tokens) // 2) >= longest:
        halves.append(less)
    smallest = [{"max_tokens": halves[-1]}] if halves else []
    again = [] if config.activation_checkpointing else [{"activation_checkpointing": True}]
    states = [] if config.optimizer_states == "8bit" or config.shard else [{"optimizer_states": "8bit"}]
    adapters: list[dict[str, Any]] = [] if config.lora else [{"lora": True}]
    if config.base_weights != "int8" and not config.shard:
        adapters.append({"lora": True, "base_weights": "int8"})
    nothing: list[dict[str, Any]] = [{}]
    together = [
        {**a, **b, **c, **d}
        for a, b, c, d in product(nothing + smallest, nothing + again, nothing + states, nothing + adapters)
    ]
    return sorted([*({"max_tokens": less} for less in halves), *together[1:]], key=len)


def _typed(name: str, value: object) -> str:
    return option_name(name) if value is True else f"{option_name(name)} {value}"
