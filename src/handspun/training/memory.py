"""Peak memory of a run, predicted: what is held at the moments when most of it is.

    loading     weights, and the file that they are read from
    forward     weights, optimiser states, what a micro-batch keeps for its backward pass, the head's gradient and
                logits; and all gradients, where it is not the first micro-batch of its batch
    backward    weights, optimiser states, all gradients: when what was kept has been freed

What a layer keeps was counted with torch.autograd.graph.saved_tensors_hooks, for models of the Llama family.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.models.int8 import Int8Linear
from handspun.models.load import resolve_device
from handspun.training.forward import padded_tokens
from handspun.training.pack import packed_tokens
from handspun.training.packed import CHUNK_BYTES
from handspun.training.short_states import BLOCK

_FLOAT = 4
_HOLES = 1.25
"""What a micro-batch takes of the heap, over what it keeps there: batches of different lengths leave holes (600
and 960 tokens by turns: 1.1 at first, 1.35 in the end)."""
_FIXED = 570 * 10**6
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

    batches: the optimiser's, each in its micro-batches.
    """
    weights = sum(weight.nbytes for weight in weights_of(model))
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    held = weights + _STATES[config.optimizer_states] * sum(trained)
    gradients = _FLOAT * sum(trained)
    first = _FLOAT * sum(table.numel() for table in _tables(model) if packed and table.requires_grad)
    forward = 0.0
    for batch in batches:
        for before, part in enumerate(batch):
            tokens = packed_tokens(part, share_prefix=share_prefix) if packed else padded_tokens(part)
            kept = _HOLES * _kept(tokens, model, config) + _logits(part, model, packed)
            forward = max(forward, kept + (gradients if before else first))
    if resolve_device(config.device).type == "cuda":  # what Python holds, and what is read, is not on it
        return int(held + max(forward, gradients))
    return int(_FIXED + max(_loading(model), held + max(forward, gradients)))


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


def _kept(tokens: int, model: PreTrainedModel, config: TrainConfig) -> int:
    """Bytes that a micro-batch of so many tokens keeps for its backward pass, without logits. `--dtype auto` is
    taken for the larger."""
    dtype = "float32" if config.base_weights == "int8" and config.dtype == "auto" else config.dtype
    return max(
        _kept_in(kind, tokens, model, config) for kind in ("float32", "bfloat16") if dtype in (kind, "auto")
    )


def _kept_in(dtype: str, tokens: int, model: PreTrainedModel, config: TrainConfig) -> int:
    """A layer keeps what goes into its norms and comes out of them, queries, keys, values and the attention's
    output, and four arrays between gate, up and down projection. With products in bfloat16 these four are half as
    large; inputs of linear layers are there twice, and so are the layers' weights."""
    text = model.config.get_text_config()
    hidden, heads, layers = int(text.hidden_size), int(text.num_attention_heads), int(text.num_hidden_layers)
    head_size = int(getattr(text, "head_dim", None) or hidden // heads)
    keys = head_size * (getattr(text, "num_key_value_heads", None) or heads)
    product = 2 if dtype == "bfloat16" else _FLOAT
    values = (4 if config.lora else 6) * hidden + 3 * heads * head_size + 5 * keys
    products = 4 * int(text.intermediate_size) + (7 * config.lora_rank if config.lora else 0)
    in_a_layer = tokens * (_FLOAT * values + product * products)
    if dtype == "bfloat16":
        in_a_layer += 4 * tokens * hidden + 2 * _linear_weights(model) // layers
    if config.activation_checkpointing:
        return in_a_layer + layers * tokens * hidden * _FLOAT
    return layers * in_a_layer + 2 * tokens * hidden * _FLOAT


def _linear_weights(model: PreTrainedModel) -> int:
    """Weights of the float layers of the body."""
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def _logits(part: Sequence[Example], model: PreTrainedModel, packed: bool) -> int:
    """Packed, one chunk. Padded, where some row learns, with their gradient, beside the learned ones, their
    softmax and its gradient."""
    vocabulary = model.config.get_text_config().vocab_size
    learned_tokens = sum(example.learned_tokens for example in part)
    if packed:
        return int(min(_FLOAT * learned_tokens * vocabulary, CHUNK_BYTES))
    positions = {i for example in part for i, is_learned in enumerate(example.learned) if is_learned}
    return int(_FLOAT * (2 * len(part) * len(positions) + 3 * learned_tokens) * vocabulary)
