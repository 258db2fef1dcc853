"""LoRA through peft: low-rank adapters on every linear layer but the head (Hu et al. 2021, arXiv:2106.09685)."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from handspun.errors import ModelError
from handspun.models.lora_linear import LoraLinear
from handspun.models.quiet import quiet

_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings"}
"""What architectures call their input embedding."""


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


def merge_adapter(model: PreTrainedModel, adapter: Path, *, base_name: str) -> PreTrainedModel:
    """Return the base model with an adapter folder's weights added to its own.

    An adapter that was trained after tokens were added brings its embedding, and the base's gets as many rows.
    Raises ModelError where the adapter's weights are not those that its config asks for on this base: some would
    be left out, or stay random.
    """
    rows = embedding_rows(adapter)
    embedding: Any = model.get_input_embeddings()
    if rows and rows != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the new rows come from the adapter
    try:
        with quiet():
            config = LoraConfig.from_pretrained(str(adapter))
            weights = load_peft_weights(str(adapter), device="cpu")
            adapted: Any = PeftModel(model, config)
    except Exception as error:  # whatever peft makes of a strange config
        raise ModelError(f"{adapter} cannot be read as an adapter of {base_name}: {error}") from error
    _refuse_other_weights(adapted, weights, adapter, base_name)
    with quiet():
        set_peft_model_state_dict(adapted, weights)
        if not config.ensure_weight_tying and any("lora_embedding_A" in name for name in weights):
            _untie(model)  # merged into a tied embedding, the adapter would change the head too
        merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def embedding_rows(adapter: Path) -> int | None:
    """Return the rows of the embedding that an adapter's file holds; None if it holds none.

    Raises ModelError for a file that is no safetensors file.
    """
    file = adapter / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
    rows = [
        shape[0 if name.endswith("weight") else 1]
        for name, shape in shapes.items()
        if any(part in _EMBEDDINGS for part in name.split("."))
        and ((name.endswith(".weight") and ".lora_" not in name) or name.endswith("lora_embedding_A"))
    ]
    return max(rows, default=None)


def unknown_settings(config: dict[str, Any]) -> list[str]:
    """Return the keys of an adapter_config.json that say something, and that this peft does not know."""
    known = {field.name for field in fields(LoraConfig)}
    return sorted(name for name, value in config.items() if name not in known and value)


def _untie(model: PreTrainedModel) -> None:
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    if config.tie_word_embeddings and isinstance(head, nn.Linear):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        config.tie_word_embeddings = model.config.tie_word_embeddings = False


def _refuse_other_weights(adapted: Any, weights: dict[str, Tensor], adapter: Path, base_name: str) -> None:
    """Raise ModelError unless the file holds each weight that the adapter's config asks for, in its shape."""
    asked = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    with quiet():  # peft saves the whole embedding as well where it was resized
        known = get_peft_model_state_dict(adapted, save_embedding_layers=True) | asked
    there = {name: tuple(value.shape) for name, value in known.items()}
    _refuse(
        weights.keys() - there.keys(),
        "weights that nothing in its config or in the base takes up",
        adapter,
        base_name,
    )
    _refuse(
        asked.keys() - weights.keys(),
        "weights that its config asks for and that are not in its file",
        adapter,
        base_name,
    )
    other = {name for name, value in weights.items() if tuple(value.shape) != there[name]}
    _refuse(
        {f"{name} of {tuple(weights[name].shape)} for {there[name]}" for name in other},
        "weights of another shape than the base wants",
        adapter,
        base_name,
    )


def _refuse(names: Iterable[str], what: str, adapter: Path, base_name: str) -> None:
    if found := sorted(names):
        raise ModelError(
            f"{adapter} does not fit its base {base_name}: it has {len(found)} {what} (first {found[0]}). Check "
            f"that base_model_name_or_path in {adapter / 'adapter_config.json'} names the model it was trained on."
        )


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
