"""What a run will cost, worked out before it begins: steps, tokens, memory, disk."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.batches import batches, epoch_order, micro_batches
from handspun.data.example_arrays import learned_tokens_of, lengths_of
from handspun.data.examples import Example
from handspun.training.execution import cannot_pack, shares_prefix
from handspun.training.forward import padded_tokens
from handspun.training.memory import predict_memory, weights_of
from handspun.training.pack import packed_micro_batches, packed_tokens


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

    def optimiser_batches() -> Iterator[list[Example]]:
        """Read anew each time: held, all examples would be lists in memory."""
        return batches(examples, order, config.batch_size)

    computed = [
        _computed(part, packed, share_prefix, multiple)
        for batch in optimiser_batches()
        for part in _cut(batch, config, packed)
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
        peak_memory=predicted_peak(model, optimiser_batches(), config),
        checkpoint_size=_checkpoint_size(parameters, trainable, config),
        training_state_size=_training_state_size(trainable, config),
    )


def predicted_peak(
    model: PreTrainedModel, optimiser_batches: Iterable[Sequence[Example]], config: TrainConfig
) -> int:
    """Bytes of the process at its largest, over these batches."""
    packed, share_prefix = _execution_of(model, config)
    cut = (_cut(batch, config, packed) for batch in optimiser_batches)
    return predict_memory(model, cut, config, packed=packed, share_prefix=share_prefix)


def _execution_of(model: PreTrainedModel, config: TrainConfig) -> tuple[bool, bool]:
    """(whether it is packed, whether the prefix is shared)."""
    packed = config.batching == "packed" and cannot_pack(model.config) is None
    return packed, packed and shares_prefix(model.config, config)


def _cut(batch: Sequence[Example], config: TrainConfig, packed: bool) -> list[list[Example]]:
    return list((packed_micro_batches if packed else micro_batches)(batch, config.max_tokens))


def _computed(part: Sequence[Example], packed: bool, share_prefix: bool, multiple: int) -> int:
    if not packed:
        return padded_tokens(part)
    return packed_tokens(part, share_prefix=share_prefix, multiple=multiple)


def _checkpoint_size(parameters: int, trainable: int, config: TrainConfig) -> int:
    if config.lora:
        return trainable * 4
    return parameters * (2 if config.save_dtype == "bfloat16" else 4)


def _training_state_size(trainable: int, config: TrainConfig) -> int:
    """Optimiser states, and the weights once more where the checkpoint has them in another form."""
    links = not config.lora and config.save_dtype == "float32"
    return trainable * ({"float32": 8, "bfloat16": 4, "8bit": 2}[config.optimizer_states] + (0 if links else 4))


def disk_at_most(plan: Plan, config: TrainConfig) -> int:
    """Bytes of all checkpoints of a run when most are there: one an epoch, the best one, those to resume from, and
    one more while it is written."""
    resuming = (plan.checkpoint_size + plan.training_state_size) * (config.keep_last + 1)
    return plan.checkpoint_size * (config.num_epochs + 1) + resuming
