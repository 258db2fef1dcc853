"""Models to folders that transformers, peft, vLLM, CTranslate2 and llama.cpp's converter read."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from handspun.models.quiet import quiet
from handspun.models.rounding import round_stochastically


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Weights as safetensors of the given type, config, generation_config, and the tokenizer with its template.

    dtype: float32, or bfloat16, to which weights are rounded at random (the same way each time), since rounding to
        the nearest would take back most of what a short training changed.
    state: the weights, if they are not to be the model's own.
    A model with LoRA adapters gives a standard adapter folder: the adapters alone.
    """
    if hasattr(model, "peft_config"):
        with quiet():
            model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's template of a model card, with nothing filled in
    else:
        _save_weights(model, folder, dtype, model.state_dict() if state is None else state)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_weights(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, whole: dict[str, torch.Tensor]
) -> None:
    generator = torch.Generator(next(iter(whole.values())).device).manual_seed(0)
    cast: dict[int, torch.Tensor] = {}  # tied weights are one tensor, and must stay one
    state = {}
    for name, tensor in whole.items():
        if tensor.data_ptr() not in cast:
            rounds = dtype == torch.bfloat16 and tensor.dtype == torch.float32
            cast[tensor.data_ptr()] = round_stochastically(tensor, generator) if rounds else _as(dtype, tensor)
        state[name] = cast[tensor.data_ptr()]
    with quiet():
        model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")  # of the file, not of the model in memory
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _as(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
