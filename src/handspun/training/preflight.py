"""What a run will cost, worked out before it begins: steps, tokens, memory, disk."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.batches import batches, epoch_order, micro_batches
from handspun.data.examples import Example
from handspun.models.int8 import Int8Linear
from handspun.training.execution import cannot_pack, shares_prefix
from handspun.training.forward import padded_tokens
from handspun.training.packed import CHUNK_BYTES, packed_micro_batches, packed_tokens


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


def make_plan(model: PreTrainedModel, examples: Sequence[Example], config: TrainConfig) -> Plan:
    """The plan of a run. Only the shapes of the model are looked at: it may be on the meta device."""
    packed = config.batching == "packed" and cannot_pack(model.config) is None
    cut = packed_micro_batches if packed else micro_batches
    order = epoch_order(len(examples), seed=config.seed, epoch=1)
    parts = [
        part for batch in batches(examples, order, config.batch_size) for part in cut(batch, config.max_tokens)
    ]
    share_prefix = packed and shares_prefix(model.config, config)
    frozen = [layer.weight for layer in model.modules() if isinstance(layer, Int8Linear)]
    weights = [*model.parameters(), *frozen]
    parameters, weight_bytes = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kept = max(_kept(part, model, config, packed, share_prefix) for part in parts)
    return Plan(
        batching="packed" if packed else "padded",
        examples=len(examples),
        steps=-(-len(examples) // config.batch_size) * config.num_epochs,
        micro_batches=len(parts),
        tokens=sum(len(example) for example in examples),
        learned_tokens=sum(example.learned_tokens for example in examples),
        computed_tokens=sum(_computed(part, packed, share_prefix) for part in parts),
        parameters=parameters,
        trainable=trainable,
        # int8 layers are made from float ones, so loading may take more than training.
        peak_memory=_FIXED + max(weight_bytes + _FLOAT * (3 * trainable + kept), _FLOAT * parameters),
        checkpoint_size=_checkpoint_size(parameters, trainable, config),
    )


_FLOAT = torch.float32.itemsize
_FIXED = 600 * 2**20  # PyTorch, transformers and the tokenizer themselves, measured


def _computed(part: Sequence[Example], packed: bool, share_prefix: bool) -> int:
    return packed_tokens(part, share_prefix=share_prefix) if packed else padded_tokens(part)


def _kept(
    part: Sequence[Example], model: PreTrainedModel, config: TrainConfig, packed: bool, share_prefix: bool
) -> int:
    """Floats that a micro-batch holds at the end of its forward pass: each layer's inputs and products, and
    logits: padded, where some row learns, with their gradient, beside the learned ones, their softmax and its
    gradient; packed, the three of one chunk, and the head's gradient before it is added."""
    text: PretrainedConfig = model.config.get_text_config()
    in_a_layer = 10 * text.hidden_size + 5 * text.intermediate_size
    per_token = in_a_layer * text.num_hidden_layers
    if config.activation_checkpointing:
        per_token = in_a_layer + text.hidden_size * text.num_hidden_layers
    activations = _computed(part, packed, share_prefix) * per_token
    learned_tokens = sum(example.learned_tokens for example in part)
    if packed:
        head = model.get_output_embeddings().weight
        logits = 3 * min(learned_tokens * text.vocab_size, CHUNK_BYTES // _FLOAT)
        return int(activations + logits + (head.numel() if head.requires_grad else 0))
    positions = {i for example in part for i, is_learned in enumerate(example.learned) if is_learned}
    return int(activations + (2 * len(part) * len(positions) + 3 * learned_tokens) * text.vocab_size)


def _checkpoint_size(parameters: int, trainable: int, config: TrainConfig) -> int:
    if config.lora:
        return trainable * _FLOAT
    return parameters * (2 if config.save_dtype == "bfloat16" else _FLOAT)
