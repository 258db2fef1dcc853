"""The runner of micro-batches: packed if the model supports it, else padded, which is also the reference."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example, lengths_of
from handspun.display import logger
from handspun.models.int8 import float_activations
from handspun.training.batching import Batching
from handspun.training.objectives import CallInForward, PaddedRunner, call_directly
from handspun.training.packed import Packed, packed_attention

_TOLERANCE = 1e-3
"""Relative. The two agree to 1e-6; an attention rule that packing ignores shows up far above this."""


class BatchRunner(Protocol):
    """Computes losses and gradients of micro-batches, as sums over target tokens that the caller divides."""

    @property
    def batching(self) -> Batching:
        """How to split a batch for this runner."""

    def loss(self, micro_batch: Sequence[Example]) -> float:
        """Return the loss summed over the micro-batch's target tokens, without a gradient, in float32."""

    def row_losses(self, micro_batch: Sequence[Example]) -> list[float]:
        """Return one loss per example, summed over its target tokens; their sum is `loss`."""

    def backward(self, micro_batch: Sequence[Example], divisor: int) -> float:
        """Accumulate the gradient of loss sum / `divisor`. Return the loss sum."""


@contextmanager
def select_runner(
    model: PreTrainedModel,
    config: TrainConfig,
    examples: Sequence[Example],
    *,
    dtype: torch.dtype,
    pad_token_id: int,
    run_on: Callable[[PreTrainedModel], CallInForward] = lambda _: call_directly,
) -> Iterator[BatchRunner]:
    """Yield the config's runner, and log which one it is. A model that cannot be packed runs padded.

    If the runner is packed, the model has packed attention within the block.

    Args:
        model: the model to train.
        config: options of the run.
        examples: training examples; the two shortest are used to try packing.
        dtype: type of the matmuls.
        pad_token_id: id to pad with, if padded.
        run_on: returns what calls computations on the model; it may shard the model.
    """
    padded = PaddedRunner(model, dtype, pad_token_id)
    reason = "as requested" if config.batching == "padded" else packing_unsupported_reason(model.config)
    if reason is None:
        reason = _differs(model, padded, examples)
    if reason is not None:
        logger.info(f"batching: padded ({reason})")
        yield replace(padded, run=run_on(model))
        return
    shared = shares_prefix(model.config, config)
    logger.info("batching: packed" + ("" if shared else "; prefixes are not shared, because of dropout"))
    with packed_attention(model):
        run = run_on(model)  # it may move the model to another device
        yield Packed(model, dtype, batching_for(model.config, config, model.device), run)


def batching_for(model_config: PreTrainedConfig, config: TrainConfig, device: torch.device) -> Batching:
    """Return how a run's rows are batched, if the model computes packed rows as its config says."""
    if config.batching == "padded" or packing_unsupported_reason(model_config) is not None:
        return Batching("padded")
    multiple = 16 if device.type == "cuda" else 1  # a GPU's attention kernels need the rows of a mask aligned
    return Batching("packed", shares_prefix(model_config, config), multiple)


def packing_unsupported_reason(config: PreTrainedConfig) -> str | None:
    """Return why a model cannot be packed, or None if nothing in its config prevents it."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"{text.model_type} has {', '.join(sorted(kinds - {'full_attention'}))} layers"
    if getattr(text, "sliding_window", None) is not None:
        return f"{text.model_type} has a sliding window of {text.sliding_window} tokens"
    return None


def _differs(model: PreTrainedModel, padded: PaddedRunner, examples: Sequence[Example]) -> str | None:
    """Return why the packed loss of the two shortest rows differs from the padded one, or None if it does not."""
    # A model may do more with attention or logits than its config says. So it is tried, not looked up in a list.
    shortest = [examples[i] for i in np.argsort(lengths_of(examples), kind="stable")[:2].tolist()]
    was_training = model.training
    model.eval()
    try:
        # With rounded activations, the two differ by noise (0.05 % of the loss of Alpaca's two shortest rows on
        # Qwen), without by 1e-7.
        with float_activations(model):
            expected = PaddedRunner(model, torch.float32, padded.pad_token_id).loss(shortest)
            with packed_attention(model):
                found = Packed(model, torch.float32, Batching("packed", share_prefix=True)).loss(shortest)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"{model.config.model_type} does not accept packed rows: {str(error).splitlines()[0]}"
    finally:
        model.train(was_training)
    if not abs(found - expected) <= _TOLERANCE * abs(expected):
        return f"{model.config.model_type} has another loss when packed, {found:.6g} instead of {expected:.6g}"
    return None


def shares_prefix(model_config: PreTrainedConfig, config: TrainConfig) -> bool:
    """Return whether packs store a common prefix once: only without dropout."""
    # With dropout, all rows of a pack would share one draw of it for the prefix.
    values = model_config.get_text_config().to_dict().items()  # attention_dropout, resid_pdrop, hidden_dropout...
    drops = any(isinstance(value, float) and value > 0 for name, value in values if "drop" in name)
    return not drops and not (config.lora and config.lora_dropout)
