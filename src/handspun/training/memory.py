"""The plan of a run, its predicted peak memory, and the memory available for it."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from handspun.config import TrainConfig, option_name
from handspun.data.examples import Example, learned_tokens_of, lengths_of
from handspun.errors import HandspunError, TrainingError
from handspun.kernels import kernels_for
from handspun.models.int8 import Int8Linear
from handspun.models.load import resolve_device
from handspun.training.batching import Batching, batches, epoch_order, epochs_of_run, steps_of_run
from handspun.training.distributed import Distributed
from handspun.training.optim import BLOCK
from handspun.training.packed import LOGITS_CHUNK_BYTES
from handspun.training.packed_layers import can_compute_layers
from handspun.training.runner import batching_for


@dataclass(frozen=True)
class AvailableMemory:
    """Bytes available to this process, those that it already holds included.

    bound: what limits them, in words.
    """

    available: int
    bound: str


def available_memory(device: torch.device) -> AvailableMemory | None:
    """Return the memory available on the device: a GPU's, or this machine's; None if unknown."""
    if device.type != "cuda":
        return room_here() if device.type == "cpu" else None
    free, _ = torch.cuda.mem_get_info(device)
    return AvailableMemory(free + torch.cuda.memory_reserved(device), f"free memory of {device}")


def room_here(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> AvailableMemory | None:
    """Return the least of the machine's free memory and the room under the limits of this process's cgroups.

    Checks cgroups of versions 1 and 2, and their parents. Returns None if the system does not tell (other than
    Linux).
    """
    meminfo = _numbers(proc / "meminfo")
    if "MemAvailable" not in meminfo:
        return None
    # What the process already holds counts as available, and so do cached files; swap does not.
    own = _numbers(proc / "self" / "status").get("RssAnon", 0) * 1024
    free = [AvailableMemory(meminfo["MemAvailable"] * 1024 + own, "free memory of this machine")]
    for folder in _memory_cgroups(proc, cgroups):
        if (left := _cgroup_limit(folder)) is not None:
            limit, unused = left
            free.append(AvailableMemory(unused + own, f"{limit / 1e9:.1f} GB limit of the control group {folder}"))
    return min(free, key=lambda room: room.available)


def _memory_cgroups(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the folders of the memory cgroups that this process belongs to."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = cgroups / "memory" if controllers else cgroups
        # In a container, the named folder may exist only outside of it. Its own cgroup is then the topmost folder.
        folder = top / place.strip("/")
        yield from (group for group in (folder, *folder.parents) if group.is_relative_to(top))


def _cgroup_limit(group: Path) -> tuple[int, int] | None:
    """Return (limit, available bytes below it) of a cgroup; None without a limit."""
    limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
    used = _number(group / "memory.current", group / "memory.usage_in_bytes")
    # Version 1 writes "no limit" as nearly 2**63.
    if limit is None or used is None or limit > 2**60:
        return None
    held = _numbers(group / "memory.stat")
    files = [held.get(f"total_{kind}", held.get(kind, 0)) for kind in ("inactive_file", "active_file")]
    return limit, limit - used + sum(files)


def _number(*paths: Path) -> int | None:
    """Return the number in the first file that exists, or None if it holds no number (such as "max")."""
    for path in paths:
        if path.exists():
            text = path.read_text(encoding="utf-8").strip()
            return int(text) if text.isdigit() else None
    return None


def _numbers(path: Path) -> dict[str, int]:
    """Parse the lines `name: 12 kB` and `name 12` of a kernel file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = [line.replace(":", " ").split() for line in lines]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


_FLOAT = 4
# Heap that a micro-batch takes, relative to its tensors. Batches of different lengths leave holes: alternating 600
# and 960 tokens took 1.1 at first, 1.35 in the end.
_FRAGMENTATION = 1.25
# Measured bytes of Python, PyTorch, transformers, and a tokenizer.
_BASELINE_BYTES = 570 * 10**6
_STATES = {"float32": 8.0, "bfloat16": 4.0, "8bit": 2 + 4 / BLOCK}
"""Bytes of AdamW's states per trained weight."""


def predicted_peak(
    model: PreTrainedModel, optimizer_batches: Iterable[Sequence[Example]], config: TrainConfig
) -> int:
    """Return the predicted peak bytes of the process, or of the GPU that it uses, over these batches.

    Only the shapes of the model matter, so it may be on the meta device.
    """
    batching = batching_for(model.config, config, resolve_device(config.device))
    weights = sum(weight.nbytes for weight in weights_of(model))
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    held = weights + _STATES[config.optimizer_states] * sum(trained)
    gradients = _FLOAT * sum(trained)
    # The peak is the largest sum of what is held at one moment. Packed, the gradients of embedding and head are
    # made before all others; from the second micro-batch on, all are there.
    first = 0
    if batching.kind == "packed":
        first = _FLOAT * sum(table.numel() for table in _embedding_and_head(model) if table.requires_grad)
    forward = 0.0
    for batch in optimizer_batches:
        for before, micro_batch in enumerate(batching.split(batch, config.max_tokens)):
            activations = _activation_bytes(batching.computed_tokens(micro_batch), model, config)
            kept = _FRAGMENTATION * activations + _logits_bytes(micro_batch, model, batching)
            forward = max(forward, kept + (gradients if before else first))
    # Python and the files read are not in GPU memory.
    if resolve_device(config.device).type == "cuda":
        return int(held + max(forward, gradients))
    return int(_BASELINE_BYTES + max(_loading_bytes(model), held + max(forward, gradients)))


def weights_of(model: PreTrainedModel) -> list[Tensor]:
    """Return all weights of a model, int8 ones included."""
    int8 = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    return [*model.parameters(), *(layer.matrix.weight for layer in int8)]


def _embedding_and_head(model: PreTrainedModel) -> list[Tensor]:
    """Return the embedding and head, once if tied."""
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight
    return [embedding] if embedding is head else [embedding, head]


def _loading_bytes(model: PreTrainedModel) -> int:
    """Return the peak bytes while loading."""
    # The file, usually bfloat16, stays mapped while its weights are converted. int8 layers are made from float
    # ones.
    return sum(weight.numel() for weight in weights_of(model)) * (_FLOAT + 2)


def _activation_bytes(tokens: int, model: PreTrainedModel, config: TrainConfig) -> int:
    """Return the bytes that a micro-batch of `tokens` tokens keeps for its backward pass, without logits.

    For `--dtype auto`, returns the larger of float32's and bfloat16's.
    """
    dtype = "float32" if config.base_weights == "int8" and config.dtype == "auto" else config.dtype
    return max(
        _activation_bytes_for(kind, tokens, model, config)
        for kind in ("float32", "bfloat16")
        if dtype in (kind, "auto")
    )


def _activation_bytes_for(dtype: str, tokens: int, model: PreTrainedModel, config: TrainConfig) -> int:
    """Return `_activation_bytes` for one type of matmuls."""
    text = model.config.get_text_config()
    hidden, heads, layers = int(text.hidden_size), int(text.num_attention_heads), int(text.num_hidden_layers)
    head_size = int(getattr(text, "head_dim", None) or hidden // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    compute_bytes = 2 if dtype == "bfloat16" else _FLOAT
    # Counted with saved-tensor hooks; tests/training/test_memory.py counts again. A layer keeps the inputs and
    # outputs of its norms, queries, keys, values, the attention's output, and arrays between the gate, up, and
    # down projections. PyTorch's attention keeps more, since it sees keys after a copy of the prefix's.
    device, intermediate = resolve_device(config.device), int(text.intermediate_size)
    inputs, kernels = 7 * config.lora_rank if config.lora else 0, kernels_for(device)
    with_kernels = config.batching == "packed" and kernels.can_attend_packs(heads, kv_heads, head_size)
    if with_kernels:
        values = (2 * heads + 2 * kv_heads) * head_size + heads
    else:
        values = (3 * heads + 5 * kv_heads) * head_size
    if with_kernels and can_compute_layers(text, device):
        values += 2 * hidden + 2
        inputs += 2 * hidden + 3 * intermediate + (heads * head_size if dtype == "bfloat16" else 0)
    else:
        values += (4 if config.lora else 6) * hidden + (hidden if dtype == "bfloat16" else 0)
        inputs += 4 * intermediate
    in_a_layer = tokens * (_FLOAT * values + compute_bytes * inputs)
    if dtype == "bfloat16":
        in_a_layer += 2 * _linear_weights(model) // layers  # a copy of the weights
    if config.activation_checkpointing:
        return in_a_layer + layers * tokens * hidden * _FLOAT
    return layers * in_a_layer + 2 * tokens * hidden * _FLOAT


def _linear_weights(model: PreTrainedModel) -> int:
    """Return the number of weights in the body's float linear layers."""
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def _logits_bytes(micro_batch: Sequence[Example], model: PreTrainedModel, batching: Batching) -> int:
    """Return the bytes of a micro-batch's logits."""
    vocabulary = model.config.get_text_config().vocab_size
    learned_tokens = sum(example.learned_tokens for example in micro_batch)
    if batching.kind == "packed":
        return int(min(_FLOAT * learned_tokens * vocabulary, LOGITS_CHUNK_BYTES))
    # The logits and their gradient where some row has a target, and the logits, softmax, and gradient of the
    # target tokens.
    positions = {i for example in micro_batch for i, is_learned in enumerate(example.loss_mask) if is_learned}
    return int(_FLOAT * (2 * len(micro_batch) * len(positions) + 3 * learned_tokens) * vocabulary)


@dataclass(frozen=True)
class Plan:
    """The plan of a run. Counts are exact, memory is predicted. Tokens are per epoch."""

    batching: str
    examples: int
    steps: int
    micro_batches: int
    tokens: int
    learned_tokens: int
    computed_tokens: int
    """Tokens that run through the model: padding counts, a shared prefix counts once."""
    parameters: int
    trainable: int
    peak_memory: int
    """Peak bytes of the process."""
    checkpoint_size: int
    """Bytes of one checkpoint's weights."""
    training_state_size: int
    """Bytes of a checkpoint's training state, which resuming needs."""


def make_plan(model: PreTrainedModel, examples: Sequence[Example], config: TrainConfig) -> Plan:
    """Return the plan of a run. Only the shapes of the model matter, so it may be on the meta device."""
    batching = batching_for(model.config, config, resolve_device(config.device))
    order = epoch_order(len(examples), seed=config.seed, epoch=1)
    parameters = sum(weight.numel() for weight in weights_of(model))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def optimizer_batches() -> Iterator[list[Example]]:
        # They are made twice: kept, they would hold all examples as lists in memory.
        return batches(examples, order, config.batch_size)

    computed = [
        batching.computed_tokens(micro_batch)
        for batch in optimizer_batches()
        for micro_batch in batching.split(batch, config.max_tokens)
    ]
    return Plan(
        batching=batching.kind,
        examples=len(examples),
        steps=steps_of_run(len(examples), config),
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


def _checkpoint_size(parameters: int, trainable: int, config: TrainConfig) -> int:
    if config.lora:
        return trainable * 4
    return parameters * (2 if config.save_dtype == "bfloat16" else 4)


def _training_state_size(trainable: int, config: TrainConfig) -> int:
    """Return the bytes of optimizer states, plus those of the weights if need be."""
    # The model file of a full float32 checkpoint holds the very weights, and is linked.
    links = not config.lora and config.save_dtype == "float32"
    return trainable * ({"float32": 8, "bfloat16": 4, "8bit": 2}[config.optimizer_states] + (0 if links else 4))


def disk_at_most(plan: Plan, config: TrainConfig) -> int:
    """Return the most bytes that a run's checkpoints can take."""
    # One per epoch, the best one, those to resume from, and one more while it is written.
    resuming = (plan.checkpoint_size + plan.training_state_size) * (config.keep_last + 1)
    return plan.checkpoint_size * (epochs_of_run(plan.examples, config) + 1) + resuming


# Relative error of predictions (docs/results.md). A run is rejected if not even four fifths of its predicted peak
# fit, and doubtful if six fifths do not.
_MARGIN = 0.2

Fit = Literal["fits", "may not fit", "does not fit"]


def how_it_fits(peak: float, available: float) -> Fit:
    """Compare a predicted peak with the memory available."""
    if peak * (1 + _MARGIN) <= available:
        return "fits"
    return "may not fit" if peak * (1 - _MARGIN) <= available else "does not fit"


_HEAVIEST_BATCHES = 16

Shapes = Callable[[TrainConfig], PreTrainedModel]
"""Returns the model that a config trains, on the meta device."""


def check_fits_in_memory(
    config: TrainConfig,
    examples: Sequence[Example],
    shapes_of: Shapes,
    room: AvailableMemory | None,
    *,
    processes: Distributed,
) -> list[str]:
    """Compare the predicted peak with the memory available. Return the doubt, if any, with options that would fit.

    Raises TrainingError if the run cannot fit. That is only a doubt with `dry_run`, with `shard` (a shard is not
    predicted), and on a GPU (its allocator behaves differently).

    Args:
        config: options of the run.
        examples: the training examples.
        shapes_of: returns the model of a config on the meta device.
        room: the memory available, or None if unknown.
        processes: the ranks; all of them must call it together.
    """
    if room is None:
        processes.max(0.0)  # other ranks may know theirs
        return []
    heaviest = _heaviest_batches(examples, config)
    predicted = predicted_peak(shapes_of(config), heaviest, config)
    available = room.available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    taken = processes.max(predicted / max(available, 1))
    fit = how_it_fits(taken, 1)
    if fit == "fits":
        return []
    lines = [
        f"predicted peak memory is {predicted / 1e9:.1f} GB{_per_process(processes)}, and "
        f"{available / 1e9:.1f} GB is available ({room.bound}).",
        *_remedies(config, heaviest, shapes_of, available),
    ]
    if fit == "may not fit":
        return ["this run may not fit in memory: " + "\n".join(lines)]
    problem = "this run will not fit in memory: " + "\n".join(lines)
    if config.dry_run or config.shard or processes.device.type != "cpu":
        return [problem]
    raise TrainingError(problem)


def _per_process(processes: Distributed) -> str:
    if processes.sharded:
        return " per process, without --shard"
    return " per process" if processes.count > 1 else ""


def _heaviest_batches(examples: Sequence[Example], config: TrainConfig) -> list[list[Example]]:
    """Return the first epoch's batches with the most tokens, and those with the longest rows."""
    lengths, order = lengths_of(examples), epoch_order(len(examples), seed=config.seed, epoch=1)
    indices = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    largest = sorted(indices, key=lambda batch: int(lengths[batch].sum()), reverse=True)[:_HEAVIEST_BATCHES]
    longest = sorted(indices, key=lambda batch: int(lengths[batch].max()), reverse=True)[:_HEAVIEST_BATCHES]
    return [[examples[i] for i in batch] for batch in largest + longest]


def _remedies(
    config: TrainConfig, heaviest: Sequence[Sequence[Example]], shapes_of: Shapes, available: int
) -> Iterator[str]:
    """Yield one line per set of options that would fit, with its predicted peak; only minimal sets."""
    fitting: dict[frozenset[str], str] = {}
    shapes = cache(lambda lora, base_weights: shapes_of(replace(config, lora=lora, base_weights=base_weights)))
    for options in _savings(config, longest=max(len(example) for batch in heaviest for example in batch)):
        if any(fewer <= options.keys() for fewer in fitting):
            continue
        try:
            changed = replace(config, **options)
            peak = predicted_peak(shapes(changed.lora, changed.base_weights), heaviest, changed)
        except HandspunError:  # int8 without LoRA, or int8 matmuls that are not exact on this machine
            continue
        if how_it_fits(peak, available) == "fits":
            names = [f"{option_name(name)} {value}".removesuffix(" True") for name, value in options.items()]
            fitting[frozenset(options)] = f"  {' '.join(names)}: {peak / 1e9:.1f} GB"
    if not fitting:
        yield "No option that was tried makes it fit. Use a smaller model, or free some memory."
        return
    yield "Options that would fit, with their predicted peak:"
    yield from fitting.values()


def _savings(config: TrainConfig, *, longest: int) -> Iterator[dict[str, Any]]:
    """Yield options that save memory, alone and combined, fewest first. longest: tokens of the longest row."""
    # max_tokens is halved as long as the longest row fits; combined with other options, as often as possible.
    halvings = (config.max_tokens // longest).bit_length() - 1
    yield from ({"max_tokens": config.max_tokens >> times} for times in range(1, halvings))
    options = {"activation_checkpointing": True, "optimizer_states": "8bit", "lora": True, "base_weights": "int8"}
    if halvings > 0:
        options = {"max_tokens": config.max_tokens >> halvings, **options}
    if config.shard:  # neither can be sharded
        del options["optimizer_states"], options["base_weights"]
    new = [name for name, value in options.items() if value != getattr(config, name)]
    for count in range(1, len(new) + 1):
        yield from ({name: options[name] for name in names} for names in combinations(new, count))
