"""LoRA through peft: low-rank adapters on every linear layer but the head (Hu et al. 2021, arXiv:2106.09685)."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from handspun.models.lora_linear import LoraLinear
from handspun.models.quiet import quiet


def add_lora(
    model: PreTrainedModel,
    base_name: str,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    new_token_ids: Sequence[int] = (),
) -> PreTrainedModel:
    """The model with trainable adapters; everything else is frozen.

    base_name: recorded in the adapter's config, so that it finds its base again.
    new_token_ids: ids whose embedding rows are trained too, in the head as well: adapters alone cannot teach
        a model to say a token that it never learned.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        trainable_token_indices=_embedding_rows(model, new_token_ids) if new_token_ids else None,
    )
    config._register_custom_module({nn.Linear: LoraLinear})
    model.name_or_path = base_name
    with quiet():
        adapted: Any = get_peft_model(model, config)  # called and saved like the model that it wraps
    adapted.peft_config["default"].base_model_name_or_path = base_name
    wrapped: PreTrainedModel = adapted
    return wrapped


def has_adapter(module: nn.Module) -> bool:
    """Whether peft adds something to the layer."""
    return isinstance(module, LoraLayer | TrainableTokensWrapper)


@torch.no_grad()
def merged_weight(module: Any) -> Tensor:
    """The layer's weight with what its active adapters add to it: a copy, if there are some."""
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters)  # type: ignore
    if not isinstance(module, LoraLayer):
        return module.weight.detach()  # type: ignore[no-any-return]
    base: Any = module.get_base_layer()
    weight = base.float_weight() if hasattr(base, "float_weight") else base.weight.detach()
    for name in module.active_adapters:
        if name in module.lora_A:
            weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight  # type: ignore[no-any-return]


def _embedding_rows(model: PreTrainedModel, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """The modules that hold the rows: the input embedding and, where it is not the same tensor, the head."""
    rows = {_module_name(model, model.get_input_embeddings()): list(token_ids)}
    if not model.config.get_text_config().tie_word_embeddings:
        rows[_module_name(model, model.get_output_embeddings())] = list(token_ids)
    return rows


def _module_name(model: PreTrainedModel, module: object) -> str:
    name: str = next(name for name, found in model.named_modules() if found is module)
    return name.rpartition(".")[2]
