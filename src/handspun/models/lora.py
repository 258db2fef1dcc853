"""LoRA through peft: low-rank adapters on linear layers, never the head (Hu et al. 2021, arXiv:2106.09685)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers import PreTrainedModel

from handspun.display import join_names
from handspun.errors import ConfigError, ModelError
from handspun.kernels import onednn
from handspun.models.adapters import embedding_rows
from handspun.models.tokenizer_file import quiet


class FrozenLayer(Protocol):
    """The layer under an adapter. Both methods return a new array, to which the adapter's result is added."""

    def matmul(self, x: Tensor) -> Tensor:
        """Return the output, (tokens, out). x: (tokens, in)."""

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of the input, (tokens, in). grad: (tokens, out)."""


class LoraLinear(Linear):  # type: ignore[misc]  # peft has no types
    """peft's layer, with a single active adapter without dropout computed as one operation."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., out). x: (..., in)."""
        # Everything but the plain case is left to peft.
        adapter = self._only_adapter()
        if adapter is None or args or kwargs:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base: FrozenLayer
        base, dtype = self.base_layer, torch.float32
        if isinstance(base, nn.Linear):
            dtype = _compute_dtype(x)
            bias = None if base.bias is None else base.bias.to(dtype)
            base = _Frozen(base.weight.detach().to(dtype), bias)
        flat, weight_a, weight_b = (
            tensor.to(dtype)
            for tensor in (x.flatten(0, -2), self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        )
        with torch.autocast(x.device.type, enabled=False):
            apply: Any = _LoraProduct.apply
            y: Tensor = apply(flat, weight_a, weight_b, self.scaling[adapter], base)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _only_adapter(self) -> str | None:
        """Return the single active adapter if it is plain (no dropout, no variant, not merged), else None."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] in self.lora_variant:
            return None
        dropout = self.lora_dropout[names[0]]
        plain = isinstance(dropout, nn.Identity) or not self.training
        return names[0] if plain and self.lora_B[names[0]].bias is None else None


@dataclass(frozen=True)
class _Frozen:
    """A float layer's weight, (out, in), and bias, as a `FrozenLayer`."""

    weight: Tensor
    bias: Tensor | None

    def matmul(self, x: Tensor) -> Tensor:
        return (onednn.matmul if self._with_onednn else F.linear)(x, self.weight, self.bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return onednn.matmul(grad, self.weight.t()) if self._with_onednn else grad @ self.weight

    @property
    def _with_onednn(self) -> bool:
        return self.weight.dtype == torch.float32 and onednn.beats_mkl(self.weight.device)


class _LoraProduct(torch.autograd.Function):
    """base(x) + scaling * x @ a.T @ b.T. x: (tokens, in). a: (rank, in). b: (out, rank)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, base: FrozenLayer) -> Tensor:
        reduced = x @ a.t()  # (tokens, rank)
        ctx.save_for_backward(x, reduced, a, b)
        ctx.scaling, ctx.base = scaling, base
        # Added in place, and so is the gradient below: peft's own layer makes three arrays of the output's size.
        return base.matmul(x).addmm_(reduced, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, reduced, a, b = ctx.saved_tensors
        grad_reduced = (grad @ b).mul_(ctx.scaling)  # (tokens, rank)
        grad_b = (grad.t() @ reduced).mul_(ctx.scaling)
        # Everything before the first adapter is frozen and needs no gradient.
        wanted = ctx.needs_input_grad[0]
        grad_x = ctx.base.input_gradient(grad).addmm_(grad_reduced, a) if wanted else None
        return grad_x, grad_reduced.t() @ x, grad_b, None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's type if autocast is on, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def add_lora(
    model: PreTrainedModel,
    base_name: str,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str] | None = None,
    new_token_ids: Sequence[int] = (),
) -> PreTrainedModel:
    """Add trainable LoRA adapters to the model and freeze everything else.

    Args:
        model: the base model.
        base_name: name of the base, recorded in the adapter's config.
        rank: rank of the LoRA matrices.
        alpha: LoRA's scale: updates are multiplied by alpha / rank.
        dropout: dropout on the adapters' input.
        target_modules: names of the linear layers that get adapters (None: all but the head).
        new_token_ids: ids whose rows of embedding and head are trained too. Adapters alone cannot teach a model to
            write a token that it was never trained on.

    Raises ConfigError for names that no linear layer of the model has.
    """
    _check_target_modules(model, target_modules or ())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[*target_modules] if target_modules else "all-linear",
        trainable_token_indices=_embedding_rows(model, new_token_ids) if new_token_ids else None,
    )
    # Experimental in peft, but its only way to use another class for its layers.
    config._register_custom_module({nn.Linear: LoraLinear})
    model.name_or_path = base_name
    with quiet():
        adapted: Any = get_peft_model(model, config)  # called and saved like the model that it wraps
    adapted.peft_config["default"].base_model_name_or_path = base_name
    wrapped: PreTrainedModel = adapted
    return wrapped


def merge_adapter(model: PreTrainedModel, adapter: Path, *, base_name: str) -> PreTrainedModel:
    """Return the base model with an adapter folder's weights merged.

    An adapter trained with added tokens brings its embedding, and the base's embedding is resized to it. Raises
    ModelError if the adapter's weights do not match its config on this base: some would be ignored or stay random.
    """
    rows = embedding_rows(adapter)
    embedding: Any = model.get_input_embeddings()
    if rows and rows != embedding.weight.shape[0]:
        # The new rows come from the adapter: no mean of the others is needed.
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with quiet():
            config = LoraConfig.from_pretrained(str(adapter))
            weights = load_peft_weights(str(adapter), device="cpu")
            adapted: Any = PeftModel(model, config)
    # peft raises anything for malformed configs.
    except Exception as error:
        raise ModelError(f"{adapter} cannot be read as an adapter of {base_name}: {error}") from error
    _check_weights(adapted, weights, adapter, base_name)
    with quiet():
        set_peft_model_state_dict(adapted, weights)
        if not config.ensure_weight_tying and any("lora_embedding_A" in name for name in weights):
            # Merged into a tied embedding, the adapter would change the head too.
            _untie(model)
        merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def unknown_settings(config: dict[str, Any]) -> list[str]:
    """Return the non-empty keys of an adapter_config.json that this version of peft does not know."""
    known = {field.name for field in fields(LoraConfig)}
    return sorted(name for name, value in config.items() if name not in known and value)


def _untie(model: PreTrainedModel) -> None:
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    if config.tie_word_embeddings and isinstance(head, nn.Linear):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        config.tie_word_embeddings = model.config.tie_word_embeddings = False


def _check_weights(adapted: Any, weights: dict[str, Tensor], adapter: Path, base_name: str) -> None:
    """Raise ModelError unless the file holds exactly the weights that its config needs, in their shapes."""
    asked = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # peft saves the whole embedding as well where it was resized.
    with quiet():
        known = get_peft_model_state_dict(adapted, save_embedding_layers=True) | asked
    there = {name: tuple(value.shape) for name, value in known.items()}
    _raise_if_any(
        weights.keys() - there.keys(),
        "weights that neither its config nor the base uses",
        adapter,
        base_name,
    )
    _raise_if_any(
        asked.keys() - weights.keys(),
        "weights in its config that are missing from its file",
        adapter,
        base_name,
    )
    other = {name for name, value in weights.items() if tuple(value.shape) != there[name]}
    _raise_if_any(
        {f"{name} is {tuple(weights[name].shape)}, expected {there[name]}" for name in other},
        "weights whose shape does not fit the base",
        adapter,
        base_name,
    )


def _raise_if_any(names: Iterable[str], what: str, adapter: Path, base_name: str) -> None:
    if found := sorted(names):
        raise ModelError(
            f"{adapter} does not fit its base {base_name}: it has {len(found)} {what} (first {found[0]}). Set "
            f"base_model_name_or_path in {adapter / 'adapter_config.json'} to the model that it was trained on."
        )


def _check_target_modules(model: PreTrainedModel, names: Sequence[str]) -> None:
    head = model.get_output_embeddings()
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    # peft's rule: a layer's name, or the end of it after a dot.
    unknown = [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if unknown:
        there = join_names(sorted({layer.rpartition(".")[2] for layer in layers}))
        raise ConfigError(
            f"--lora-target-modules: the model has no linear layer {join_names(unknown)} "
            f"(expected some of {there})."
        )


def _embedding_rows(model: PreTrainedModel, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """Return the token ids by module that holds their rows: the input embedding and, unless tied, the head."""
    rows = {_module_name(model, model.get_input_embeddings()): list(token_ids)}
    if not model.config.get_text_config().tie_word_embeddings:
        rows[_module_name(model, model.get_output_embeddings())] = list(token_ids)
    return rows


def _module_name(model: PreTrainedModel, module: object) -> str:
    name: str = next(name for name, found in model.named_modules() if found is module)
    return name.rpartition(".")[2]
