"""What a run will cost, worked out before it begins: steps, tokens, memory, disk."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.batches import batches, epoch_order, micro_batches
from handspun.data.examples import Example


@dataclass(frozen=True)
class Plan:
    """Counts are exact, memory is predicted. Tokens are those of one epoch."""

    examples: int
    steps: int
    micro_batches: int
    tokens: int
    learned_tokens: int
    padded_tokens: int
    parameters: int
    trainable: int
    peak_memory: int
    """Bytes of the whole process at its largest."""
    checkpoint_size: int
    """Bytes of one checkpoint's weights."""


def make_plan(model: PreTrainedModel, examples: Sequence[Example], config: TrainConfig) -> Plan:
    """The plan of a run. Only the shapes of the model are looked at: it may be on the meta device."""
    cuts = [
        part
        for batch in batches(examples, epoch_order(len(examples), seed=config.seed, epoch=1), config.batch_size)
        for part in micro_batches(batch, config.max_tokens)
    ]
    sizes = [len(part) * max(len(example) for example in part) for part in cuts]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    largest = max(zip(sizes, cuts, strict=True), key=lambda pair: pair[0])
    learned_in_largest = sum(example.learned_tokens for example in largest[1])
    saved = trainable if config.lora else parameters
    return Plan(
        examples=len(examples),
        steps=-(-len(examples) // config.batch_size) * config.num_epochs,
        micro_batches=len(cuts),
        tokens=sum(len(example) for example in examples),
        learned_tokens=sum(example.learned_tokens for example in examples),
        padded_tokens=sum(sizes),
        parameters=parameters,
        trainable=trainable,
        peak_memory=_peak_memory(model.config, parameters, trainable, largest[0], learned_in_largest),
        checkpoint_size=saved * (2 if config.save_dtype == "bfloat16" and not config.lora else 4),
    )


_FLOAT = torch.float32.itemsize
_LIBRARIES = 600 * 2**20  # PyTorch, transformers and the tokenizer themselves, measured


def _peak_memory(
    config: PretrainedConfig, parameters: int, trainable: int, tokens: int, learned_tokens: int
) -> int:
    """Weights, gradients and AdamW's two moments; what the largest micro-batch keeps for its backward pass;
    and the logits where some row learns with their gradient, beside the learned ones, their softmax and its
    gradient."""
    text = config.get_text_config()
    kept_per_layer = 10 * text.hidden_size + 5 * text.intermediate_size
    activations = tokens * kept_per_layer * text.num_hidden_layers
    logits = (2 * tokens + 3 * learned_tokens) * text.vocab_size
    floats: int = parameters + 3 * trainable + activations + logits
    return _LIBRARIES + _FLOAT * floats
