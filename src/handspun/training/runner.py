"""How a micro-batch is computed: packed where the model allows it, padded as the reference and the fallback."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example, lengths_of
from handspun.models.int8 import float_activations
from handspun.training.objectives import CallInForward, PaddedRunner, call_directly
from handspun.training.packed import Packed, packed_attention

_TOLERANCE = 1e-3
"""Relative. The two agree to 1e-6; a rule of attention that is not followed shows far above this."""


class BatchRunner(Protocol):
    """Losses and gradients of micro-batches: sums over learned tokens, which the caller divides."""

    def cut(self, batch: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
        """The batch in micro-batches of at most `max_tokens` tokens; a longer row is one of its own."""

    def computed_tokens(self, micro_batch: Sequence[Example]) -> int:
        """Tokens that go through the model: padding is in it, and a shared prefix once."""

    def loss(self, micro_batch: Sequence[Example]) -> float:
        """Return the loss summed over the micro-batch's target tokens, without a gradient, by matmuls in float32.

        The weights are used as they are kept: rounded to bfloat16, they would lose what small steps taught them.
        """

    def row_losses(self, micro_batch: Sequence[Example]) -> list[float]:
        """The terms of `loss`: each example's, summed over its learned tokens."""

    def backward(self, micro_batch: Sequence[Example], divisor: int) -> float:
        """Adds the gradient of the micro-batch's loss sum / `divisor`; returns the sum."""


@contextmanager
def select_runner(
    model: PreTrainedModel,
    config: TrainConfig,
    examples: Sequence[Example],
    *,
    dtype: torch.dtype,
    pad_token_id: int,
    notice: Callable[[str], None],
    run_on: Callable[[PreTrainedModel], CallInForward] = lambda _: call_directly,
) -> Iterator[BatchRunner]:
    """The runner that the config asks for; the model's attention is packed inside the block, if it is packed.

    run_on: how computations on the model are made, once it is known which; it may cut the model over the ranks.
    A model whose attention does not fit runs padded, and `notice` is told why.
    """
    padded = PaddedRunner(model, dtype, pad_token_id)
    reason = "it was asked for" if config.batching == "padded" else packing_unsupported_reason(model.config)
    if reason is None:
        reason = _differs(model, padded, examples)
    if reason is not None:
        notice(f"batching: padded ({reason})")
        yield replace(padded, run=run_on(model))
        return
    share_prefix = shares_prefix(model.config, config)
    notice("batching: packed" + ("" if share_prefix else "; no prefix is shared, because of dropout"))
    with packed_attention(model):
        yield Packed(model, dtype, share_prefix, run_on(model))


def packing_unsupported_reason(config: PreTrainedConfig) -> str | None:
    """Why a model's attention cannot be cut into sequences; None if nothing in its config speaks against it."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"{text.model_type} has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(text, "sliding_window", None) is not None:
        return f"{text.model_type} has a sliding window of {text.sliding_window} tokens"
    return None


def _differs(model: PreTrainedModel, padded: PaddedRunner, examples: Sequence[Example]) -> str | None:
    """Tries both on the two shortest rows: a model may do more with attention or logits than its config says."""
    shortest = [examples[i] for i in np.argsort(lengths_of(examples), kind="stable")[:2].tolist()]
    was_training = model.training
    model.eval()
    try:
        with float_activations(model):
            expected = PaddedRunner(model, torch.float32, padded.pad_token_id).loss(shortest)
            with packed_attention(model):
                found = Packed(model, torch.float32, share_prefix=True).loss(shortest)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"{model.config.model_type} does not take packed rows: {str(error).splitlines()[0]}"
    finally:
        model.train(was_training)
    if not abs(found - expected) <= _TOLERANCE * abs(expected):
        return f"{model.config.model_type} gives another loss packed, {found:.6g} for {expected:.6g}"
    return None


def shares_prefix(model_config: PreTrainedConfig, config: TrainConfig) -> bool:
    """Not under dropout: rows that share a prefix would share its dropout."""
    values = model_config.get_text_config().to_dict().items()  # attention_dropout, resid_pdrop, hidden_dropout...
    drops = any(isinstance(value, float) and value > 0 for name, value in values if "drop" in name)
    return not drops and not (config.lora and config.lora_dropout)
